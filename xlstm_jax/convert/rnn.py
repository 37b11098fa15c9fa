"""Weights to and from other libraries: torch.nn.LSTM, GRU, RNN; keras LSTM, GRU, ConvLSTM; flax's cells.

Between a library and a cell stands `Fused`, the gates side by side along the last axis, so that a library is its names,
its order of the gates and the place of its biases. Where it has two biases that are only added, b is their sum, and on
the way out the first is b and the second 0; all else comes back bit for bit.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from ..cells import GRU, LSTM, Bidirectional, ConvGRU, ConvLSTM, Elman, ProjectedLSTM, Stack
from ..cells.base import Cell
from ..cells.conv import Window
from ..cells.lstm import LSTMRule
from ..names import unknown

KEEP_EQUATIONS = ("dtype", "param_dtype", "form", "chunk_size", "remat")  # options that change no value, and those that
KEEP_EQUATIONS += ("input_dropout", "state_dropout", "output_dropout", "weight_drop")  # need a key to do anything


class Fused(NamedTuple):
    """One cell's weights; of a convolution with the kernel's axes in front. A GRU's last gate is not merged."""

    kernel: Float[np.ndarray, "... C GD"]
    recurrent: Float[np.ndarray, "... H GD"]
    bias: Float[np.ndarray, " GD"] | None
    recurrent_bias: Float[np.ndarray, " GD"] | None = None
    projection: Float[np.ndarray, "D H"] | None = None


def build(kind: type[Cell], order: str, fused: Fused, options: dict[str, Any]) -> Cell:
    """The cell with these weights, whose gates are in the order `order` (our letters)."""
    spatial, reset_before = fused.kernel.ndim > 2, options.get("reset_after") is False
    take = [order.index(gate) for gate in "ifrznoh" if gate in order]  # the order of every cell here

    def by_gate(a):
        return a.reshape(*a.shape[:-1], len(order), -1)[..., take, :]

    R = by_gate(fused.recurrent) if spatial else by_gate(fused.recurrent)[None]
    new = {"W": by_gate(fused.kernel), "R": R[..., :2, :] if reset_before else R}
    if reset_before:
        new["S"] = R[..., 2:, :]
    if fused.projection is not None:
        new["S"] = fused.projection[None, :, None, :]
    if fused.bias is not None:
        new["b"] = by_gate(fused.bias)
        second = np.zeros_like(new["b"]) if fused.recurrent_bias is None else by_gate(fused.recurrent_bias)
        if "n" in order and not reset_before:
            new["b_hn"] = second[2]
            second = np.concatenate([second[:2], np.zeros_like(second[2:])])
        new["b"] = new["b"] + second
    *kernel_size, in_features, _, features = new["W"].shape
    own = {"param_dtype": jnp.result_type(*new.values()), "use_bias": "b" in new} | options
    sizes = (in_features, features, tuple(kernel_size)) if spatial else (in_features, features)

    def make():
        return kind(*sizes, kernel_init="zeros", recurrent_init="zeros", rngs=nnx.Rngs(0), **own)

    cell = nnx.eval_shape(make)
    cell = cell if set(nnx.state(cell)) <= set(new) else make()  # an option has parameters of its own
    for name, value in new.items():
        param = getattr(cell, name)
        if param is None or param.shape != value.shape:
            raise ValueError(f"the options do not fit the weights, whose {name} has the shape {value.shape}")
        param.set_value(jnp.asarray(value, param.dtype))
    return cell


def fuse(cell: Cell, order: str) -> Fused:
    """The inverse of `build`; the second bias is 0 but for what is scaled by a GRU's reset gate."""
    spatial = isinstance(cell, ConvLSTM)
    put = ["".join(cell.gates).index(gate) for gate in order]

    def side_by_side(a):
        return a[..., put, :].reshape(*a.shape[:-2], -1)

    W, R = np.asarray(cell.W[...]), np.asarray(cell.R[...])
    S = None if cell.S is None else np.asarray(cell.S[...])
    if isinstance(cell, GRU) and S is not None:
        R, S = np.concatenate([R, S], axis=-2), None
    bias = second = None
    if cell.b is not None:
        bias = np.asarray(cell.b[...])
        second = np.zeros_like(bias)
        if getattr(cell, "b_hn", None) is not None:
            second[2] = cell.b_hn[...]
        bias, second = side_by_side(bias), side_by_side(second)
    projection = None if S is None else S[0, :, 0, :]
    return Fused(side_by_side(W), side_by_side(R if spatial else R[0]), bias, second, projection)


