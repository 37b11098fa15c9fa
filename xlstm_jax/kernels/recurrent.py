"""Any non-linear cell as a rule: one engine turns it into every form.

A rule is the elementwise heart of a cell in its paper's symbols,

    rule(x, r, state, params) -> (state, output)

with x the input's share and r the recurrent share of the pre-activations, each a tuple of one (B, D) array a gate, and
a NamedTuple state that has a field `h` (B, D), the vector that the recurrent matrix multiplies. The forms:

    "scan"   one `lax.scan` over time, differentiated by JAX: the obvious form, which tests compare the others with
    "fused"  a scan over chunks of time with its own gradient. The input projection runs inside the chunk; backward,
             the rule is linearised for all steps of a chunk at once, the reverse loop holds only that linear map and
             one recurrent product, and the gradients of R, W and b are one product each a chunk. `remat=True` keeps
             one state a chunk and computes the others again. Its gradient is exact; it has no forward-mode derivative.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

State = Any  # a NamedTuple of arrays (B, ...) with a field h
Gates = tuple[Array, ...]  # (B, D) each
Rule = Callable[[Gates, Gates, State, Any], tuple[State, Array]]


class Weights(NamedTuple):
    """R (N, D/N, G, D/N) by head; W (D_in, G, D), or None if the inputs are gates; b (G, D) or None; the rule's own."""

    R: Array
    W: Array | None
    b: Array | None
    params: Any


class Masks(NamedTuple):
    """Time-major (T, B) flags, or None where there are none, so that they cost nothing when absent."""

    mask: Array | None
    reset: Array | None


