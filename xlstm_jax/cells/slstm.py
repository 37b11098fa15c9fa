"""sLSTM: scalar memory, exponential input gate, memory mixing by head (Beck et al. 2024, arXiv:2405.04517, eqs. 8-18).

i~, f~, z~, o~ = W x_t + R h_{t-1} + b
m_t = max(log sigmoid(f~) + m_{t-1}, i~)      (i~ where n_{t-1} = 0: nothing is stored yet)
i = exp(i~ - m_t);   f = exp(log sigmoid(f~) + m_{t-1} - m_t)
c_t = f c_{t-1} + i tanh(z~);   n_t = f n_{t-1} + i;   h_t = sigmoid(o~) c_t / n_t
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..initializers import Initializer
from .base import RecurrentCell


class SLSTMState(NamedTuple):
    """c and n in units of exp(m)."""

    c: Float[Array, "B D"]
    n: Float[Array, "B D"]
    m: Float[Array, "B D"]
    h: Float[Array, "B D"]


def slstm_rule(x, r, state, params):
    i, f, z, o = (a + b for a, b in zip(x, r))
    log_f = jax.nn.log_sigmoid(f) + state.m
    m = jnp.where(state.n == 0, i, jnp.maximum(log_f, i))
    i, f = jnp.exp(jnp.minimum(i - m, 0)), jnp.exp(jnp.minimum(log_f - m, 0))
    c = f * state.c + i * jnp.tanh(z)
    n = f * state.n + i
    h = jax.nn.sigmoid(o) * c / n
    return SLSTMState(c, n, m, h), h


class SLSTM(RecurrentCell):
    """sLSTM with `num_heads` blocks in R. R starts at zero and the forget bias by the power law, as published.

    flashrnn keeps n >= 1, which is so by itself from an empty state; from a given one with n < 1 it differs from here.
    """

    State, gates, rule = SLSTMState, ("i", "f", "z", "o"), staticmethod(slstm_rule)
    forget_gate, input_gate, default_forget_bias = "f", "i", "powerlaw"

    def __init__(
        self,
        in_features: int | None,
        features: int,
        *,
        num_heads: int = 4,
        recurrent_init: Initializer | str = "zeros",
        **options,
    ):
        super().__init__(in_features, features, num_heads=num_heads, recurrent_init=recurrent_init, **options)
