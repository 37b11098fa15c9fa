"""LSTM (Hochreiter and Schmidhuber 1997; forget gate: Gers, Schmidhuber and Cummins 2000).

i, f, o = sigmoid(W x_t + R h_{t-1} + b);   z = tanh(...)
c_t = f c_{t-1} + i z;                      h_t = o tanh(c_t)
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.nn import sigmoid
from jaxtyping import Array, Float

from .base import RecurrentCell


class LSTMState(NamedTuple):
    c: Float[Array, "B D"]
    h: Float[Array, "B D"]


def lstm_rule(x, r, state, params):
    i, f, z, o = (a + b for a, b in zip(x, r))
    c = sigmoid(f) * state.c + sigmoid(i) * jnp.tanh(z)
    h = sigmoid(o) * jnp.tanh(c)
    return LSTMState(c, h), h


class LSTM(RecurrentCell):
    """LSTM; `forget_bias` is the forget gate's initial bias (1: Jozefowicz et al. 2015)."""

    State, gates, rule = LSTMState, ("i", "f", "z", "o"), staticmethod(lstm_rule)

    def __init__(self, in_features: int, features: int, *, forget_bias: float = 1.0, **options):
        super().__init__(in_features, features, **options)
        if self.b is not None:
            self.b[...] = self.b[...].at[1].set(forget_bias)
