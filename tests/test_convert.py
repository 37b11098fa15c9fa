"""Weights to other libraries and back: the numbers that come back, and what is said of what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xlstm_jax import cells, convert

TORCH_PARTS = {"lstm": 4, "gru": 3, "rnn": 1}


def torch_state_dict(
    kind, D_in=3, D=4, layers=1, directions=1, projection=None, bias=True, dtype=np.float32, prefix=""
):
    """Random weights with torch's names and shapes."""
    draw = np.random.default_rng(0)
    H, rows = projection or D, TORCH_PARTS[kind] * D
    arrays = {}
    for n in range(layers):
        for suffix in ("", "_reverse")[:directions]:
            shapes = {"weight_ih": (rows, directions * H if n else D_in), "weight_hh": (rows, H)}
            shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)} if bias else {}
            shapes |= {"weight_hr": (H, D)} if projection else {}
            arrays |= {
                f"{prefix}{k}_l{n}{suffix}": draw.normal(size=shape).astype(dtype) for k, shape in shapes.items()
            }
    return arrays


def merged(arrays, D=4):
    """The two biases as one and 0, but for what the GRU's reset gate scales."""
    arrays = dict(arrays)
    for name in [name for name in arrays if name.startswith("bias_ih")]:
        other = name.replace("ih", "hh")
        stop = 2 * D if len(arrays[name]) == 3 * D else None
        first, second = arrays[name].copy(), arrays[other].copy()
        first[:stop] += second[:stop]
        second[:stop] = 0
        arrays |= {name: first, other: second}
    return arrays


def assert_same(got, want):
    """Equal bit for bit, names, dtypes and order included."""
    assert list(got) == list(want)
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def assert_same_cells(got, want):
    """Equal programs and equal parameters."""
    (graphdef, params), (graphdef_want, params_want) = nnx.split(got), nnx.split(want)
    assert graphdef == graphdef_want
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(params_want)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def randomised(module):
    """The module with random parameters, so that none is 0."""
    graphdef, params = nnx.split(module)
    draw = np.random.default_rng(1)
    return nnx.merge(graphdef, jax.tree.map(lambda a: jnp.asarray(draw.normal(size=a.shape), a.dtype), params))


TORCH = {
    "lstm": (dict(kind="lstm"), cells.LSTM),
    "lstm without bias": (dict(kind="lstm", bias=False), cells.LSTM),
    "projected": (dict(kind="lstm", projection=2, layers=2, directions=2), cells.Stack),
    "projected to the same width": (dict(kind="lstm", projection=4), cells.ProjectedLSTM),
    "gru": (dict(kind="gru"), cells.GRU),
    "gru without bias": (dict(kind="gru", layers=2, bias=False), cells.Stack),
    "gru both directions": (dict(kind="gru", directions=2), cells.Stack),
    "rnn": (dict(kind="rnn"), cells.Elman),
    "three layers": (dict(kind="rnn", layers=3, directions=2), cells.Stack),
}


@pytest.mark.parametrize("case", TORCH)
def test_torch_there_and_back(case):
    options, kind = TORCH[case]
    arrays = torch_state_dict(**options)
    module = convert.from_torch_rnn(arrays)
    assert type(module) is kind
    exported = convert.to_torch_rnn(module)
    assert_same(exported, merged(arrays))
    assert_same_cells(convert.from_torch_rnn(exported), module)


class Tensor:
    """What a torch tensor offers, as far as it is used."""

    def __init__(self, array, dtype):
        self.array, self.dtype = array, dtype

    def detach(self):
        return self

    cpu = detach

    def float(self):
        return Tensor(self.array, "torch.float32")

    def __array__(self, dtype=None, copy=None):
        assert self.dtype != "torch.bfloat16", "numpy cannot read it"
        return self.array


class Module:
    """What a torch module offers, as far as it is used."""

    nonlinearity = "relu"

    def state_dict(self):
        return torch_state_dict("rnn")