def check_plain(cell: Any, kinds: Iterable[type[Cell]], library: str) -> None:
    """The cell is of one of the kinds, without the options that these libraries lack."""
    kind = next((kind for kind in (ConvLSTM, ConvGRU, LSTM, GRU, Elman) if isinstance(cell, kind)), None)
    if kind not in tuple(kinds):
        raise ValueError(f"{library} has no counterpart of {type(cell).__name__}")
    if cell.W is None or cell.num_heads > 1 or cell.zoneout:
        raise ValueError(
            f"{library} has neither cells without W nor heads nor zoneout, as this {type(cell).__name__} has"
        )
    if isinstance(cell, LSTM):
        plain = cell.rule == LSTMRule(projected=cell.S is not None)
        if not plain or cell.peephole is not None or cell.layer_norm:
            raise ValueError(f"{library} has the plain LSTM only, without the options of this {type(cell).__name__}")
    if cell.S is not None and isinstance(cell, LSTM) and library != "torch":
        raise ValueError(f"{library} has no LSTM with a projection")
    if cell.S is not None and isinstance(cell, GRU) and library != "keras":
        raise ValueError(f"{library} has no GRU with the reset before the product (reset_after=False)")


def check_options(options: Mapping[str, Any], library: str, own: Iterable[str] = ()) -> None:
    """None that would change the equations into others than the library's."""
    for name in options:
        if name not in (*own, *KEEP_EQUATIONS):
            raise ValueError(unknown(f"option of a cell with the weights of {library}", name, (*own, *KEEP_EQUATIONS)))


def as_numpy(name: str, value: Any) -> np.ndarray:
    """A floating array from one of numpy, jax or torch, of any device and with or without a gradient."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # numpy has no bfloat16 that torch could write into
        value = np.asarray(value.float()).astype(jnp.bfloat16) if "bfloat16" in str(value.dtype) else value
    value = np.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"parameter {name!r} must be floating, not {value.dtype}")
    return value


def check_names(arrays: Mapping[str, np.ndarray], wanted: Mapping[str, int]) -> None:
    """Exactly the wanted names, each with its number of axes."""
    for name in wanted:
        if name not in arrays:
            raise ValueError(f"parameter {name!r} is missing; there are {', '.join(arrays) or 'none'}")
    for name, array in arrays.items():
        if name not in wanted:
            raise ValueError(f"unknown parameter {name!r}; wanted are {', '.join(wanted)}")
        if array.ndim != wanted[name]:
            raise ValueError(f"parameter {name!r} must have {wanted[name]} axes, not the shape {array.shape}")


def check_shapes(arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Each array has the shape that the others ask for."""
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(f"parameter {name!r} has the shape {arrays[name].shape}; {shape} would fit the others")


# torch.nn.LSTM, GRU, RNN: weights (gates * hidden, in), the suffix _l0, _l0_reverse, _l1, ... -----------------------

TORCH = {4: (LSTM, "ifzo"), 3: (GRU, "rzn"), 1: (Elman, "h")}  # by the number of gates
TORCH_NAME = re.compile(r"(.*\.)?(weight_ih|weight_hh|bias_ih|bias_hh|weight_hr)_l(\d+)(_reverse)?")


class TorchLayout(NamedTuple):
    gates: int
    num_layers: int
    directions: tuple[str, ...]
    parts: tuple[str, ...]


def torch_layout(arrays: Mapping[str, np.ndarray]) -> TorchLayout:
    """What the names and shapes say; an error for what does not fit."""
    matches = []
    for name in arrays:
        match = TORCH_NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"unknown parameter {name!r}; torch's are called weight_ih_l0, bias_hh_l0_reverse and alike"
            )
        if match[1]:
            raise ValueError(f"parameter {name!r} has a prefix: prefix={match[1]!r} takes the parameters that have it")
        matches.append(match)
    found = {match[2] for match in matches}
    parts = ("weight_ih", "weight_hh")
    parts += ("bias_ih", "bias_hh") if found & {"bias_ih", "bias_hh"} else ()
    parts += ("weight_hr",) if "weight_hr" in found else ()
    directions = ("", "_reverse") if any(match[4] for match in matches) else ("",)
    num_layers = 1 + max((int(match[3]) for match in matches), default=0)
    names = {f"{part}_l{n}{d}": (part, n) for n in range(num_layers) for d in directions for part in parts}
    check_names(arrays, {name: 1 if part.startswith("bias") else 2 for name, (part, _) in names.items()})
    rows, H = arrays["weight_hh_l0"].shape
    D = arrays["weight_hr_l0"].shape[1] if "weight_hr" in parts else H
    gates = next((G for G in ((4,) if "weight_hr" in parts else TORCH) if rows == G * D), None)
    if gates is None:
        raise ValueError(f"parameter 'weight_hh_l0' has {rows} rows; 4, 3 or 1 times {D} are an LSTM, a GRU or an RNN")
    width = {0: arrays["weight_ih_l0"].shape[1]}
    shapes = {"weight_hh": (rows, H), "bias_ih": (rows,), "bias_hh": (rows,), "weight_hr": (H, D)}
    shapes_by_name = {
        name: (rows, width.get(n, len(directions) * H)) if part == "weight_ih" else shapes[part]
        for name, (part, n) in names.items()
    }
    check_shapes(arrays, shapes_by_name)
    return TorchLayout(gates, num_layers, directions, parts)


