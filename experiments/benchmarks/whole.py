"""Our whole models: training steps, generation, and training runs that draw their data inside the step."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.benchmarks.cases import Case
from experiments.benchmarks.layers import TOLERANCE, worst
from experiments.benchmarks.timing import Program, jax_program
from xlstm_jax import cells, models, optim, tasks, train
from xlstm_jax import generate as generation
from xlstm_jax.blocks import Block, MLSTMLayer
from xlstm_jax.cells.wrappers import layers_apart
from xlstm_jax.generate import GREEDY, generate
from xlstm_jax.layers import GatedFeedForward, round_up
from xlstm_jax.tasks.task import Batch

VOCABULARY = 256
HEADS = 4
ADAMW = dict(learning_rate=1e-3, weight_decay=0.1, clip=1.0, schedule="constant")
CHECKED = dict(B=2, T=72, seeds=1)  # sizes of the gradient check, at most


@dataclass(frozen=True)
class Noise:
    """Random tokens, drawn in the step: what a training step costs without a corpus."""

    length: int
    name: ClassVar[str] = "noise"
    vocab_size: ClassVar[int] = VOCABULARY
    carries_state: ClassVar[bool] = False

    def batch(self, split: str, seed: Any, step: Any, batch_size: int) -> Batch:
        key = jax.random.fold_in(jax.random.key(seed), step)
        tokens = jax.random.randint(key, (batch_size, self.length + 1), 0, VOCABULARY)
        ones = jnp.ones((batch_size, self.length), jnp.float32)
        return Batch(tokens[:, :-1], tokens[:, 1:], ones, None, None)


def model(case: Case, seed: Any = 0, param_dtype=jnp.float32) -> nnx.Module:
    """The model of a case, in its default forms."""
    s, shared = case.sizes, dict(param_dtype=param_dtype, rngs=nnx.Rngs(seed))
    if case.kind == "parity":
        task = task_of(case)
        return models.Tagger(task.vocab_size, task.num_classes, backbone="lstm", dim=s["H"], num_layers=1, **shared)
    if case.kind.startswith("train"):
        backbone = case.kind.replace("train", "xlstm")
        return models.LM(VOCABULARY, backbone=backbone, dim=s["D"], num_layers=s["layers"], num_heads=HEADS, **shared)
    D, layers = s["D"], s["layers"]
    lm = models.LM(VOCABULARY, backbone="mlstm_block", dim=D, num_layers=layers, num_heads=HEADS, **shared)
    norm = partial(nnx.RMSNorm, D, epsilon=1e-6, **shared)

    def block():  # that of the 7B model: queries of half the width, SwiGLU of 8/3 of it
        mixer = cells.MLSTM(D, D, num_heads=HEADS, qk_features=D // 2, **shared)
        ffn = GatedFeedForward(D, round_up(8 / 3 * D), activation="swish", num_blocks=layers, **shared)
        return Block(mixer, norm=norm(), ffn=ffn, ffn_norm=norm())

    lm.backbone = cells.Stack([block() for _ in range(layers)], pattern=("block",) * layers)
    return lm


def task_of(case: Case):
    """Parity of exactly T symbols, or noise."""
    T = case.sizes["T"]
    return tasks.make("parity", train_lengths=(T + 1, T + 1)) if case.kind == "parity" else Noise(T)


def in_plain_form(module: nnx.Module) -> nnx.Module:
    """Every cell inside computes step by step, differentiated by JAX."""
    for _, each in nnx.iter_graph(module):
        if isinstance(each, (cells.MLSTM, MLSTMLayer)):
            each.form = "recurrent"
        elif isinstance(each, cells.Cell) and getattr(each, "form", None) is not None:
            each.form = "scan"
    return module


def forms(case: Case) -> dict[str, Callable[[str], Program]]:
    """Builders by name."""
    if case.kind == "parity":
        vmapped = {"vmap over seeds": partial(runs, case, True)} if case.sizes["seeds"] > 1 else {}
        return {"default": partial(runs, case, False), **vmapped}
    build = {"prefill": prefill, "decode": decode}.get(case.kind, step)
    return {
        "default": lambda pass_: build(case, model(case)),
        "step by step": lambda pass_: build(case, in_plain_form(model(case))),
    }


def parameters(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def step(case: Case, lm: nnx.Module) -> Program:
    """One training step with its batch, as `train.fit` dispatches it."""
    tx, task, B = optim.make(steps=1000, **ADAMW), task_of(case), case.sizes["B"]
    state = train.init_state(lm, task, tx, B, 0)
    run = partial(train.train_step, graphdef=nnx.graphdef(lm), task=task, tx=tx, batch_size=B)
    return jax_program(run, state, carry=True)._replace(parameters=parameters(state.params))


def runs(case: Case, vmapped: bool, pass_: str) -> Program:
    """`steps` training steps of each seed in one program: one seed after another, or all at once."""
    s, task, tx = case.sizes, task_of(case), optim.make(steps=1000, **ADAMW)
    graphdef = nnx.graphdef(model(case))
    each = partial(train.train_step, graphdef=graphdef, task=task, tx=tx, batch_size=s["B"])
    states = [train.init_state(model(case, seed), task, tx, s["B"], seed) for seed in range(s["seeds"])]
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def run(state):
        return jax.lax.fori_loop(0, s["steps"], lambda _, state: each(state)[0], state)

    def all_runs(states):
        return ((jax.vmap(run) if vmapped else partial(jax.lax.map, run))(states),)

    count = parameters(states.params) // s["seeds"]
    return jax_program(all_runs, states, carry=True)._replace(parameters=count)


def prompt(case: Case) -> np.ndarray:
    """Random tokens (B, T), or (B, 1) where the prompt is no part of what is timed."""
    s = case.sizes
    return np.random.default_rng(0).integers(0, VOCABULARY, (s["B"], s.get("T", 1))).astype(np.int32)


def prefill(case: Case, lm: nnx.Module) -> Program:
    """The prompt's last logits and the state after it, as generation reads a prompt."""
    graphdef, params = nnx.split(layers_apart(lm))
    rows = list(prompt(case))

    def run(params):
        y, state = generation.prefill(graphdef, params, rows)
        return nnx.merge(graphdef, params).answers(y[:, None])[:, 0], state

    return jax_program(run, params)._replace(parameters=parameters(params))


