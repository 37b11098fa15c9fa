"""`memory_budget`: the bytes that are counted beside those of the compiled program, and what is chosen by them."""

import inspect

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from xlstm_jax import cells, models
from xlstm_jax.cells.gru import GRUState, gru_rule
from xlstm_jax.kernels.choice import chosen_forms
from xlstm_jax.kernels.linear import linear_recurrence
from xlstm_jax.kernels.memory import Bytes, fitting
from xlstm_jax.kernels.mlstm import mlstm
from xlstm_jax.kernels.recurrent import recurrent

RECURRENT = cells.MLSTM(16, 8, form="recurrent", memory_budget=10**9, rngs=nnx.Rngs(0))
XS = jax.ShapeDtypeStruct((4, 96, 16), jnp.float32)
FRAMES = jax.ShapeDtypeStruct((4, 96, 6, 6, 2), jnp.float32)
PICTURES = dict(space=(6, 6), chunk_size=16, memory_budget=10**9)
MANY = jax.ShapeDtypeStruct((32, 96, 16), jnp.float32)


def layer(make, xs=XS):
    """A cell's outputs, a function of its parameters and xs."""
    graphdef, params = nnx.split(nnx.eval_shape(make))
    return lambda params, xs: nnx.merge(graphdef, params)(xs)[0], (params, xs)


def memory():
    """The mLSTM's kernel."""
    k, v, gate = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 96, 2, 8), (2, 96, 2, 16), (2, 96, 2)))
    return lambda *args: mlstm(*args, chunk_size=16, memory_budget=10**9)[0], (k, k, v, gate, gate)


@pytest.mark.parametrize(
    "case",
    [
        lambda: layer(lambda: cells.LSTM(16, 32, chunk_size=32, memory_budget=10**9, rngs=nnx.Rngs(0))),
        lambda: layer(lambda: cells.LSTM(16, 32, chunk_size=16, memory_budget=10**9, rngs=nnx.Rngs(0)), MANY),
        lambda: layer(lambda: cells.PeepholeLSTM(16, 32, memory_budget=10**9, rngs=nnx.Rngs(0)), MANY),
        lambda: layer(lambda: cells.GRU(16, 32, remat=True, memory_budget=10**9, rngs=nnx.Rngs(0)), MANY),
        lambda: layer(lambda: cells.SLSTM(16, 32, chunk_size=8, remat=True, memory_budget=10**9, rngs=nnx.Rngs(0))),
        lambda: layer(lambda: cells.ConvLSTM(2, 8, 3, **PICTURES, rngs=nnx.Rngs(0)), FRAMES),
        lambda: layer(lambda: cells.ConvLSTM(2, 8, 3, remat=True, **PICTURES, rngs=nnx.Rngs(0)), FRAMES),
        lambda: layer(lambda: cells.ConvGRU(2, 8, 3, **PICTURES, rngs=nnx.Rngs(0)), FRAMES),
        memory,
    ],
    ids=[
        *("lstm", "lstm, rows last", "peepholes, rows last", "gru, rows last, remat", "slstm, remat"),
        *("convlstm", "convlstm, remat", "convgru", "mlstm"),
    ],
)
def test_the_bytes_are_those_of_the_compiled_program(case):
    function, arguments = case()
    (choice,) = chosen_forms(function, *arguments)
    stated = int(choice.reason.split()[-2])
    gradient = jax.grad(lambda *args: jnp.sum(function(*args) ** 2), argnums=range(len(arguments)))
    compiled = jax.jit(gradient).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert 0.95 * compiled < stated < 1.6 * compiled


def test_what_is_chosen():
    """The preferred length as long as it fits, then shorter or longer ones, then remat."""
    keep, again = Bytes(10, 0, 5), Bytes(1, 8, 6)
    assert fitting(64, 32, 800, [(False, keep), (True, again)])[:2] == (32, False)
    assert fitting(64, 32, 730, [(False, keep), (True, again)])[:2] == (16, False)
    assert fitting(64, 32, 300, [(False, keep), (True, again)])[:2] == (32, True)
    assert fitting(64, 4, 180, [(True, again)])[:2] == (8, True)  # longer chunks keep fewer states
    assert fitting(64, 32, "auto", [(False, keep)])[:2] == (32, False)
    with pytest.raises(ValueError, match="149 bytes fit nothing for 64 steps; the least is 176, with chunk_size=8 and"):
        fitting(64, 32, 149, [(False, keep), (True, again)])


@pytest.mark.parametrize("budget", [0, -1, 2.5, True, "all"])
def test_a_budget_is_a_number_of_bytes(budget):
    with pytest.raises(ValueError, match="memory_budget"):
        cells.LSTM(3, 4, memory_budget=budget, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("chunk_size", [0, -1, 2.5, True, "8"])
@pytest.mark.parametrize("kernel", ["mlstm", "recurrent", "linear_recurrence"])
def test_a_chunk_is_a_number_of_steps(kernel, chunk_size):
    """Without the checks of types that are there under pytest alone."""
    gates, memory, h = jnp.ones((1, 4, 2)), jnp.ones((1, 4, 2, 3)), jnp.ones((1, 3))
    function, arguments, otherwise = {
        "mlstm": (mlstm, (memory, memory, memory, gates, gates), ", or None for the usual one,"),
        "recurrent": (recurrent, (gru_rule, memory, jnp.ones((1, 3, 2, 3)), GRUState(h)), ""),
        "linear_recurrence": (linear_recurrence, (jnp.ones((1, 4, 3)), jnp.ones((1, 4, 3)), h), ""),
    }[kernel]
    with pytest.raises(ValueError, match=f"^chunk_size is {chunk_size!r}: an integer of at least 1{otherwise} is need"):
        inspect.unwrap(function)(*arguments, chunk_size=chunk_size)


@pytest.mark.parametrize("make", [cells.GRU, cells.MLSTM])
def test_a_budget_that_nothing_fits_or_that_no_form_reads(make):
    with pytest.raises(ValueError, match=r"memory_budget: 1000 bytes fit nothing for 96 steps; the least is \d+, with"):
        jax.eval_shape(lambda xs: make(16, 8, memory_budget=1000, rngs=nnx.Rngs(0))(xs)[0], XS)
    for cell in (cells.GRU(16, 8, form="scan", memory_budget=10**9, rngs=nnx.Rngs(0)), RECURRENT):
        with pytest.raises(ValueError, match=f"memory_budget is for .*, which chooses by it, and not .*'{cell.form}'"):
            jax.eval_shape(cell, XS)


@pytest.mark.parametrize("backbone", ["lstm_block", "xlstm[1:1]", "xlstm_large"])
def test_layers_of_a_model_choose_by_it(backbone):
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    options = dict(backbone=backbone, dim=32, num_layers=2, memory_budget=10**9)
    function, arguments = layer(lambda: models.LM(5, **options, rngs=nnx.Rngs(0)), tokens)
    chosen = chosen_forms(function, *arguments)
    assert chosen and all("; chunks of 16" in choice.reason for choice in chosen)