def from_torch_rnn(state_dict: Any, *, nonlinearity: str = "tanh", prefix: str = "", **options: Any) -> Cell:
    """The module of a torch LSTM, GRU or RNN: one cell, or a Stack where there are several layers or two directions.

    state_dict: torch tensors or arrays by name, or the torch module itself. nonlinearity: the RNN's, "tanh" or "relu",
    if it is no module, which knows it. prefix: of the names to take, others
    are left. options: of the cells (form=, dtype=, ...); the parameters keep the arrays' dtype without a param_dtype=.
    """
    check_options(options, "torch")
    if hasattr(state_dict, "state_dict"):
        state_dict, nonlinearity = state_dict.state_dict(), getattr(state_dict, "nonlinearity", nonlinearity)
    if not isinstance(state_dict, Mapping):
        raise ValueError(
            f"state_dict is a {type(state_dict).__name__}: parameters by name or a torch module are needed"
        )
    arrays = {k.removeprefix(prefix): as_numpy(k, x) for k, x in state_dict.items() if k.startswith(prefix)}
    if not arrays:
        raise ValueError(f"no parameter begins with {prefix!r}" if prefix else "the state dict is empty")
    layout = torch_layout(arrays)
    kind, order = TORCH[layout.gates]
    if kind is Elman:
        options["nonlinearity"] = nonlinearity
    elif nonlinearity != "tanh":
        raise ValueError(f"nonlinearity={nonlinearity!r} is for an RNN; these weights are of cells.{kind.__name__}")
    if "weight_hr" in layout.parts:
        kind = ProjectedLSTM
        options["projection"] = arrays["weight_hr_l0"].shape[0]

    def cell(suffix):
        own = {part: arrays[part + suffix].T for part in layout.parts}
        biases = (own.get("bias_ih"), own.get("bias_hh"))
        return build(kind, order, Fused(own["weight_ih"], own["weight_hh"], *biases, own.get("weight_hr")), options)

    def layer(n):
        each = [cell(f"_l{n}{direction}") for direction in layout.directions]
        return Bidirectional(*each) if len(each) == 2 else each[0]

    layers = [layer(n) for n in range(layout.num_layers)]
    return layers[0] if len(layers) == len(layout.directions) == 1 else Stack(layers)


def layers_of(module: Cell) -> list[Cell]:
    """The layers of a stack, also of one whose repeating group is stored stacked; else the module itself."""
    if not isinstance(module, Stack):
        return [module]
    if module.repeats == 1:
        return list(module.layers)
    graphdef, params = nnx.split(module.layers)
    return [
        layer
        for n in range(module.repeats)
        for layer in nnx.merge(graphdef, jax.tree.map(lambda leaf, n=n: leaf[n], params))
    ]


def to_torch_rnn(module: Cell) -> dict[str, np.ndarray]:
    """The state dict of the torch module that computes the same as a cell, or as a stack of cells or Bidirectional.

    An RNN's nonlinearity is no part of it.
    """
    if isinstance(module, Stack) and module.residual:
        raise ValueError("torch has no residual connections between layers, as this Stack has")
    arrays, kinds = {}, {}
    for n, layer in enumerate(layers_of(module)):
        each = {"": layer}
        if isinstance(layer, Bidirectional):
            if layer.merge != "concat":
                raise ValueError(f"torch has merge='concat' only, not {layer.merge!r}")
            each = {"": layer.forward, "_reverse": layer.backward}
        for direction, cell in each.items():
            check_plain(cell, (LSTM, GRU, Elman), "torch")
            kinds[cell.rule] = type(cell).__name__
            fused = fuse(cell, "".join(cell.gates))
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
            arrays |= {f"{k}_l{n}{direction}": np.array(x.T, order="C") for k, x in zip(names, fused) if x is not None}
    if len(kinds) > 1:
        raise ValueError(f"torch has layers of one kind and nonlinearity only, not {' and '.join(kinds.values())}")
    torch_layout(arrays)
    return arrays


