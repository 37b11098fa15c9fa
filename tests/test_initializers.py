"""Initialisers by name, as arguments of every cell."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xlstm_jax import cells
from xlstm_jax.initializers import initializer

KEY = jax.random.key(0)


def test_values():
    assert np.array_equal(initializer("identity(2)")(KEY, (3, 3)), 2 * np.eye(3))
    np.testing.assert_allclose(initializer("linspace(3, 6)")(KEY, (1, 4)), [[3, 4, 5, 6]])
    assert np.all(np.asarray(initializer(1.5)(KEY, (2,))) == 1.5)
    q = initializer("orthogonal(2)")(KEY, (5, 5))
    np.testing.assert_allclose(q @ q.T, 4 * np.eye(5), atol=1e-5)
    assert float(jnp.std(initializer("normal(0.3)")(KEY, (4_000,)))) == pytest.approx(0.3, rel=0.1)
    assert initializer("normal(0.3)") is initializer("normal(0.3)")  # so that modules that are built alike are equal


def test_chrono_forgets_over_times_up_to_the_longest():
    cell = cells.LSTM(3, 2_000, recurrent_init="zeros", forget_bias="chrono(100)", rngs=nnx.Rngs(0))
    f, i = cell.b[1], cell.b[0]
    times = np.exp(f)  # 1 / (1 - sigmoid(b)) = 1 + exp(b) steps
    assert times.min() >= 1 and times.max() <= 99 and abs(times.mean() - 50) < 3
    assert np.array_equal(i, -f)


@pytest.mark.parametrize(
    "cell, gate, sign", [("lstm", 1, 1), ("coupled_lstm", 0, -1), ("gru", 1, 1), ("mgu", 0, -1), ("slstm", 1, 1)]
)
def test_forget_bias_is_that_of_what_keeps_the_state(cell, gate, sign):
    b = cells.CELLS[cell](3, 8, forget_bias=2.5, rngs=nnx.Rngs(0)).b[...]
    assert np.all(b[gate] == sign * 2.5)
    assert np.all(np.delete(np.asarray(b), gate, axis=0) == 0)


@pytest.mark.parametrize("name", ["elman", "lstm", "layer_norm_lstm", "gru", "mgu", "slstm", "conv_lstm"])
def test_every_cell_takes_them(name):
    options = {"kernel_size": 3} if name == "conv_lstm" else {}
    options |= {} if name == "elman" else {"forget_bias": 0.5 if name != "mgu" else -0.5}
    names = dict(kernel_init="uniform(0.1)", recurrent_init="normal(1e-3)", bias_init="constant(0.5)")
    cell = cells.CELLS[name](8, 8, rngs=nnx.Rngs(0), **names, **options)
    assert float(jnp.abs(cell.W[...]).max()) <= 0.1 and float(jnp.abs(cell.R[...]).max()) < 1e-2
    assert np.all(np.asarray(cell.b[...]) == 0.5)


def test_identity_of_a_convolution_is_one_place():
    cell = cells.ConvGRU(3, 4, (3, 3), recurrent_init="identity", rngs=nnx.Rngs(0))
    assert np.array_equal(cell.R[1, 1, :, 0], np.eye(4)) and float(cell.R[...].sum()) == 8


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: cells.LSTM(3, 4, use_bias=False, forget_bias=1.0, rngs=nnx.Rngs(0)), "this LSTM has no bias"),
        (lambda: cells.LSTM(3, 4, forget_gate=False, forget_bias=1.0, rngs=nnx.Rngs(0)), "has no forget gate"),
        (lambda: cells.Elman(3, 4, forget_bias=1.0, rngs=nnx.Rngs(0)), "this Elman has no forget gate"),
        (lambda: cells.MinLSTM(3, 4, use_bias=False, forget_bias=1.0, rngs=nnx.Rngs(0)), "this MinLSTM has no bias"),
    ],
)
def test_a_forget_bias_that_nothing_has_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_low_precision_parameters_are_drawn_in_float32():
    full, half = (cells.GRU(3, 8, param_dtype=d, rngs=nnx.Rngs(0)).R[...] for d in (jnp.float32, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16 and np.array_equal(full.astype(jnp.bfloat16), half)


@pytest.mark.parametrize(
    "name, message",
    [
        ("ortho", "unknown initialiser 'ortho'"),
        ("uniform", r"should be uniform\(bound\)"),
        ("chrono(2)", r"should be chrono\(longest > 2\)"),
        ("chrono(0.5)", r"should be chrono\(longest > 2\)"),
        ("chrono(nan)", r"should be chrono\(longest > 2\)"),
        ("chrono(inf)", r"should be chrono\(longest > 2\)"),
        ("constant(nan)", r"should be constant\(value\)"),
        (float("inf"), "inf should be a finite number"),
        ([1], r"\[1\] should be a finite number, a name such as 'normal\(0.02\)', or a function"),
        (None, "None should be a finite number"),
        ("linspace(3)", r"should be linspace\(start, stop\)"),
        ("glorot(2)", r"should be glorot\(\)"),
        ("normal(0.1, 5)", r"should be normal\(std=0.01\)"),
        ("normal(a)", r"should be normal\(std=0.01\)"),
    ],
)
def test_a_bad_name_says_what_would_be_right(name, message):
    with pytest.raises(ValueError, match=message) as error:
        inspect.unwrap(initializer)(name)
    assert "\n" not in str(error.value)