def test_a_module_and_variables_are_opened():
    assert convert.from_torch_rnn(Module()).rule.nonlinearity == "relu"
    cell = randomised(OURS["gru"]())
    assert_same_cells(convert.from_flax({"params": convert.to_flax(cell)}, "gru"), cell)


def test_options_prefix_and_dtypes():
    arrays = torch_state_dict("rnn", prefix="encoder.rnn.") | {"encoder.head.weight": np.zeros((2, 4))}
    cell = convert.from_torch_rnn(arrays, prefix="encoder.rnn.", nonlinearity="relu", form="scan", dtype=jnp.bfloat16)
    assert (cell.rule.nonlinearity, cell.form, cell.dtype) == ("relu", "scan", jnp.bfloat16)
    assert_same(convert.to_torch_rnn(cell), merged(torch_state_dict("rnn")))

    wide = torch_state_dict("lstm", dtype=np.float64)
    assert convert.from_torch_rnn(wide).R.dtype == np.float32
    with jax.enable_x64(True):
        assert convert.from_torch_rnn(wide).R.dtype == np.float64
        assert convert.from_torch_rnn(wide, param_dtype=jnp.float32).b.dtype == np.float32
    tensors = {name: Tensor(x, "torch.bfloat16") for name, x in torch_state_dict("lstm").items()}
    assert convert.from_torch_rnn(tensors).W.dtype == jnp.bfloat16


START = dict(kernel_init="zeros", recurrent_init="zeros", rngs=nnx.Rngs(0))
OURS = {
    "lstm": lambda **options: cells.LSTM(3, 4, **START, **options),
    "gru": lambda **options: cells.GRU(3, 4, **START, **options),
    "gru_before": lambda **options: cells.GRU(3, 4, reset_after=False, **START, **options),
    "conv_lstm": lambda **options: cells.ConvLSTM(3, 4, (2, 3), **START, **options),
    "conv_lstm_3d": lambda **options: cells.ConvLSTM(3, 4, (2, 1, 3), **START, **options),
}


def test_a_stack_with_a_pattern_is_exported_too():
    layers = [randomised(cells.GRU(4, 4, **START)) for _ in range(3)]
    assert_same(
        convert.to_torch_rnn(cells.Stack(layers, pattern=["gru"] * 3)), convert.to_torch_rnn(cells.Stack(layers))
    )


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("use_bias", [True, False])
def test_keras_there_and_back(name, use_bias):
    cell = randomised(OURS[name](use_bias=use_bias))
    kind = name.removesuffix("_before").removesuffix("_3d")
    options = {"reset_after": name == "gru"} if kind == "gru" else {}
    weights = convert.to_keras(cell)
    assert list(weights) == ["kernel", "recurrent_kernel", "bias"][: 2 + use_bias]
    assert_same_cells(convert.from_keras(weights, kind, **options), cell)
    assert_same_cells(convert.from_keras(list(weights.values()), kind, **options), cell)
    assert_same(convert.to_keras(convert.from_keras(weights, kind, **options)), weights)


def test_the_bias_tells_where_the_reset_acts():
    for name, S in (("gru", None), ("gru_before", (1, 4, 1, 4))):
        cell = convert.from_keras(convert.to_keras(randomised(OURS[name]())), "gru")
        assert (cell.S if S is None else cell.S.shape) == S


def test_keras_convolution_options():
    weights = convert.to_keras(OURS["conv_lstm"]())
    cell = convert.from_keras(weights, "conv_lstm", padding="valid", strides=(1, 2))
    assert cell.initial_state(1, (5, 6)).h.shape == (1, 4, 2, 4)


@pytest.mark.parametrize("name", ["lstm", "gru", "conv_lstm", "conv_lstm_3d"])
def test_flax_there_and_back(name):
    cell = randomised(OURS[name]())
    kind = name.removesuffix("_3d")
    params = convert.to_flax(cell)
    assert_same_cells(convert.from_flax(params, kind), cell)
    again = convert.to_flax(convert.from_flax(params, kind))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    bare = convert.from_flax(convert.to_flax(OURS[name](use_bias=False)), kind)
    assert not np.any(bare.b[...])