# keras LSTM, GRU, ConvLSTM: kernels (..., in, gates * units) --------------------------------------------------------

KERAS = {"lstm": (LSTM, "ifzo"), "gru": (GRU, "zrn"), "conv_lstm": (ConvLSTM, "ifzo")}
KERAS_NAMES = ("kernel", "recurrent_kernel", "bias")


def from_keras(
    weights: Mapping[str, Any] | Sequence[Any], kind: str, *, reset_after: bool | None = None, **options: Any
) -> Cell:
    """The cell of a keras layer: kind "lstm", "gru" or "conv_lstm" (then also padding=, strides=, dilation=).

    weights: {"kernel", "recurrent_kernel", "bias"}, or `layer.get_weights()`. reset_after: of a GRU without a bias,
    True as in keras if not given; a bias says it, which has two rows after and one before.
    """
    if kind not in KERAS:
        raise ValueError(unknown("kind of keras layer", kind, KERAS))
    check_options(options, "keras", ("padding", "strides", "dilation", "space") if kind == "conv_lstm" else ())
    if not isinstance(weights, Mapping):
        if len(weights) not in (2, 3):
            raise ValueError(
                f"the weights of one keras layer are 2 or 3 arrays, {', '.join(KERAS_NAMES)}, not {len(weights)}"
            )
        weights = dict(zip(KERAS_NAMES, weights))
    arrays = {name: as_numpy(name, x) for name, x in weights.items()}
    cell, order = KERAS[kind]
    if kind == "gru":
        says = "bias" in arrays and arrays["bias"].ndim == 2
        options["reset_after"] = says if "bias" in arrays else reset_after is not False
    if reset_after not in (None, options.get("reset_after")):
        what = f"a bias of the shape {arrays['bias'].shape}" if kind == "gru" else f"kind={kind!r}"
        raise ValueError(f"reset_after={reset_after} does not fit {what}")
    bias_axes = {"bias": 2 if options.get("reset_after") else 1} if "bias" in arrays else {}
    check_names(arrays, dict.fromkeys(KERAS_NAMES[:2], kernel_axes(arrays, "kernel", kind)) | bias_axes)
    kernels = arrays["kernel"], arrays["recurrent_kernel"]
    shapes = dict(zip(KERAS_NAMES, fused_shapes(*kernels, len(order))))
    if options.get("reset_after"):
        shapes["bias"] = (2, *shapes["bias"])
    check_shapes(arrays, {name: shapes[name] for name in arrays})
    biases = arrays["bias"] if options.get("reset_after") and "bias" in arrays else (arrays.get("bias"), None)
    return build(cell, order, Fused(*kernels, *biases), options)


def to_keras(cell: Cell) -> dict[str, np.ndarray]:
    """{"kernel", "recurrent_kernel", "bias"}; its values in this order are what `layer.set_weights` takes."""
    check_plain(cell, (LSTM, GRU, ConvLSTM), "keras")
    order = "zrn" if isinstance(cell, GRU) else "ifzo"
    fused = fuse(cell, order)
    two = isinstance(cell, GRU) and cell.S is None
    bias = np.stack([fused.bias, fused.recurrent_bias]) if two and cell.b is not None else fused.bias
    arrays = zip(KERAS_NAMES, (fused.kernel, fused.recurrent, bias))
    return {name: array for name, array in arrays if array is not None}


def kernel_axes(arrays: Mapping[str, np.ndarray], name: str, kind: str) -> int:
    """2, and of a convolution what the kernel has, from 3 to 5."""
    return min(max(arrays[name].ndim if name in arrays else 3, 3), 5) if kind == "conv_lstm" else 2


def fused_shapes(kernel: np.ndarray, recurrent: np.ndarray, gates: int) -> tuple[tuple[int, ...], ...]:
    """What kernel, recurrent kernel and bias should be, by the widths of what the two kernels multiply."""
    *size, C, _ = kernel.shape
    D = recurrent.shape[-2]
    return (*size, C, gates * D), (*size, D, gates * D), (gates * D,)


# flax.linen OptimizedLSTMCell, LSTMCell, GRUCell: a kernel a gate; ConvLSTMCell: kernels (..., in, gates * features) --

