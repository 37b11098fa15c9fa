"""Gradients as they are traced: what is absent leaves no operation, and a longer sequence has no more of them."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.jaxprs import equations
from xlstm_jax import cells
from xlstm_jax.kernels import mlstm_chunkwise

H, L = 3, 32  # heads, steps of a chunk
CASES = {  # rows, the cell
    "lstm": (5, partial(cells.LSTM, 3, 8)),
    "lstm, rows last": (37, partial(cells.LSTM, 3, 8)),
    "gru, remat": (5, partial(cells.GRU, 3, 8, remat=True)),
    "mlstm": (5, partial(cells.MLSTM, 3, 12, num_heads=H)),
    "mlstm, in groups": (1024, partial(cells.MLSTM, 3, 12, num_heads=H)),
}


def gradient(name, T, mask=False, reset=False):
    """Equations of the gradient of a cell's outputs of T steps, of its parameters and inputs."""
    B, make = CASES[name]
    graphdef, params = nnx.split(nnx.eval_shape(lambda: make(chunk_size=L, rngs=nnx.Rngs(0))))
    flags = (jax.ShapeDtypeStruct((B, T), jnp.bool_) if given else None for given in (mask, reset))

    def loss(params, xs, mask, reset):
        return jnp.sum(nnx.merge(graphdef, params)(xs, None, mask, reset)[0])

    arguments = params, jax.ShapeDtypeStruct((B, T, 3), jnp.float32), *flags
    return list(equations(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*arguments).jaxpr))


@pytest.mark.parametrize("name", CASES)
def test_absent_masks_and_resets_cost_nothing(name):
    """No truth value of a row is in the program, but those the mLSTM asks of each head, nor a sequence's number."""
    B, _ = CASES[name]

    def flags(**given):
        found = [v.aval for equation in gradient(name, 4 * L, **given) for v in equation.outvars]
        numbers = [a for a in found if jnp.issubdtype(a.dtype, jnp.integer) and a.shape[:1] == (B * H,)]
        return numbers + [a for a in found if a.dtype == jnp.bool_ and B in a.shape and H not in a.shape]

    assert not flags() and flags(mask=True) and flags(reset=True)


@pytest.mark.parametrize("name", CASES)
def test_a_program_does_not_grow_with_the_sequence(name):
    assert len(gradient(name, 1024)) == len(gradient(name, 8192))
    groups, *_ = mlstm_chunkwise.division(CASES[name][0] * H, 16, 1024, L)
    assert (groups > 1) == (name == "mlstm, in groups")