def decode(case: Case, lm: nnx.Module) -> Program:
    """`generate` after a prompt of one token, the likeliest token each time; every step reads all parameters.

    What the compiler says is of the program that writes a block of tokens; its seconds are those of tracing too.
    """
    tokens, length = jnp.asarray(prompt(case)), case.sizes["length"]
    start = time.perf_counter()
    block = min(generation.BLOCK, generation.bucket(length))
    memory = generation.compiled_block(lm, len(tokens), GREEDY, block=block).memory_analysis()
    seconds = time.perf_counter() - start
    params = nnx.state(lm)
    return Program(
        lambda: generate(lm, tokens, length, sampling=GREEDY),
        seconds,
        None if memory is None else memory.temp_size_in_bytes,
        traffic_bytes=length * sum(x.nbytes for x in jax.tree.leaves(params)),
        parameters=parameters(params),
    )


def check(case: Case) -> dict[str, dict[str, Any]]:
    """The float64 gradients of one batch's loss, as `layers.check`; nothing where there is no gradient."""
    if case.kind in ("prefill", "decode"):
        return {}
    sizes = {axis: min(size, CHECKED.get(axis, size)) for axis, size in case.sizes.items()}
    small = case._replace(sizes=sizes)
    with jax.enable_x64(True):
        batch = task_of(small).batch("train", 0, 0, sizes["B"])
        found = []
        for each in (model(small, 0, jnp.float64), in_plain_form(model(small, 0, jnp.float64))):
            graphdef, params = nnx.split(each)

            def loss(params, graphdef=graphdef):
                return train.loss_and_accuracy(nnx.merge(graphdef, params), batch, None, None)[0]

            found.append(jax.jit(jax.grad(loss))(params))
        error = worst(*found)
    result = dict(error=float(f"{error:.2g}"), tolerance=TOLERANCE, ok=bool(error <= TOLERANCE))
    return dict.fromkeys(("default",), result | dict(against="step by step, autodiff, float64", sizes=sizes))