def recurrent(
    rule: Rule,
    xs: Float[Array, "B T ..."],
    R: Float[Array, "N E G E"],
    state: State,
    *,
    W: Float[Array, "D_in G D"] | None = None,
    b: Float[Array, "G D"] | None = None,
    params: Any = (),
    form: str = "scan",
    chunk_size: int = 64,
    remat: bool = False,
    mask: Bool[Array, "B T"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    reverse: bool = False,
) -> tuple[Float[Array, "B T D"], State]:
    """Runs `rule` over time: xs (B, T, D_in), or gate inputs (B, T, G, D) if W is None, to outputs and the last state.

    A step with mask False copies the state through and outputs zeros; one with reset True starts from an empty
    (zero) state. `reverse` runs from the last step to the first.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r} of a recurrent cell; there are {sorted(FORMS)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    masks = Masks(*(None if flags is None else flags.T for flags in (mask, reset)))
    weights = Weights(R, W, b, params)
    ys, state = FORMS[form](rule, chunk_size, remat, reverse, xs, weights, state, masks)
    return jnp.swapaxes(ys, 0, 1), state


def project(xs: Float[Array, "B T ..."], weights: Weights, dtype: DTypeLike) -> Float[Array, "T B G D"]:
    """The input's share of all gates of all steps, one product, time-major."""
    x = jnp.swapaxes(xs, 0, 1)  # before the product: the inputs are smaller than the gates
    if weights.W is None:
        x = x.astype(dtype)
    else:
        D_in, G, D = weights.W.shape
        x = jnp.matmul(x.reshape(-1, D_in), weights.W.reshape(D_in, G * D), preferred_element_type=dtype)
        x = x.reshape(xs.shape[1], xs.shape[0], G, D)
    return x if weights.b is None else x + weights.b[None, None].astype(dtype)


def recurrent_product(h: Float[Array, "*M D"], R: Float[Array, "N E G E"]) -> Float[Array, "*M G D"]:
    """h R, block-diagonal over the N heads: in R's dtype, summed in h's."""
    (N, E, G, F), lead = R.shape, h.shape[:-1]
    if N == 1:
        return jnp.matmul(h.astype(R.dtype), R.reshape(E, G * F), preferred_element_type=h.dtype).reshape(*lead, G, F)
    h_heads = h.astype(R.dtype).reshape(*lead, N, E)
    r = jnp.einsum("...ne,negf->...gnf", h_heads, R, preferred_element_type=h.dtype)
    return r.reshape(*lead, G, N * F)


def select(keep: Bool[Array, "*M"] | None, new: State, old: State) -> State:
    """new where `keep`, old elsewhere, for every leaf (*M, ...); `keep` None keeps all."""
    if keep is None:
        return new
    return jax.tree.map(lambda n, o: jnp.where(keep.reshape(keep.shape + (1,) * (n.ndim - keep.ndim)), n, o), new, old)


def emptied(reset: Bool[Array, "*M"] | None, state: State) -> State:
    """The state with the rows that `reset` names set to zero: nothing of them remains, in values and gradients."""
    return state if reset is None else select(~reset, state, jax.tree.map(jnp.zeros_like, state))


def masked_rule(rule: Rule, x: Gates, r: Gates, state: State, params: Any, mask: Array | None) -> tuple[State, Array]:
    """The rule on one step: a False mask copies the state through and outputs zeros."""
    new, y = rule(x, r, state, params)
    return select(mask, new, state), select(mask, y, jnp.zeros_like(y))


def _step(rule: Rule, weights: Weights, state: State, x: Array, mask: Array | None) -> tuple[Array, State, Array]:
    """The recurrent share of the gates, the next state and the output."""
    r = recurrent_product(state.h, weights.R)
    return r, *masked_rule(rule, jnp.unstack(x, axis=1), jnp.unstack(r, axis=1), state, weights.params, mask)


def _scan(rule, chunk_size, remat, reverse, xs, weights, state, masks):
    def body(state, inputs):
        x, flags = inputs
        return _step(rule, weights, emptied(flags.reset, state), x, flags.mask)[1:]

    if remat:
        body = jax.checkpoint(body)
    x = project(xs, weights, state.h.dtype)
    state, ys = jax.lax.scan(body, state, (x, masks), reverse=reverse)
    return ys, state


def _fused(rule, chunk_size, remat, reverse, xs, weights, state, masks):
    """Whole chunks first and the shorter tail after them (before them in reverse)."""
    T = xs.shape[1]
    L = min(chunk_size, T)
    bounds = [(0, T - T % L), (T - T % L, T)] if T % L else [(0, T)]
    pieces = []
    for start, stop in reversed(bounds) if reverse else bounds:
        flags = Masks(*(None if f is None else f[start:stop] for f in masks))
        length = min(L, stop - start)
        ys, state = _chunks(rule, length, remat, reverse, xs[:, start:stop], weights, state, flags)
        pieces.append(ys)
    return jnp.concatenate(pieces[::-1] if reverse else pieces) if len(pieces) > 1 else pieces[0], state


FORMS = {"scan": _scan, "fused": _fused}


# The fused form: T is a multiple of the chunk length L from here on.


def _chunk_inputs(n, L, xs, masks):
    """Chunk n: its slice of the batch-major inputs and of the time-major flags."""
    x = jax.lax.dynamic_slice_in_dim(xs, n * L, L, axis=1)
    return x, jax.tree.map(lambda flags: jax.lax.dynamic_slice_in_dim(flags, n * L, L), masks)


class Kept(NamedTuple):
    """What the backward pass of a chunk reads: the state before each step and both shares of the gates."""

    state: State
    x: Array
    r: Array


def _run_chunk(rule, reverse, x, weights, state, masks, keep):
    """One chunk forward from its projected inputs x (L, B, G, D), and what its backward pass needs, if asked for."""

    def body(state, inputs):
        x, flags = inputs
        before = emptied(flags.reset, state)
        r, state, y = _step(rule, weights, before, x, flags.mask)
        return state, (y, (before, r) if keep else None)

    state, (ys, kept) = jax.lax.scan(body, state, (x, masks), reverse=reverse)
    return state, ys, Kept(kept[0], x, kept[1]) if keep else None


def _forward(rule, L, remat, reverse, xs, weights, state, masks, keep):
    def body(state, n):
        x, flags = _chunk_inputs(n, L, xs, masks)
        x = project(x, weights, state.h.dtype)
        new, ys, kept = _run_chunk(rule, reverse, x, weights, state, flags, keep and not remat)
        return new, (ys, state if keep and remat else kept)

    state, (ys, kept) = jax.lax.scan(body, state, jnp.arange(xs.shape[1] // L), reverse=reverse)
    return ys.reshape(-1, *ys.shape[2:]), state, kept


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _chunks(rule, L, remat, reverse, xs, weights, state, masks):
    ys, state, _ = _forward(rule, L, remat, reverse, xs, weights, state, masks, keep=False)
    return ys, state


def _chunks_forward(rule, L, remat, reverse, xs, weights, state, masks):
    ys, state, kept = _forward(rule, L, remat, reverse, xs, weights, state, masks, keep=True)
    return (ys, state), (xs, weights, masks, kept)


def _chunks_backward(rule, L, remat, reverse, residuals, cotangents):
    xs, weights, masks, kept = residuals
    d_ys, d_state = cotangents
    d_ys = d_ys.reshape(-1, L, *d_ys.shape[1:])

    def body(carry, inputs):
        d_state, d_weights = carry
        n, d_y, kept = inputs
        x_in, flags = _chunk_inputs(n, L, xs, masks)
        x, pull_projection = jax.vjp(lambda x, w: project(x, w, d_state.h.dtype), x_in, weights)
        if remat:
            _, _, kept = _run_chunk(rule, reverse, x, weights, kept, flags, keep=True)
        _, pull_product = jax.vjp(recurrent_product, kept.state.h, weights.R)  # all steps of the chunk at once

        def linearise(x, r, state, mask):
            gates = jnp.unstack(x, axis=1), jnp.unstack(r, axis=1)
            return jax.vjp(lambda *args: masked_rule(rule, *args, mask), *gates, state, weights.params)[1]

        pulls = jax.lax.optimization_barrier(jax.vmap(linearise)(kept.x, kept.r, kept.state, flags.mask))

        def reverse_step(carry, inputs):
            d_state, d_params = carry
            pull, d_y, reset = inputs
            dx, dr, d_state, dp = pull((d_state, d_y))
            same = all(a is b for a, b in zip(dx, dr))  # one array serves a rule that only adds the two
            dx = jnp.stack(dx, axis=1)
            dr = dx if same else jnp.stack(dr, axis=1)
            d_h = jax.linear_transpose(lambda h: recurrent_product(h, weights.R), d_state.h)(dr)[0]
            d_state = emptied(reset, d_state._replace(h=d_state.h + d_h))
            gates = (dx,) if same else (dx, dr)
            return (d_state, jax.tree.map(jnp.add, d_params, dp)), gates

        (d_state, d_params), gates = jax.lax.scan(
            reverse_step, (d_state, d_weights.params), (pulls, d_y, flags.reset), reverse=not reverse
        )
        dx, dr = gates[0], gates[-1]
        d_R = pull_product(dr)[1]
        d_x_in, d_projection = pull_projection(dx)
        d_projection = d_projection._replace(R=d_R, params=jax.tree.map(jnp.zeros_like, d_params))
        d_weights = jax.tree.map(jnp.add, d_weights._replace(params=d_params), d_projection)
        return (d_state, d_weights), d_x_in

    zeros = jax.tree.map(jnp.zeros_like, weights)
    steps = jnp.arange(d_ys.shape[0])
    (d_state, d_weights), d_xs = jax.lax.scan(body, (d_state, zeros), (steps, d_ys, kept), reverse=not reverse)
    return jnp.moveaxis(d_xs, 0, 1).reshape(xs.shape), d_weights, d_state, Masks(None, None)


_chunks.defvjp(_chunks_forward, _chunks_backward)
