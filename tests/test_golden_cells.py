"""Values and gradients of all cells but sLSTM and mLSTM beside those of torch, TensorFlow, keras, flax, ONNX and NX-AI.

Forward and backward in float64 by the fused form, forward in float32 by the scan. tests/golden/README.md describes the
numbers. A `Peer` brings each library to one layout: inputs (B, T, ...), states (layers * directions, B, ...).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_cases import CASES, check, gradients, jit, load, names

from xlstm_jax import cells, convert
from xlstm_jax.cells.elman import ElmanRule, ElmanState
from xlstm_jax.cells.gru import GRUState, gru_rule
from xlstm_jax.cells.lstm import LSTMRule, LSTMState
from xlstm_jax.cells.slstm import SLSTMState, slstm_rule
from xlstm_jax.cells.wrappers import BidirectionalState
from xlstm_jax.convert import Fused
from xlstm_jax.kernels.recurrent import recurrent


class Peer(NamedTuple):
    """The cell with the case's weights, and the way back for its gradients: a module to {name: array}."""

    cell: Any
    back: Any = None


def both(first, second, gates):
    """The gradients of two biases that are added, from that of the first; of a GRU's last gate each has its own."""
    added = len(first) * 2 // 3 if gates == 3 else len(first)
    return np.concatenate([first[:added], second[added:]])


def torch_peer(a, config, form):
    def back(module):
        grads = convert.to_torch_rnn(module)
        for name in [name for name in grads if name.startswith("bias_hh")]:
            gates = len(grads[name]) // config["hidden_size"]
            grads[name] = both(grads[name.replace("hh", "ih")], grads[name], gates)
        return grads

    return Peer(convert.from_torch_rnn(a, nonlinearity=config.get("nonlinearity", "tanh"), **form), back)


def keras_peer(a, config, form):
    kind = "conv_lstm" if "kernel_size" in config else "gru" if "reset_after" in config else "lstm"
    if kind == "conv_lstm":
        form = form | dict(padding=config["padding"], strides=config["strides"], dilation=config["dilation_rate"])

    def back(module):
        grads = convert.to_keras(module)
        if grads["bias"].ndim == 2:
            grads["bias"] = np.stack([grads["bias"][0], both(*grads["bias"], gates=3)])
        return grads

    return Peer(convert.from_keras(a, kind, **form), back)


def flax_peer(a, config, form):
    kind = (
        "conv_lstm" if "kernel_size" in config else "gru" if "cell/hn/kernel" in a and "cell/hz/kernel" in a else "lstm"
    )
    params = {}
    for name, array in a.items():
        block, leaf = name.removeprefix("cell/").split("/")
        params.setdefault(block, {})[leaf] = array

    def back(module):
        grads = convert.to_flax(module)
        if kind == "conv_lstm":
            grads["hh"]["bias"] = grads["ih"]["bias"]
        prefix = "" if kind == "conv_lstm" else "cell/"
        return {f"{prefix}{block}/{leaf}": x for block, leaves in grads.items() for leaf, x in leaves.items()}

    return Peer(convert.from_flax(params, kind, **form), back)


def tf_peer(a, config, form):
    """One kernel for [x, h], gates i, g, f, o."""
    order, C = "izfo", config["features"]
    bias = a["bias"] + np.repeat([0, 0, config["forget_bias"], 0], config["hidden"]).astype(a["bias"].dtype)
    fused = Fused(a["kernel"][:C], a["kernel"][C:], bias, None, a.get("projection/kernel"))
    options = dict(peephole=True, cell_clip=config["cell_clip"], projection=config["num_proj"])
    cell = convert.build(cells.LSTM, order, fused, options | form)
    cell.peephole[...] = jnp.stack([a[f"w_{gate}_diag"] for gate in "ifo"])

    def back(module):
        fused = convert.fuse(module, order)
        grads = {f"w_{gate}_diag": module.peephole[n] for n, gate in enumerate("ifo")}
        grads |= {"kernel": np.concatenate([fused.kernel, fused.recurrent]), "bias": fused.bias}
        return grads | ({} if fused.projection is None else {"projection/kernel": fused.projection})

    return Peer(cell, back)


def onnx_peer(a, config, form):
    """W, R (directions, gates * H, in) in the order i, o, f, c or z, r, h; both biases in B; peepholes i, o, f."""

    def cell(W, R, B, P=None):
        H = config["hidden_size"]
        fused = Fused(W.T, R.T, *np.split(B, 2))
        if "linear_before_reset" in config:
            return convert.build(cells.GRU, "zrn", fused, form | {"reset_after": config["linear_before_reset"] == 1})
        coupled = config.get("input_forget") == 1
        options = form | dict(peephole=P is not None, coupled=coupled, gate_clip=config.get("clip"))
        if coupled:  # the f that is given is not used
            fused = Fused(*(np.delete(x, np.s_[2 * H : 3 * H], axis=-1) for x in fused[:4]))
        cell = convert.build(cells.LSTM, "ioz" if coupled else "iofz", fused, options)
        if P is not None:
            i, o, f = P.reshape(3, H)
            cell.peephole[...] = jnp.stack([i, o] if coupled else [i, f, o])
        return cell

    directions = [cell(*weights) for weights in zip(*(a[name] for name in "WRBP" if name in a))]
    return Peer(cells.Bidirectional(*directions) if len(directions) == 2 else directions[0])


