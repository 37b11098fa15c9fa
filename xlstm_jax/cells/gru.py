"""Gated recurrent units.

    r, z = sigmoid(W x_t + R h_{t-1} + b)
    n = tanh(W_n x_t + b_n + r (R_n h_{t-1} + b_hn))   reset after the product (cuDNN, torch)
    n = tanh(W_n x_t + b_n + S (r h_{t-1}))            reset before it (Cho et al. 2014, arXiv:1406.1078, eqs. 5-8)
    h_t = (1 - z) n + z h_{t-1}

MGU, the minimal gated unit (Zhou et al. 2016, arXiv:1603.09420, eqs. 6-8), has one gate for both:

    f = sigmoid(W x_t + R h_{t-1} + b);   n = tanh(W_n x_t + b_n + S (f h_{t-1}));   h_t = (1 - f) h_{t-1} + f n
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.nn import sigmoid
from jaxtyping import Array, Float

from .base import RecurrentCell


class GRUState(NamedTuple):
    h: Float[Array, "B D"]


def gru_rule(x, r, state, params):
    """Reset after the product."""
    x_r, x_z, x_n = x
    r_r, r_z, r_n = r
    if params:
        r_n = r_n + params[0]
    reset, z = sigmoid(x_r + r_r), sigmoid(x_z + r_z)
    n = jnp.tanh(x_n + reset * r_n)
    h = (1 - z) * n + z * state.h
    return GRUState(h), h


@dataclass(frozen=True)
class ResetBeforeRule:
    """Reset before the product S."""

    def inner(self, x, r, state, params):
        return sigmoid(x[0] + r[0]) * state.h

    def __call__(self, x, r, state, params):
        z, n = sigmoid(x[1] + r[1]), jnp.tanh(x[2] + r[2])
        h = (1 - z) * n + z * state.h
        return GRUState(h), h


class GRU(RecurrentCell):
    """GRU; `reset_after` says where the reset gate acts. After: `b_hn` (D,) is the bias that it scales.

    `forget_bias` is that of the update gate z, which keeps the state.
    """

    State, gates, forget_gate = GRUState, ("r", "z", "n"), "z"

    def __init__(self, in_features: int | None, features: int, *, reset_after: bool = True, **options):
        self.rule = gru_rule if reset_after else ResetBeforeRule()
        if not reset_after:
            self.recurrent_gates, self.inner_shape = ("r", "z"), (features, 1, features)
        super().__init__(in_features, features, **options)
        self.b_hn = nnx.Param(jnp.zeros(features, self.param_dtype)) if reset_after and self.b is not None else None

    def rule_params(self) -> Any:
        return () if self.b_hn is None else (self.as_gate(self.b_hn[...]),)


class MGURule(ResetBeforeRule):
    """Its one gate acts before S as a reset does."""

    def __call__(self, x, r, state, params):
        f, n = sigmoid(x[0] + r[0]), jnp.tanh(x[1] + r[1])
        h = (1 - f) * state.h + f * n
        return GRUState(h), h


class MGU(RecurrentCell):
    """Minimal gated unit; f lets in the new, so `forget_bias` is that of 1 - f."""

    State, gates, recurrent_gates, rule = GRUState, ("f", "n"), ("f",), MGURule()
    forget_gate, forget_sign = "f", -1

    def __init__(self, in_features: int | None, features: int, **options):
        self.inner_shape = (features, 1, features)
        super().__init__(in_features, features, **options)
