"""The fused form with the rows last: every dense cell against its plain loop, and when it is chosen."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import close
from flax import nnx
from test_contract import OPTIONS, VARIANTS

from xlstm_jax import cells
from xlstm_jax.cells.base import RecurrentCell
from xlstm_jax.kernels import feature_major, fused

B, T, D_in, D = 2 * feature_major.VECTOR, 5, 3, 8
DENSE = {
    name: (cell, OPTIONS.get(name, {}))
    for name, cell in cells.CELLS.items()
    if inspect.isclass(cell) and issubclass(cell, RecurrentCell) and not name.startswith("conv")
}
CASES = {
    **DENSE,
    **VARIANTS,
    "remat": (cells.LSTM, dict(num_heads=2, remat=True)),
    "gates": (cells.SLSTM, dict(in_features=None, recurrent_init="orthogonal")),
    "noise": (cells.LSTM, dict(state_dropout=0.3, weight_drop=0.2, zoneout=0.1)),
}


@pytest.fixture
def served(monkeypatch):
    """How often the rows were put last."""
    calls, turned = [], feature_major.turned
    monkeypatch.setattr(fused.feature_major, "turned", lambda *args: calls.append(args) or turned(*args))
    return calls


def gradients(name, form, flags, **more):
    """Outputs, the last state, and the gradients of parameters, inputs and the first state."""
    cell, options = CASES[name]
    options = dict(in_features=D_in, features=D) | options | form | more
    graphdef, params = nnx.split(cell(**options, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    shape = (B, T, D_in) if options["in_features"] else (B, T, len(cell.gates), D)
    xs = jnp.asarray(rng.standard_normal(shape))
    state = jax.tree.map(lambda a: jnp.asarray(rng.random(a.shape)), nnx.merge(graphdef, params).initial_state(B))
    key = jax.random.key(0) if name == "noise" else None
    ys, pull = jax.vjp(lambda *args: nnx.merge(graphdef, args[0])(*args[1:], *flags, key=key), params, xs, state)
    return ys, pull(jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), ys))


@pytest.mark.parametrize("name", CASES)
def test_rows_last_is_the_plain_loop(x64, served, name):
    rng = np.random.default_rng(1)
    flags = jnp.asarray(rng.random((B, T)) < 0.7), jnp.asarray(rng.random((B, T)) < 0.3)
    want = gradients(name, dict(form="scan"), flags)
    assert not served
    close(gradients(name, dict(form="fused", chunk_size=2), flags), want)
    assert served


def test_runs_side_by_side(x64, served):
    """As a sweep trains several seeds in one program."""
    runs = [nnx.split(cells.LSTM(D_in, D, param_dtype=jnp.float64, rngs=nnx.Rngs(seed))) for seed in range(2)]
    graphdef, params = runs[0][0], [params for _, params in runs]
    xs = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, D_in)))
    gradient = jax.grad(lambda params: jnp.sum(jnp.sin(nnx.merge(graphdef, params)(xs)[0])))
    got = jax.vmap(gradient)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *params))
    close(got, jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(gradient, params)))
    assert served


def test_narrow_parameters_and_inputs(served):
    """bfloat16 outside, float32 inside: each gradient in its own dtype, as of the plain loop."""
    xs, found = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, D_in)), jnp.bfloat16), []
    for form in ("scan", "fused"):
        narrow = dict(param_dtype=jnp.bfloat16, dtype=jnp.float32, rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(cells.LSTM(D_in, D, form=form, **narrow))
        loss = lambda params, xs, graphdef=graphdef: jnp.sum(jnp.sin(nnx.merge(graphdef, params)(xs)[0]))  # noqa: E731
        found.append(jax.grad(loss, argnums=(0, 1))(params, xs))
    assert served and {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    close(*found, tolerance=0.02)


def test_both_directions_without_flags(x64, served):
    make = lambda **form: cells.GRU(D_in, D, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **form)  # noqa: E731
    xs = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, D_in)))
    both = [cells.Bidirectional(make(**form), make(**form)) for form in (dict(form="scan"), dict(form="fused"))]
    want, got = (jax.value_and_grad(lambda xs, cell=cell: jnp.sum(jnp.sin(cell(xs)[0])))(xs) for cell in both)
    close(got, want)
    assert served


@pytest.mark.parametrize("rows", [1, feature_major.VECTOR, 2 * feature_major.VECTOR + 1])
def test_other_numbers_of_rows_stay_first(served, rows):
    jax.eval_shape(cells.LSTM(D_in, D, rngs=nnx.Rngs(0)), jnp.zeros((rows, T, D_in)))
    assert not served


def test_convolutions_and_narrow_products_stay_first(served):
    jax.eval_shape(cells.LSTM(D_in, D, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), jnp.zeros((B, T, D_in)))
    jax.eval_shape(cells.ConvLSTM(2, 3, 3, rank=1, rngs=nnx.Rngs(0)), jnp.zeros((B, T, 4, 2)))
    assert not served