PEERS = {
    "torch": torch_peer,
    "keras": keras_peer,
    "flax": flax_peer,
    "tf": tf_peer,
    "ort": onnx_peer,
    "onnxref": onnx_peer,
}


def in_one_layout(a, library, config):
    """Batch first, one axis for layers and directions, time in the order of processing."""
    states = ("init/", "final/", "grad/init/", "cot/final/")
    if library in ("tf", "keras", "flax"):
        a = {key: x[None] if key.startswith(states) else x for key, x in a.items()}
    if library in ("ort", "onnxref"):
        a["in/x"] = a["in/x"].swapaxes(0, 1)
        a["out/y"] = a["out/y"].transpose(2, 0, 1, 3).reshape(*a["in/x"].shape[:2], -1)
    backwards = ("in/x", "grad/in/x") if config.get("go_backwards") else ()
    backwards = ("in/x", "out/y") if config.get("direction") == "reverse" else backwards
    return a | {key: a[key][:, ::-1] for key in backwards if key in a}


def nest(cell, states):
    """The state of a cell, or of cells in cells, from an iterator over the states of the plain ones."""
    if isinstance(cell, cells.Stack):
        return tuple(nest(layer, states) for layer in cell.layers)
    if isinstance(cell, cells.Bidirectional):
        return BidirectionalState(nest(cell.forward, states), nest(cell.backward, states))
    return next(states)


def stacked(state, prefix):
    """The inverse: the fields of all plain states, each (layers * directions, B, ...)."""
    states = jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "h"))
    return {f"{prefix}{key}": jnp.stack([getattr(s, key) for s in states]) for key in states[0]._fields}


def apply(graphdef, params, xs, state, mask, runs_on):
    cell = nnx.merge(graphdef, params)
    ys, last = cell(xs, state, mask=mask)
    if runs_on:
        ys = ys + cell(xs, last, mask=~mask)[0]
    return {"out/y": ys} | stacked(last, "final/")


forward = jit(apply, static_argnames=("graphdef", "runs_on"))


@functools.partial(jit, static_argnames=("graphdef", "runs_on"))
def backward(graphdef, weights, params, xs, state, mask, runs_on):
    def run(params, xs, state):
        return apply(graphdef, params, xs, state, mask, runs_on)

    outputs, (params_grad, xs_grad, state_grad) = gradients(run, weights, params, xs, state)
    return outputs, params_grad, {"in/x": xs_grad} | {f"{k}0": x for k, x in stacked(state_grad, "init/").items()}


def of_valid_steps(y, valid):
    """Zeros after the end of a row."""
    return y * valid.reshape(valid.shape + (1,) * (y.ndim - 2)).astype(y.dtype)


def weights_of_the_loss(a, library, valid):
    """keras repeats a row's last output after its end, so that its weights there count for the last valid step."""
    weights = {key.removeprefix("cot/"): x for key, x in a.items() if key.startswith("cot/")}
    if library == "keras":
        y = of_valid_steps(weights["out/y"], valid)
        last = np.where(valid, np.arange(valid.shape[1]), -1).max(axis=1)
        y[np.arange(len(y)), last] += (weights["out/y"] - y).sum(axis=1)
        weights["out/y"] = y
    return weights


CELLS = names("torch_", "tf_", "keras_", "flax_", "ort_", "onnxref_")
RUNS = [(name, d) for d in ("float64", "float32") for name in CELLS if (d, name[:4]) != ("float64", "ort_")]


