"""What every cell, wrapper, block and model says of a bad argument, by one check for all of them."""

import contextlib
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xlstm_jax import cells, models
from xlstm_jax.attention import Attention
from xlstm_jax.blocks import Block, MLSTMLayer, SLSTMLayer
from xlstm_jax.cells.arguments import parameters

NEEDED = {"projected_lstm": dict(projection=3), "conv_lstm": dict(kernel_size=3), "conv_gru": dict(kernel_size=3)}
MODEL = dict(backbone="lstm", dim=8, num_layers=2)


def lm(**options):
    return models.LM(**(dict(vocab_size=5, rngs=nnx.Rngs(0)) | MODEL | options))


MAKERS = {
    name: lambda name=name, **options: cells.CELLS[name](
        **(dict(in_features=4, features=8, rngs=nnx.Rngs(0)) | NEEDED.get(name, {}) | options)
    )
    for name in cells.CELLS
}
MAKERS |= {
    kind.__name__: lambda kind=kind, **options: kind(**(dict(features=16, rngs=nnx.Rngs(0)) | options))
    for kind in (MLSTMLayer, SLSTMLayer, Attention)
}
MAKERS["LM"] = lm
WRONG = [
    ({"dtype": jnp.int32}, "unknown floating dtype 'int32'; valid: bfloat16, float16, float32, float64"),
    ({"dtype": "bfloat"}, "unknown floating dtype 'bfloat'; nearest: bfloat16"),
    ({"param_dtype": "int32"}, "unknown floating param_dtype 'int32'; valid: bfloat16"),
    ({"param_dtype": None}, "unknown floating param_dtype None; valid: bfloat16"),
    ({"rngs": 0}, r"rngs is 0: a generator such as nnx.Rngs\(0\) is needed"),
    ({"forget_bais": 1.0}, "unknown option of [A-Za-z]+ 'forget_bais'; "),
]


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_said_by_all(name):
    for options, message in WRONG:
        with pytest.raises(ValueError, match=message) as error:
            MAKERS[name](**options)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*cells.CELLS])
def test_widths(name):
    for wrong in (0, True, 8.0, "8", None):
        with pytest.raises(ValueError, match=f"features is {wrong!r}: an integer of at least 1 is needed"):
            MAKERS[name](features=wrong)
    widths = dict.fromkeys(("in_features", "features"), np.int64(8)) | NEEDED.get(name, {})
    cell = cells.CELLS[name](**widths, rngs=nnx.Rngs(0))
    assert type(cell.features) is type(cell.in_features) is int
    assert nnx.graphdef(cell) == nnx.graphdef(MAKERS[name](in_features=8))


