"""Flax's own layers, linen and nnx, with our weights."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

from experiments.benchmarks import layers
from experiments.benchmarks.cases import Case
from experiments.benchmarks.layers import Data, Layer
from experiments.benchmarks.timing import Program, jax_program
from xlstm_jax import convert

Build = Callable[[str], Program]


def program(layer: Layer, given: Data) -> Build:
    return lambda pass_: layers.program(layer, pass_, given.cotangent)


def linen_cell(case: Case):
    kinds = {"lstm": linen.OptimizedLSTMCell, "bilstm": linen.OptimizedLSTMCell, "gru": linen.GRUCell}
    if case.kind == "convlstm":
        return linen.ConvLSTMCell(case.sizes["H"], (3, 3))
    return kinds[case.kind](case.sizes["H"])


def linen_rnn(case: Case, given: Data) -> Build:
    """nn.RNN of the cell, by nn.Bidirectional and seq_lengths where there are lengths."""
    ours, inputs = layers.cell(case, {}), tuple(map(jnp.asarray, given.inputs))
    if case.kind == "bilstm":
        module = linen.Bidirectional(*(linen.RNN(linen_cell(case)) for _ in range(2)))
        lengths = jnp.asarray(given.lengths)
        params = {
            f"{name}_rnn": {"cell": convert.to_flax(each)}
            for name, each in (("forward", ours.forward), ("backward", ours.backward))
        }
    else:
        module, lengths, params = linen.RNN(linen_cell(case)), None, {"cell": convert.to_flax(ours)}
    params = jax.tree.map(jnp.asarray, params)
    apply = lambda params, inputs: module.apply({"params": params}, *inputs, seq_lengths=lengths)  # noqa: E731
    return program(Layer(apply, params, inputs), given)


def nnx_cell(case: Case, ours, seed: int) -> nnx.Module:
    """Ours as an nnx cell, whose kernels hold the gates side by side."""
    s, rngs = case.sizes, nnx.Rngs(seed)
    kind = nnx.GRUCell if case.kind == "gru" else nnx.OptimizedLSTMCell
    module, blocks = kind(s["D"], s["H"], rngs=rngs), convert.to_flax(ours)
    for name, of in (("dense_i", "i"), ("dense_h", "h")):
        dense, mine = getattr(module, name), [block for key, block in blocks.items() if key[0] == of]
        dense.kernel[...] = jnp.concatenate([jnp.asarray(block["kernel"]) for block in mine], axis=-1)
        if getattr(dense, "bias", None) is not None:
            zeros = np.zeros(s["H"], np.float32)
            dense.bias[...] = jnp.concatenate([jnp.asarray(block.get("bias", zeros)) for block in mine])
    return module


def nnx_rnn(case: Case, given: Data) -> Build:
    """nnx.RNN of the cell; its parameters are differentiated, its counters of random draws are not."""
    ours, lengths = layers.cell(case, {}), None
    if case.kind == "bilstm":
        rnns = [nnx.RNN(nnx_cell(case, each, n)) for n, each in enumerate((ours.forward, ours.backward))]
        module, lengths = nnx.Bidirectional(*rnns, rngs=nnx.Rngs(0)), jnp.asarray(given.lengths)
    else:
        module = nnx.RNN(nnx_cell(case, ours, 0))
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def apply(params, inputs):
        fresh = jax.tree.map(jnp.copy, rest)  # a counter may change only in the trace that made it
        return nnx.merge(graphdef, params, fresh)(*inputs, seq_lengths=lengths)

    return program(Layer(apply, params, tuple(map(jnp.asarray, given.inputs))), given)


class Tagger(linen.Module):
    """The same model as ours on parity."""

    width: int

    @linen.compact
    def __call__(self, tokens):
        xs = linen.RNN(linen.OptimizedLSTMCell(self.width))(linen.Embed(3, self.width)(tokens))
        return linen.Dense(3, use_bias=False)(linen.LayerNorm(use_bias=False)(xs))


def parity(case: Case, given: None) -> Build:
    """A scan of the training steps, symbols drawn in the step, one seed after another."""
    s = case.sizes
    module, shape = Tagger(s["H"]), (s["B"], s["T"])
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b2=0.95, weight_decay=0.1))

    def start(key):
        params = module.init(key, jnp.zeros(shape, int))
        return params, tx.init(params), key

    def step(state, _):
        params, opt_state, key = state
        key, now = jax.random.split(key)
        tokens = jax.random.randint(now, shape, 1, 3)
        answers = jnp.sum(tokens == 2, axis=1) % 2 + 1

        def loss(params):
            logits = module.apply(params, tokens)[:, -1]
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, answers))

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, key), None

    def runs(states):
        return (jax.lax.map(lambda state: jax.lax.scan(step, state, None, length=s["steps"])[0], states),)

    states = jax.jit(jax.vmap(start))(jax.random.split(jax.random.key(0), s["seeds"]))
    count = sum(x.size for x in jax.tree.leaves(states[0])) // s["seeds"]
    return lambda pass_: jax_program(runs, states, carry=True)._replace(parameters=count)


PEERS = {
    "flax": {
        "parity": {"flax linen, scan of steps": parity},
        "lstm": {"flax linen OptimizedLSTMCell": linen_rnn},
        "gru": {"flax linen GRUCell": linen_rnn},
        "bilstm": {"flax linen Bidirectional": linen_rnn},
        "convlstm": {"flax linen ConvLSTMCell": linen_rnn},
    },
    "nnx": {
        "lstm": {"flax nnx OptimizedLSTMCell": nnx_rnn},
        "gru": {"flax nnx GRUCell": nnx_rnn},
        "bilstm": {"flax nnx Bidirectional": nnx_rnn},
    },
}
