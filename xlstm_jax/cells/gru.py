"""GRU (Cho et al. 2014) with the reset gate after the recurrent product, as in cuDNN and torch.

r, z = sigmoid(W x_t + R h_{t-1} + b);   n = tanh(W_n x_t + b_n + r (R_n h_{t-1} + b_hn))
h_t = (1 - z) n + z h_{t-1}
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.nn import sigmoid
from jaxtyping import Array, Float

from .base import RecurrentCell


class GRUState(NamedTuple):
    h: Float[Array, "B D"]


def gru_rule(x, r, state, params):
    x_r, x_z, x_n = x
    r_r, r_z, r_n = r
    if params:
        r_n = r_n + params[0][None]
    reset, z = sigmoid(x_r + r_r), sigmoid(x_z + r_z)
    n = jnp.tanh(x_n + reset * r_n)
    h = (1 - z) * n + z * state.h
    return GRUState(h), h


class GRU(RecurrentCell):
    """GRU, reset after the product; `b_hn` (D,) is the bias that the reset gate scales."""

    State, gates, rule = GRUState, ("r", "z", "n"), staticmethod(gru_rule)

    def __init__(self, in_features: int, features: int, **options):
        super().__init__(in_features, features, **options)
        self.b_hn = nnx.Param(jnp.zeros(features, self.param_dtype)) if self.b is not None else None

    def rule_params(self):
        if self.b_hn is None:
            return ()
        return (self.b_hn[...].astype(jnp.promote_types(self.param_dtype, jnp.float32)),)
