"""Simple recurrent network (Elman 1990): h_t = tanh(W x_t + R h_{t-1} + b)."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..names import unknown
from .base import RecurrentCell

NONLINEARITIES = {"tanh": jnp.tanh, "relu": jax.nn.relu}


class ElmanState(NamedTuple):
    h: Float[Array, "B D"]


@dataclass(frozen=True)
class ElmanRule:
    nonlinearity: str = "tanh"

    def __call__(self, x, r, state, params):
        h = NONLINEARITIES[self.nonlinearity](x[0] + r[0])
        return ElmanState(h), h


class Elman(RecurrentCell):
    """Elman network; `nonlinearity` is "tanh" or "relu" (with `recurrent_init="identity"`: Le et al. 2015)."""

    State, gates, rule = ElmanState, ("h",), ElmanRule()

    def __init__(self, in_features: int | None, features: int, *, nonlinearity: str = "tanh", **options):
        if nonlinearity not in NONLINEARITIES:
            raise ValueError(unknown("nonlinearity", nonlinearity, NONLINEARITIES))
        self.rule = ElmanRule(nonlinearity)
        super().__init__(in_features, features, **options)
