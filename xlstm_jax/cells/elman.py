"""Elman network (Elman 1990, "Finding structure in time"): h_t = tanh(W x_t + R h_{t-1} + b)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from .base import RecurrentCell


class ElmanState(NamedTuple):
    h: Float[Array, "B D"]


def elman_rule(x, r, state, params):
    h = jnp.tanh(x[0] + r[0])
    return ElmanState(h), h


class Elman(RecurrentCell):
    """The simple recurrent network."""

    State, gates, rule = ElmanState, ("h",), staticmethod(elman_rule)