FLAX = {"lstm": (LSTM, "ifzo"), "gru": (GRU, "rzn"), "conv_lstm": (ConvLSTM, "izfo")}
FLAX_BLOCKS = {  # of x, and of h
    "lstm": (("ii", "if", "ig", "io"), ("hi", "hf", "hg", "ho")),
    "gru": (("ir", "iz", "in"), ("hr", "hz", "hn")),
    "conv_lstm": (("ih",), ("hh",)),
}
FLAX_BIASES = {"lstm": ("hi", "hf", "hg", "ho"), "gru": ("ir", "iz", "in", "hn"), "conv_lstm": ("ih", "hh")}


def from_flax(params: Mapping[str, Any], kind: str, **options: Any) -> Cell:
    """The cell of a flax cell's parameters: kind "lstm" (OptimizedLSTMCell, LSTMCell), "gru" or "conv_lstm".

    params: with or without the outer "params" of linen's variables.
    flax adds 1 to a ConvLSTM's forget pre-activation; here that is part of the bias, which the cell has in any case.
    """
    if kind not in FLAX:
        raise ValueError(unknown("kind of flax cell", kind, FLAX))
    check_options(options, "flax", ("space",) if kind == "conv_lstm" else ())
    params = params["params"] if set(params) == {"params"} else params
    (cell, order), (of_x, of_h) = FLAX[kind], FLAX_BLOCKS[kind]
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    names = ["/".join(str(getattr(key, "key", key)) for key in path) for path, _ in leaves]
    arrays = {name: as_numpy(name, leaf) for name, (_, leaf) in zip(names, leaves)}
    kernels = [f"{block}/kernel" for block in of_x + of_h]
    biases = [f"{block}/bias" for block in FLAX_BIASES[kind]]
    if kind == "conv_lstm" and not any(name in arrays for name in biases):
        biases = []
    check_names(arrays, dict.fromkeys(kernels, kernel_axes(arrays, kernels[0], kind)) | dict.fromkeys(biases, 1))
    gates = len(order) // len(of_x)
    shapes = fused_shapes(arrays[f"{of_x[0]}/kernel"], arrays[f"{of_h[0]}/kernel"], gates)
    wanted = {f"{block}/kernel": shape for blocks, shape in zip((of_x, of_h), shapes) for block in blocks}
    check_shapes(arrays, wanted | dict.fromkeys(biases, shapes[2]))
    zeros = np.zeros(shapes[2], arrays[kernels[0]].dtype)

    def side_by_side(blocks, leaf):
        return np.concatenate([arrays.get(f"{block}/{leaf}", zeros) for block in blocks], axis=-1)

    kernel, recurrent = side_by_side(of_x, "kernel"), side_by_side(of_h, "kernel")
    bias, second = side_by_side(of_x, "bias"), side_by_side(of_h, "bias")
    if kind == "conv_lstm":
        second = second + one_to_forget(order, second)
    return build(cell, order, Fused(kernel, recurrent, bias, second), options)


def to_flax(cell: Cell) -> dict[str, dict[str, np.ndarray]]:
    """The nested dict of the flax cell that computes the same; biases are 0 where the cell has none.

    The 1 that flax adds to a ConvLSTM's forget gate is taken from the second bias, so that the first stays exact.
    """
    check_plain(cell, (LSTM, GRU, ConvLSTM), "flax")
    kind = "conv_lstm" if isinstance(cell, ConvLSTM) else "gru" if isinstance(cell, GRU) else "lstm"
    if kind == "conv_lstm":
        ones = (1,) * len(cell.kernel_size)
        if cell.maps.window != Window(ones, ones, "same"):
            raise ValueError("flax has no ConvLSTM with strides, dilation or padding='valid' of the input only")
    order = FLAX[kind][1]
    fused = fuse(cell, order)
    zeros = np.zeros(fused.kernel.shape[-1], fused.kernel.dtype)
    bias, second = (zeros, zeros) if fused.bias is None else (fused.bias, fused.recurrent_bias)
    if kind == "lstm":
        bias, second = second, bias
    if kind == "conv_lstm":
        second = second - one_to_forget(order, second)
    params = {}
    for blocks, *arrays in zip(FLAX_BLOCKS[kind], (fused.kernel, fused.recurrent), (bias, second)):
        for block, kernel, bias in zip(blocks, *(np.split(array, len(blocks), axis=-1) for array in arrays)):
            params[block] = {"kernel": kernel} | ({"bias": bias} if block in FLAX_BIASES[kind] else {})
    return params


def one_to_forget(order: str, bias: np.ndarray) -> np.ndarray:
    """1 in the forget gate's part of a bias, 0 elsewhere."""
    return np.repeat(np.array([gate == "f" for gate in order], bias.dtype), len(bias) // len(order))
