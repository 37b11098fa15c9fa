"""JANET: the LSTM with a forget gate alone (van der Westhuizen and Lasenby 2018, arXiv:1804.04849, eqs. 6-8).

    f, z = W x_t + R h_{t-1} + b
    h_t = sigmoid(f) h_{t-1} + (1 - sigmoid(f - beta)) tanh(z)

beta = 1 lets more in than a coupled gate would; the authors start the forget bias by chrono(T).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax.nn import sigmoid
from jaxtyping import Array, Float

from .base import RecurrentCell


class JANETState(NamedTuple):
    h: Float[Array, "B D"]


@dataclass(frozen=True)
class JANETRule:
    beta: float = 1.0

    def __call__(self, x, r, state, params):
        f, z = (a + b for a, b in zip(x, r))
        h = sigmoid(f) * state.h + (1 - sigmoid(f - self.beta)) * jnp.tanh(z)
        return JANETState(h), h


class JANET(RecurrentCell):
    """JANET; `forget_bias` is a number, 1 if not given, or "chrono(T)"."""

    State, gates, forget_gate, default_forget_bias = JANETState, ("f", "z"), "f", 1.0

    def __init__(self, in_features: int | None, features: int, *, beta: float = 1.0, **options):
        self.rule = JANETRule(beta)
        super().__init__(in_features, features, **options)
