"""The engine itself, with rules that no cell has: what a rule sees besides the sum of both shares of its gates."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from contract import close
from flax import nnx

from xlstm_jax import cells
from xlstm_jax.kernels import fused
from xlstm_jax.kernels import recurrent as engine


class State(NamedTuple):
    h: jax.Array


@jax.custom_vjp
def lies(x, r):
    """Not of x + r, but with one gradient for both."""
    return jax.nn.relu(x) + r / 2


lies.defvjp(lambda x, r: (lies(x, r), None), lambda _, g: (g, g))

GATES = {  # of one gate: what follows for h
    "sum": lambda x, r: jnp.tanh(x + r),
    "input apart": lambda x, r: jnp.tanh((x + r) * jax.lax.stop_gradient(jax.nn.sigmoid(x))),
    "selected": lambda x, r: jnp.tanh(jnp.where(x > 0, x + r, 0)),
    "recurrent apart": lambda x, r: jnp.tanh((x + r) / (1 + jax.lax.stop_gradient(jnp.abs(r)))),
    "own gradient": lies,
    "twice": lambda x, r: jnp.tanh(x + r) + (r + x) ** 2,
}


def gradients(rule, form, num_gates, num_recurrent):
    keys = jax.random.split(jax.random.key(0), 3)
    xs, dy = jax.random.normal(keys[0], (2, 7, num_gates, 3)), jax.random.normal(keys[1], (2, 7, 3))
    R = jax.random.normal(keys[2], (1, 3, num_recurrent, 3))

    def loss(xs, R):
        ys, _ = engine.recurrent(rule, xs, R, State(jnp.zeros((2, 3))), form=form, chunk_size=4)
        return jnp.sum(ys * dy)

    return jax.value_and_grad(loss, argnums=(0, 1))(xs, R)


@pytest.mark.parametrize("name", GATES)
def test_fused_equals_scan_whatever_the_rule_sees(x64, name):
    def rule(x, r, state, params):
        h = GATES[name](x[0], r[0])
        return State(h), h

    close(gradients(rule, "fused", 1, 1), gradients(rule, "scan", 1, 1))


@pytest.mark.parametrize("gates", [(1, 2), (2, 1)])
def test_one_of_the_shares_may_have_more_gates(x64, gates):
    def rule(x, r, state, params):
        h = jnp.tanh(x[0] + r[0]) * jax.nn.sigmoid((*x[1:], *r[1:])[0])
        return State(h), h

    close(gradients(rule, "fused", *gates), gradients(rule, "scan", *gates))


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("lstm", {}, (True,) * 4),
        ("gru", {}, (True, True, False)),
        ("gru", {"reset_after": False}, (True, True)),
        ("layer_norm_lstm", {}, (False,) * 4),
    ],
)
def test_a_sum_is_kept_as_one_array(monkeypatch, name, options, wanted):
    found = []
    only_added = fused.only_added
    monkeypatch.setattr(fused, "only_added", lambda *args: found.append(only_added(*args)) or found[-1])
    cell = cells.CELLS[name](2, 3, rngs=nnx.Rngs(0), **options)
    jax.eval_shape(jax.grad(lambda xs: cell(xs)[0].sum()), jnp.zeros((1, 2, 2)))
    assert set(found) == {wanted}