LSTM = cells.LSTM(4, 4, rngs=nnx.Rngs(0))
XS = jnp.ones((2, 3, 4))
GRUS = [cells.GRU(4, 4, rngs=nnx.Rngs(0))] * 4
BAD = {
    "heads": (lambda: MAKERS["lstm"](num_heads=2.0), "num_heads is 2.0: an integer of at least 1"),
    "no inputs": (lambda: cells.ConvLSTM(None, 8, 3, rngs=nnx.Rngs(0)), "in_features is None: an integer"),
    "kernel": (lambda: MAKERS["conv_lstm"](kernel_size=2.0), "kernel_size is 2.0: wanted is a positive integer"),
    "peephole": (lambda: MAKERS["lstm"](peephole="position"), "peephole is 'position': True or False is needed"),
    "rate": (lambda: MAKERS["lstm"](input_dropout="a"), "input_dropout is 'a': a number is needed"),
    "rate of zoneout": (lambda: MAKERS["lstm"](zoneout="a"), "zoneout of c is 'a'"),
    "limit": (lambda: MAKERS["lstm"](cell_clip=float("nan")), "cell_clip is nan: a number is needed"),
    "form of a block": (
        lambda: MAKERS["MLSTMLayer"](form="fused"),
        "unknown form of MLSTMLayer 'fused'; valid",
    ),
    "merge": (lambda: cells.Bidirectional(LSTM, LSTM, merge=3), "merge is 3: a name is needed"),
    "classes": (lambda: cells.Bidirectional(cells.LSTM, cells.LSTM), "forward is the class LSTM: a cell is needed"),
    "a mixer": (lambda: Block(cells.LSTM), "mixer is the class LSTM"),
    "layer": (lambda: cells.Stack([LSTM, cells.LSTM]), "layer 1 is the class LSTM: a cell is needed"),
    "no list": (lambda: cells.Stack(LSTM), "layers is a LSTM: a list"),
    "no layers": (lambda: cells.Stack([]), "layers is empty: a list of at least one layer"),
    "a layer's width": (
        lambda: cells.Stack([LSTM, cells.LSTM(3, 4, rngs=nnx.Rngs(0))])(XS),
        r"layer 1: xs must have the shape \(B, T, 3\), not \(2, 3, 4\)",
    ),
    "repeats": (
        lambda: cells.Stack(GRUS, pattern="gggg")(XS, cells.Stack(GRUS[:2], pattern="gg").initial_state(2)),
        "state must have a leading axis of the 4 repeats",
    ),
    "no rows": (lambda: LSTM(XS[:0]), r"xs has no row \(B = 0\); at least one is needed"),
    "no rows, matrix memory": (lambda: MAKERS["mlstm"]()(XS[:0]), r"xs has no row \(B = 0\)"),
    "no rows of tokens": (lambda: lm()(jnp.zeros((0, 3), int)), r"tokens has no row \(B = 0\)"),
    "width of a step": (lambda: LSTM.step(XS[:, 0, :3], None), r"x must have the shape \(B, 4\), not \(2, 3\)"),
    "step of a list": (lambda: LSTM.step([1.0], None), "x must be an array, not a list"),
    "reset of a step": (lambda: LSTM.step(XS[:, 0], None, [True]), "reset must be an array, not a list"),
    "token of a step": (lambda: lm().step(jnp.zeros((2, 1), int), None), r"tokens must have the shape \(B\), not"),
    "number as key": (lambda: LSTM(XS, key=1), r"key must be one key, such as jax.random.key\(0\), not a int"),
    "old key": (lambda: LSTM(XS, key=jax.random.PRNGKey(0)), r"key must be .*, not uint32 \(2,\)"),
    "keys": (lambda: LSTM(XS, key=jax.random.split(jax.random.key(0))), r"key must be .*, not key<fry> \(2,\)"),
    "number as key of a stack": (lambda: cells.Stack(GRUS, pattern="gggg")(XS, key=1), "key must be one key"),
    "key of a cell without noise": (lambda: MAKERS["min_gru"]()(XS, key="a"), "key must be one key, .*not a str"),
    "vocabulary": (lambda: lm(vocab_size=0), "vocab_size is 0: an integer of at least 1"),
    "half a vocabulary": (lambda: lm(vocab_size=5.0), "vocab_size is 5.0: an integer"),
    "layers": (lambda: lm(num_layers=0), "num_layers is 0: an integer"),
    "a list of tokens": (lambda: lm()([[1, 2]]), "tokens must be an array, not a list"),
    "a large token": (lambda: lm()(jnp.array([[1, 5]])), "a token 5, which is not in the vocabulary of 5: 0 to 4"),
    "a negative token": (lambda: lm()(np.array([[-1, 1]])), "a token -1, which is not in the vocabulary"),
}


@contextlib.contextmanager
def unchecked():
    """The calls as users have them, without the run-time annotations that pytest adds."""
    with pytest.MonkeyPatch.context() as patch:
        for cell in {base for kind in (*cells.CELLS.values(), cells.Stack, models.LM, Block) for base in kind.__mro__}:
            for name, function in list(vars(cell).items()):
                if inspect.isfunction(function) and cell.__module__.startswith("xlstm_jax"):
                    patch.setattr(cell, name, inspect.unwrap(function))
        yield


@pytest.mark.parametrize("case", BAD)
def test_what_came_and_what_is_right(case):
    build, message = BAD[case]
    with unchecked(), pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


def test_a_masked_token_may_be_anything_and_under_jit_nothing_is_looked_at():
    model, tokens = lm(), jnp.array([[1, -1]])
    assert np.all(np.isfinite(model(tokens, mask=tokens >= 0)[0]))
    assert jax.eval_shape(lambda tokens: model(tokens)[0], tokens).shape == (1, 2, 5)
    assert jax.eval_shape(lambda: model(jnp.array([[1, 4]]))[0]).shape == (1, 2, 5)  # a constant is looked at


def test_known_names_are_those_of_all_bases():
    positional, known, open_ended = parameters(cells.ConvLSTM)
    assert positional == ["in_features", "features", "kernel_size"] and not open_ended
    assert known["peephole"] == bool | str and known["chunk_size"] is int
    assert parameters(models.LM)[2]  # options of the backbone's cells, which they check
    assert pickle.loads(pickle.dumps(cells.LSTM)) is cells.LSTM
