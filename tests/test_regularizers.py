"""Dropout that is locked over time, zoneout, weight drop, AR and TAR; random only where a key is given."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xlstm_jax import cells
from xlstm_jax.cells.gru import GRUState
from xlstm_jax.cells.lstm import LSTMState
from xlstm_jax.regularizers import activation_l2, dropout, locked_dropout, temporal_l2

XS = jax.random.normal(jax.random.key(0), (2, 6, 3))
RATES = {
    "input_dropout": 0.5,
    "state_dropout": 0.5,
    "output_dropout": 0.5,
    "weight_drop": 0.5,
    "zoneout": 0.5,
}


def program(cell, xs):
    """key -> (gradients, outputs), compiled once for all keys."""
    graphdef, params = nnx.split(cell)

    def loss(params, key):
        ys, state = nnx.merge(graphdef, params)(xs, key=key)
        return jnp.sum(ys**2) + jnp.sum(state.h), ys

    return partial(jax.jit(jax.grad(loss, has_aux=True)), params)


def test_locked_dropout_drops_the_same_entries_at_every_step():
    ys = locked_dropout(jnp.ones((4, 7, 50)), 0.25, jax.random.key(1))
    assert np.array_equal(ys, np.broadcast_to(ys[:, :1], ys.shape))
    assert set(np.unique(ys)) == {0, np.float32(1 / 0.75)}
    assert abs(float(jnp.mean(ys)) - 1) < 0.2
    assert locked_dropout(XS, 0.25, None) is XS


@pytest.mark.parametrize("name", RATES)
def test_a_regulariser_is_random_with_a_key_alone_and_equal_in_all_forms(x64, name):
    def make(form, rate=RATES[name]):
        options = {name: rate, "form": form, "chunk_size": 4, "param_dtype": jnp.float64}
        return cells.LSTM(3, 5, rngs=nnx.Rngs(0), **options)

    xs, keys = XS.astype(jnp.float64), jax.random.split(jax.random.key(2))
    run = program(make("scan"), xs)
    scan, fused = run(keys[0]), program(make("fused"), xs)(keys[0])
    for got, want in zip(jax.tree.leaves(fused), jax.tree.leaves(scan)):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)
    assert not np.allclose(scan[1], run(keys[1])[1])
    if name != "zoneout":  # whose expectation is not the plain cell's value
        assert np.array_equal(run(None)[1], program(make("scan", 0.0), xs)(None)[1])


def test_zoneout_keeps_the_old_state():
    """Rate 1 keeps all of it; in expectation it is the mean of the old and the new."""
    cell = cells.GRU(3, 5, zoneout=1.0, rngs=nnx.Rngs(0))
    state = GRUState(jnp.ones((2, 5)))
    for key in (None, jax.random.key(0)):
        ys, last = cell(XS, state, key=key)
        assert np.all(np.asarray(last.h) == 1) and np.all(np.asarray(ys) == 1)
    plain, half = (cells.GRU(3, 5, zoneout=rate, rngs=nnx.Rngs(0)) for rate in (0.0, 0.5))
    np.testing.assert_allclose(half(XS[:, :1], state)[1].h, (plain(XS[:, :1], state)[1].h + 1) / 2, rtol=1e-6)


def test_zoneout_of_a_projected_lstm():
    """c and h have widths of their own; nor does the projection disturb the layer norm of the gates."""
    cell = cells.ProjectedLSTM(3, 5, projection=2, layer_norm=True, zoneout={"c": 1.0, "h": 0.5}, rngs=nnx.Rngs(0))
    state = LSTMState(jnp.ones((2, 5)), jnp.ones((2, 2)))
    ys, last = cell(XS, state, key=jax.random.key(0))
    assert ys.shape == (2, 6, 2)
    assert np.all(np.asarray(last.c) == 1) and not np.all(np.asarray(last.h) == 1)


def test_state_dropout_spares_the_elementwise_path():
    """Only the recurrent products see the dropped h: with R = 0 nothing changes."""
    cell = cells.GRU(3, 5, state_dropout=0.9, recurrent_init="zeros", rngs=nnx.Rngs(0))
    np.testing.assert_allclose(cell(XS, key=jax.random.key(1))[0], cell(XS)[0], rtol=1e-6)


def test_dropout_between_layers_is_not_after_the_last():
    layers = [cells.Elman(3, 4, rngs=nnx.Rngs(0)), cells.Elman(4, 400, rngs=nnx.Rngs(1))]
    ys, _ = cells.Stack(layers, dropout=0.5)(XS, key=jax.random.key(0))
    assert np.all(np.asarray(ys) != 0)


def test_activation_penalties_count_valid_neighbours_only():
    ys = jnp.asarray([[[1.0], [3.0], [7.0], [100.0]]])
    mask = jnp.asarray([[True, True, True, False]])
    assert float(activation_l2(ys, mask)) == pytest.approx((1 + 9 + 49) / 3)
    assert float(temporal_l2(ys, mask)) == pytest.approx((4 + 16) / 2)
    assert float(temporal_l2(ys, mask, jnp.asarray([[True, False, True, False]]))) == pytest.approx(4)
    assert float(activation_l2(ys, jnp.zeros((1, 4), bool))) == 0


def test_dropout_keeps_the_mean():
    x = dropout(jnp.ones(20_000), 0.3, jax.random.key(0))
    assert abs(float(x.mean()) - 1) < 0.03


def test_weight_drop_reaches_the_second_recurrent_matrix():
    """The candidate of a GRU with the reset before the product; with R = 0 only S is left to drop."""
    cell = cells.GRU(3, 5, reset_after=False, weight_drop=0.5, rngs=nnx.Rngs(0))
    cell.R[...] = jnp.zeros_like(cell.R[...])
    assert not np.allclose(cell(XS, key=jax.random.key(1))[0], cell(XS)[0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"input_dropout": 1.0}, r"input_dropout is 1.0: it must lie in \[0, 1\)"),
        ({"weight_drop": -0.1}, r"weight_drop is -0.1"),
        ({"zoneout": 1.5}, r"zoneout of c is 1.5"),
        ({"zoneout": {"n": 0.1}}, "zoneout field of LSTM 'n'"),
    ],
)
def test_a_bad_rate_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cells.LSTM(3, 4, rngs=nnx.Rngs(0), **options)