@pytest.mark.parametrize("name, dtype", RUNS)
def test_cell(name, dtype):
    library, config = name.split("_")[0], CASES[name]["config"]
    a = in_one_layout(load(name, dtype), library, config)
    B, T = a["in/x"].shape[:2]
    valid = np.arange(T)[None] < a.get("in/lengths", np.full(B, T))[:, None]
    runs_on = library == "flax" and "in/lengths" in a
    chunk_size = next(L for L in (3, 4, T) if T % L == 0)
    form = {"form": "fused", "chunk_size": chunk_size} if dtype == "float64" else {"form": "scan"}
    with jax.enable_x64(dtype == "float64"):
        parameters = {key.removeprefix("par/"): x for key, x in a.items() if key.startswith("par/")}
        cell, back = PEERS[library](parameters, config, form)
        State = LSTMState if "init/c0" in a else GRUState if "gru" in name else ElmanState
        states = zip(*(a[f"init/{key}0"] for key in State._fields))
        state = nest(cell, (State(*fields) for fields in states))
        graphdef, params = nnx.split(cell)
        wanted = {key: x for key, x in a.items() if key.startswith(("out/", "final/"))}
        if not runs_on:
            wanted["out/y"] = of_valid_steps(a["out/y"], valid)
        if dtype == "float32" or "cot/out/y" not in a:
            check(name, forward(graphdef, params, a["in/x"], state, valid, runs_on=runs_on), wanted, dtype)
            return
        weights = weights_of_the_loss(a, library, valid)
        outputs, params_grad, grads = backward(graphdef, weights, params, a["in/x"], state, valid, runs_on=runs_on)
        grads |= {f"par/{key}": x for key, x in back(nnx.merge(graphdef, params_grad)).items()}
    check(name, outputs, wanted, dtype)
    check(name, grads, {key.removeprefix("grad/"): x for key, x in a.items() if key.startswith("grad/")}, dtype)


# NX-AI's cells with several heads, whose inputs are gates -------------------------------------------------------------

RULES = {"lstm": (LSTMRule(), LSTMState), "gru": (gru_rule, GRUState), "elman": (ElmanRule(), ElmanState)}
RULES["slstm"] = slstm_rule, SLSTMState  # from the empty state: flashrnn's n >= 1 differs for a given n < 1 alone


def in_heads_layout(a, name, prefix=""):
    """Gate inputs (B, T, G, D), R (N, in, G, out), b (G, D), what the reset scales, and the fields of the state."""
    if name.startswith("nxai"):
        gates, R = a[prefix + "in/gates"], a[prefix + "par/recurrent_kernel"]
        b, state = a[prefix + "par/bias"].swapaxes(0, 1), {key: a[prefix + f"init/{y}"] for key, y in zip("hc", "yc")}
    else:
        gates, R = a[prefix + "in/Wx"], a[prefix + "par/R"].transpose(1, 3, 0, 2)
        b, state = a[prefix + "par/b"], dict(zip("hcnm", a[prefix + "init/states"]))
    b, params = b.reshape(len(b), -1), ()
    if "gru" in name:  # the recurrent share of n comes first there
        R, b, params = np.roll(R, -1, axis=2), b[1:], (b[:1],)
    flat = {key: x.reshape(len(x), -1) for key, x in state.items()}
    return gates.reshape(*gates.shape[:3], -1), R, b, params, flat


def outputs_in_heads_layout(a, name, prefix=""):
    """Outputs (B, T, D), of flashrnn all fields of the state side by side."""
    if name.startswith("nxai"):
        h = a[prefix + "out/h"].swapaxes(1, 2)
        return {"out": h.reshape(*h.shape[:2], -1), "c": a[prefix + "final/c"]}
    states = np.moveaxis(a[prefix + "out/states"], 0, 2)
    return {"out": states.reshape(*states.shape[:2], -1)}


@functools.partial(jit, static_argnames=("name", "grad"))
def run_heads(weights, gates, R, b, params, state, name, grad):
    rule, _ = RULES[name.split("_")[1]]

    def all_states(*arguments):
        state, _ = rule(*arguments)
        return state, jnp.concatenate([state.h, *state[:-1]], axis=-1)

    def apply(gates, R, b, params, state):
        own = rule if name.startswith("nxai") else all_states
        options = {"form": "fused", "chunk_size": 4} if grad else {"form": "scan"}
        ys, last = recurrent(own, gates, R, state, b=b, params=params, **options)
        return {"out": ys} | last._asdict()

    if not grad:
        return apply(gates, R, b, params, state), None
    return gradients(apply, weights, gates, R, b, params, state)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", names("nxai_lstm", "flashrnn_"))
def test_heads(name, dtype):
    a = load(name, dtype)
    grad, State = dtype == "float64", RULES[name.split("_")[1]][1]
    *arguments, state = in_heads_layout(a, name)
    with jax.enable_x64(grad):
        weights = outputs_in_heads_layout(a, name, "cot/")
        outputs, grads = run_heads(weights, *arguments, State(**state), name=name, grad=grad)
    check(name, outputs, outputs_in_heads_layout(a, name), dtype)
    if grad:
        *wanted, state = in_heads_layout(a, name, "grad/")
        wanted = jax.tree.leaves((wanted, State(**state)))
        wanted = wanted[: 3 if State is SLSTMState else None]  # flashrnn's f may pass 1 where n is 0, so d c_0 differs
        check(name, dict(enumerate(jax.tree.leaves(grads))), dict(enumerate(wanted)), dtype)