def test_the_forget_bias_of_flax_without_a_bias():
    params = {block: {"kernel": np.ones((3, C, 8), np.float32)} for block, C in (("ih", 1), ("hh", 2))}
    np.testing.assert_array_equal(convert.from_flax(params, "conv_lstm").b[...], [[0, 0], [1, 1], [0, 0], [0, 0]])


def without(arrays, name):
    return {key: x for key, x in arrays.items() if key != name}


T, TWO = torch_state_dict("lstm"), torch_state_dict("gru", layers=2, directions=2)
KERAS, FLAX = convert.to_keras(OURS["lstm"]()), convert.to_flax(OURS["gru"]())
ZEROS = np.zeros((5, 5), np.float32)
BAD = {
    "unknown": (lambda: convert.from_torch_rnn(T | {"weight_xx_l0": ZEROS}), "unknown parameter 'weight_xx_l0'"),
    "left over": (lambda: convert.from_torch_rnn(T | {"bias_ih_l00": ZEROS}), "unknown parameter 'bias_ih_l00'"),
    "missing": (lambda: convert.from_torch_rnn(without(T, "bias_hh_l0")), "'bias_hh_l0' is missing"),
    "missing direction": (
        lambda: convert.from_torch_rnn(without(TWO, "bias_ih_l1_reverse")),
        "'bias_ih_l1_reverse' is",
    ),
    "empty": (lambda: convert.from_torch_rnn({}), "the state dict is empty"),
    "prefix": (lambda: convert.from_torch_rnn(torch_state_dict("gru", prefix="a.b.")), r"prefix='a\.b\.' takes"),
    "no such prefix": (lambda: convert.from_torch_rnn(T, prefix="a."), "no parameter begins with 'a.'"),
    "rows": (
        lambda: convert.from_torch_rnn(T | {"weight_hh_l0": ZEROS[:, :3]}),
        "'weight_hh_l0' has 5 rows; 4, 3 or 1",
    ),
    "shape": (lambda: convert.from_torch_rnn(TWO | {"weight_ih_l1": ZEROS}), r"'weight_ih_l1' has the shape \(5, 5\)"),
    "axes": (lambda: convert.from_torch_rnn(T | {"bias_ih_l0": ZEROS}), "'bias_ih_l0' must have 1 axes"),
    "integers": (
        lambda: convert.from_torch_rnn(T | {"bias_ih_l0": np.zeros(16, int)}),
        "'bias_ih_l0' must be floating",
    ),
    "nonlinearity": (lambda: convert.from_torch_rnn(T, nonlinearity="relu"), "these weights are of cells.LSTM"),
    "heads": (lambda: convert.from_torch_rnn(T, num_heads=2), "unknown option .* of torch 'num_heads'"),
    "another equation": (
        lambda: convert.from_torch_rnn(T, peephole=True),
        "the weights of torch 'peephole'; valid",
    ),
    "keras equation": (lambda: convert.from_keras(KERAS, "lstm", coupled=True), "the weights of keras 'coupled'"),
    "flax equation": (lambda: convert.from_flax(FLAX, "gru", reset_after=False), "the weights of flax 'reset_after'"),
    "a list": (lambda: convert.from_torch_rnn(list(T.values())), "state_dict is a list: parameters by name"),
    "two kinds": (
        lambda: convert.to_torch_rnn(cells.Stack([OURS["gru"](), cells.LSTM(4, 4, **START)])),
        "layers of one kind and nonlinearity only, not GRU and LSTM",
    ),
    "capitals": (lambda: convert.from_flax(FLAX, "LSTM"), "unknown kind of flax cell 'LSTM'; nearest: lstm"),
    "no counterpart": (lambda: convert.to_torch_rnn(cells.SLSTM(3, 4, rngs=nnx.Rngs(0))), "no counterpart of SLSTM"),
    "convolution": (
        lambda: convert.to_keras(cells.ConvGRU(3, 4, 3, reset_after=True, **START)),
        "keras has no counterpart of ConvGRU",
    ),
    "peephole": (lambda: convert.to_torch_rnn(OURS["lstm"](peephole=True)), "plain LSTM only"),
    "coupled": (lambda: convert.to_keras(OURS["lstm"](coupled=True)), "plain LSTM only"),
    "projection": (lambda: convert.to_keras(OURS["lstm"](projection=2)), "keras has no LSTM with a projection"),
    "reset before": (lambda: convert.to_torch_rnn(OURS["gru_before"]()), "torch has no GRU with the reset before"),
    "gates as inputs": (lambda: convert.to_flax(cells.GRU(None, 4, **START)), "neither cells without W nor"),
    "many heads": (lambda: convert.to_torch_rnn(OURS["lstm"](num_heads=2)), "neither cells without W nor heads"),
    "zoneout": (lambda: convert.to_keras(OURS["gru"](zoneout=0.1)), "nor zoneout, as this GRU has"),
    "residual": (lambda: convert.to_torch_rnn(cells.Stack([OURS["gru"]()], residual=True)), "no residual connections"),
    "merge": (
        lambda: convert.to_torch_rnn(cells.Bidirectional(OURS["gru"](), OURS["gru"](), merge="sum")),
        "merge='concat' only",
    ),
    "unequal layers": (
        lambda: convert.to_torch_rnn(cells.Stack([OURS["gru"](), cells.GRU(4, 5, **START)])),
        r"'weight_ih_l1' has the shape \(15, 4\)",
    ),
    "keras kind": (lambda: convert.from_keras(KERAS, "lsmt"), "unknown kind of keras layer 'lsmt'; nearest: lstm"),
    "keras list": (lambda: convert.from_keras([ZEROS] * 6, "lstm"), "2 or 3 arrays"),
    "keras unknown": (lambda: convert.from_keras(KERAS | {"beta": ZEROS}, "lstm"), "unknown parameter 'beta'"),
    "keras missing": (lambda: convert.from_keras(without(KERAS, "kernel"), "conv_lstm"), "'kernel' is missing"),
    "keras shape": (lambda: convert.from_keras(KERAS, "gru"), r"'kernel' has the shape \(3, 16\); \(3, 12\)"),
    "keras axes": (lambda: convert.from_keras(KERAS, "conv_lstm"), "'kernel' must have 3 axes"),
    "keras reset": (lambda: convert.from_keras(KERAS, "gru", reset_after=True), "reset_after=True does not fit a bias"),
    "keras no reset": (lambda: convert.from_keras(KERAS, "lstm", reset_after=True), "does not fit kind='lstm'"),
    "flax kind": (lambda: convert.from_flax(FLAX, "mgu"), "unknown kind of flax cell 'mgu'"),
    "flax outside": (
        lambda: convert.from_flax({"cell": FLAX}, "gru"),
        "'ir/kernel' is missing; there are cell/hn/bias",
    ),
    "flax missing": (lambda: convert.from_flax(without(FLAX, "hn"), "gru"), "'hn/kernel' is missing"),
    "flax left over": (lambda: convert.from_flax(FLAX | {"ho": {"bias": ZEROS}}, "gru"), "unknown parameter 'ho/bias'"),
    "flax shape": (
        lambda: convert.from_flax(FLAX | {"hz": {"kernel": ZEROS}}, "gru"),
        r"'hz/kernel' has the shape \(5, 5\); \(4, 4\)",
    ),
    "flax strides": (lambda: convert.to_flax(OURS["conv_lstm"](strides=2)), "flax has no ConvLSTM with strides"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named(case):
    build, message = BAD[case]
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)
