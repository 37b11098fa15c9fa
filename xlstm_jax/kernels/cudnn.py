"""The plain LSTM in float32 by cuDNN (`jax.experimental.rnn`): the form "cudnn" of `recurrent`, on NVIDIA GPUs only.

A rule that is a plain LSTM says so by `cudnn_gates`, the places of its gates i, f, z, o. Rows of any mask are brought
into cuDNN's order, valid steps first, and back.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import rnn
from jaxtyping import Array, Float

from .rules import Dense, Given, Spec, Weights


def refusal(spec: Spec, weights: Weights, state: Any, given: Given, scale: Array | None) -> str | None:
    """What cuDNN cannot do of this, in a line."""
    name = getattr(spec.rule, "__name__", type(spec.rule).__name__)
    if getattr(spec.rule, "cudnn_gates", None) is None or weights.S is not None or jax.tree.leaves(weights.params):
        return f"cuDNN has the plain LSTM (gates i, f, z, o and nothing else), and this {name} is another rule"
    if not isinstance(spec.maps, Dense) or weights.W is None or weights.R.shape[0] > 1:
        return "cuDNN's LSTM has one dense matrix of the inputs and one of h: no heads, convolutions or gates as inputs"
    if spec.dtype != jnp.float32 or state.h.dtype != jnp.float32:
        return f"JAX has cuDNN's LSTM in float32, not with products in {spec.dtype} and a state in {state.h.dtype}"
    if given.reset is not None or given.noise or scale is not None or spec.reverse:
        return "cuDNN's LSTM has no resets, zoneout, dropout of the state or reverse order"
    return None


def packed(weights: Weights, order: tuple[int, ...]) -> Float[Array, " P"]:
    """W (D_in, G, D), R (1, D, G, D) and b (G, D) as cuDNN's one vector: W, R, b of gates i, f, z, o, a second b of 0.

    Each matrix is a row an output, gate after gate.
    """
    order = jnp.array(order)
    matrices = (jnp.moveaxis(M, 0, -1)[order].ravel() for M in (weights.W, weights.R[0]))
    zeros = jnp.zeros(weights.W.shape[1:], weights.W.dtype)
    return jnp.concatenate([*matrices, *(zeros if b is None else b[order] for b in (weights.b, None))], axis=None)


def run(spec: Spec, xs: Array, weights: Weights, state: Any, given: Given) -> tuple[Array, Any]:
    """Outputs (B, T, D) and the last state, as the other forms."""
    (B, T, D_in), D = xs.shape, state.h.shape[-1]
    lengths = jnp.full((B,), T, jnp.int32)
    if given.mask is not None:
        mask = given.mask.T
        order = jnp.argsort(~mask, axis=1, stable=True)  # the valid steps, then the others
        xs = jnp.take_along_axis(jnp.where(mask[..., None], xs, 0), order[..., None], axis=1)
        lengths = jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.int32), 1)  # one step at least is run

    def lstm(xs, h, c, w):
        return rnn.lstm(xs, h[None], c[None], w, lengths, D_in, D, 1, 0.0, False)

    vector = packed(weights, spec.rule.cudnn_gates).astype(spec.dtype)
    call = jax.checkpoint(lstm) if spec.remat else lstm
    ys, h, c = call(xs.astype(spec.dtype), state.h, state.c, vector)
    last = state._replace(h=h[0], c=c[0])
    if given.mask is not None:
        ys = jnp.take_along_axis(ys, jnp.argsort(order, axis=1)[..., None], axis=1)
        ys = jnp.where(mask[..., None], ys, 0)
        some = jnp.any(mask, axis=1)[:, None]
        last = jax.tree.map(lambda new, old: jnp.where(some, new, old), last, state)
    return ys, last
