"""The fused form of a rule: a scan over chunks of time with its own gradient.

The input projection runs inside the chunk (with the rows last inside the loop: `feature_major.py`); backward, the rule
is linearised for all steps of a chunk at once, the reverse loop holds only that linear map and the recurrent products,
and the gradients of R, S, W and b are one product each a chunk. `remat=True` keeps one state a chunk and computes the
others again. The gradient is exact; it has no forward-mode derivative.
"""

from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from . import feature_major
from .memory import Bytes, size
from .rules import Gates, State, Weights, emptied, inner, masked_rule, project, scaled, step


def fused(spec, chunk_size, xs, weights, state, given, scale):
    """Outputs (B, T, D) and the last state: whole chunks first, then the shorter tail (before them in reverse)."""
    if feature_major.serves(spec, weights, state):
        spec, state, given, scale = feature_major.turned(spec, state, given, scale)
    T = xs.shape[1]
    L = -(-T // -(-T // chunk_size))  # as few chunks, and as equal ones as can be
    bounds = [(0, T - T % L), (T - T % L, T)] if T % L else [(0, T)]
    pieces = []
    for start, stop in reversed(bounds) if spec.reverse else bounds:
        part = jax.tree.map(lambda a, cut=slice(start, stop): a[cut], given)
        ys, state = _chunks(spec, min(L, stop - start), xs[:, start:stop], weights, state, part, scale)
        pieces.append(ys)
    ys = jnp.concatenate(pieces[::-1] if spec.reverse else pieces, axis=1) if len(pieces) > 1 else pieces[0]
    return ys, jax.tree.map(lambda a: jnp.moveaxis(a, spec.maps.rows, 0), state)


def fused_bytes(spec, xs, weights, state, given, scale) -> dict[bool, Bytes]:
    """What the fused form sets aside, by remat: the traced shapes of one step, counted as often as they are held."""

    def one_step(xs, weights, state, given, scale):
        x, turned = project(spec, xs[:, :1], weights, state.h.dtype), spec
        if feature_major.serves(spec, weights, state):
            turned, state, given, scale = feature_major.turned(spec, state, given, scale)
        state, ys, kept = _run_chunk(turned, xs[:, :1], weights, state, jax.tree.map(first, given), scale, keep=True)
        one = jax.tree.map(lambda a: a[0], kept)
        given = jax.tree.map(lambda a: a[0], given)
        return x, ys, kept, linearised(turned, weights, one, given, scale)

    def first(a):
        return a[:1]

    x, ys, kept, linear = jax.eval_shape(one_step, xs, weights, state, given, scale)
    x, ys, kept, linear, step_in = (size(a) for a in (x, ys, kept, linear, xs[:, 0]))
    outside = max(ys, step_in)  # the outputs, then the gradients of the inputs
    work = linear + 3 * x  # the transposed rule; the gates, and their gradients as one array and as one a gate
    for kernel, read in ((weights.W, step_in), (weights.R, size(state.h)), (weights.S, size(state.h))):
        work += 0 if kernel is None else spec.maps.copies(kernel) * read
    return {False: Bytes(outside + kept, 0, work), True: Bytes(outside, size(state), work)}


# T is a multiple of the chunk length L from here on.


def _chunk_inputs(n, L, xs, given):
    """Chunk n: its slice of the batch-major inputs and of what is given time-major."""
    x = jax.lax.dynamic_slice_in_dim(xs, n * L, L, axis=1)
    return x, jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, n * L, L), given)


class Kept(NamedTuple):
    """What the backward pass of a chunk reads: the state before each step and all shares of the gates; a gate that the
    rule only adds to its recurrent share is kept as their sum, in x, with None in r. If all are such sums, and maps
    leave the inputs to the loop, x is one array of all gates."""

    state: State
    x: Gates | Array
    r: tuple[Array | None, ...]
    u: Gates


def _run_chunk(spec, xs, weights, state, given, scale, keep):
    """One chunk forward from its inputs xs (B, L, ...), and what its backward pass needs, if asked for."""
    x, gates = spec.maps.inputs(spec, xs, weights, state.h.dtype)
    products = spec.push(weights.R), None if weights.S is None else spec.push(weights.S)

    def sums(x, before, given):
        """x + R h of all gates in one array, if that is all that the rule needs; else None."""
        r = products[0](scaled(before.h, scale))
        shares = spec.maps.unstack(x), spec.maps.unstack(r)
        needs_no_more = all(only_added(spec, *shares, (), before, weights, given, scale))
        return x + r if r.shape == x.shape and needs_no_more else None

    def body(state, inputs):
        x, given = inputs
        x, before = gates(x), emptied(given.reset, state)
        total = sums(x, before, given) if spec.maps.inputs_in_loop and weights.S is None else None
        if total is not None:
            x, r = spec.maps.unstack(total), (jnp.zeros_like(total[0]),) * len(total)
            state, y = masked_rule(spec, x, r, before, weights.params, given)
            return state, (y, Kept(before, total, (None,) * len(r), ()) if keep else None)
        x = spec.maps.unstack(x) if spec.maps.inputs_in_loop else x
        (r, u), state, y = step(spec, products, weights, before, x, given, scale)
        if not keep:
            return state, (y, None)
        added = only_added(spec, x, r, u, before, weights, given, scale)
        x = tuple(a + b if add else a for a, b, add in zip_longest(x, r[: len(x)], added[: len(x)]))
        return state, (y, Kept(before, x, tuple(None if add else b for b, add in zip(r, added)), u))

    state, (ys, kept) = jax.lax.scan(body, state, (x, given), reverse=spec.reverse)
    return state, ys, kept


def only_added(spec, x, r, u, state, weights, given, scale) -> tuple[bool, ...]:
    """For each recurrent share whether the rule, traced, has no other use of it and the input's than their sum."""

    def rule(x, r):
        return masked_rule(spec, x, (*r, *u), state, weights.params, given)

    def before_S(x, r):
        return inner(spec, x, r, state, weights.params, scale)

    traces = [jax.make_jaxpr(f)(x, r).jaxpr for f in (rule, *(() if weights.S is None else (before_S,)))]
    return tuple(
        n < len(x) and all(only_summed(trace, trace.invars[n], trace.invars[len(x) + n]) for trace in traces)
        for n in range(len(r))
    )


def only_summed(trace, a, b) -> bool:
    """Whether each use of a or b is a + b."""
    uses = [equation for equation in trace.eqns if any(v is a or v is b for v in equation.invars)]
    return not any(v is a or v is b for v in trace.outvars) and all(
        equation.primitive.name == "add" and {id(v) for v in equation.invars} == {id(a), id(b)} for equation in uses
    )


def linearised(spec, weights, kept, given, scale):
    """One step's transposed rule, of x, the shares in r that are kept, u, the state and the parameters; where there is
    an S, the inner value's transposed map and the value too."""

    if not isinstance(kept.x, tuple):
        kept = kept._replace(x=spec.maps.unstack(kept.x))

    def shares(r):
        r = iter(r)
        return tuple(jnp.zeros_like(kept.x[n]) if own is None else next(r) for n, own in enumerate(kept.r))

    def rule(x, r, u, state, params):
        return masked_rule(spec, x, (*shares(r), *u), state, params, given)

    r = tuple(own for own in kept.r if own is not None)
    pull = jax.vjp(rule, kept.x, r, kept.u, kept.state, weights.params)[1]
    if weights.S is None:
        return pull, None, None
    v, pull_inner = jax.vjp(
        lambda x, r, state, params: inner(spec, x, shares(r), state, params, scale),
        kept.x,
        r,
        kept.state,
        weights.params,
    )
    return pull, pull_inner, v


def stacked(maps, *shares):
    """Each share as one array of all its gates; None stays None."""
    return tuple(None if gates is None else maps.stack(gates) for gates in shares)


def _forward(spec, L, xs, weights, state, given, scale, keep):
    def body(state, n):
        x, part = _chunk_inputs(n, L, xs, given)
        new, ys, kept = _run_chunk(spec, x, weights, state, part, scale, keep and not spec.remat)
        return new, (ys, state if keep and spec.remat else kept)

    T = xs.shape[1]
    if spec.maps.inputs_in_loop and not spec.remat:
        L = T  # nothing is projected chunk by chunk or computed again: one loop
    state, (ys, kept) = jax.lax.scan(body, state, jnp.arange(T // L), reverse=spec.reverse)
    return spec.maps.by_row(ys.reshape(T, *ys.shape[2:])), state, kept


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunks(spec, L, xs, weights, state, given, scale):
    ys, state, _ = _forward(spec, L, xs, weights, state, given, scale, keep=False)
    return ys, state


def _chunks_forward(spec, L, xs, weights, state, given, scale):
    ys, state, kept = _forward(spec, L, xs, weights, state, given, scale, keep=True)
    if not spec.remat:
        kept = jax.tree.map(lambda a: a.reshape(-1, L, *a.shape[2:]), kept)
    return (ys, state), (xs, weights, given, scale, kept)


def _chunks_backward(spec, L, residuals, cotangents):
    xs, weights, given, scale, kept = residuals
    d_ys, d_state = cotangents
    maps = spec.maps

    def product(h, R):
        return spec.product(scaled(h, scale), R)

    def body(carry, inputs):
        d_state, d_weights = carry
        n, kept = inputs
        x_in, part = _chunk_inputs(n, L, xs, given)
        d_y = maps.by_step(jax.lax.dynamic_slice_in_dim(d_ys, n * L, L, axis=1))
        if spec.remat:
            kept = _run_chunk(spec, x_in, weights, kept, part, scale, keep=True)[2]
        linear = jax.vmap(lambda kept, given: linearised(spec, weights, kept, given, scale))  # all steps at once
        pull, pull_inner, v = jax.lax.optimization_barrier(linear(kept, part))
        as_one = not isinstance(kept.x, tuple)
        added_all = as_one or len(kept.r) == len(kept.x) and all(share is None for share in kept.r)
        pull_R, pull_W = spec.pull(weights.R, d_state.h), maps.pull_step(spec, weights)
        pull_S = None if v is None else spec.pull(weights.S, v[0])

        def reverse_step(carry, inputs):
            d_state, d_params = carry
            pull, pull_inner, d_y, reset = inputs
            dx, dr, du, d_state, dp = pull((d_state, d_y))
            if weights.S is not None:
                dx, dr, d_state, dp = jax.tree.map(jnp.add, (dx, dr, d_state, dp), pull_inner(pull_S(du)))
            own = iter(dr)
            dr = tuple(dx[n] if share is None else next(own) for n, share in enumerate(kept.r))
            d_h = scaled(pull_R(dr), scale)
            d_state = emptied(reset, d_state._replace(h=d_state.h + d_h))
            shares = dx, None if added_all else dr, du or None
            shares = stacked(maps, *shares) if maps.inputs_in_loop else shares
            return (d_state, jax.tree.map(jnp.add, d_params, dp)), (shares, pull_W(dx))

        (d_state, d_params), (shares, d_x_in) = jax.lax.scan(
            reverse_step, (d_state, d_weights.params), (pull, pull_inner, d_y, part.reset), reverse=not spec.reverse
        )
        dx, dr, du = shares if maps.inputs_in_loop else stacked(maps, *shares)
        d_R = jax.vjp(lambda R: product(kept.state.h, R), weights.R)[1](dx if added_all else dr)[0]
        d_S = None if v is None else jax.vjp(lambda S: spec.product(v, S), weights.S)[1](du)[0]
        d_x_in, d_W, d_b = maps.pull_inputs(spec, x_in, weights, dx, d_x_in)
        new = Weights(d_R, d_S, d_W, d_b, jax.tree.map(jnp.zeros_like, d_params))
        d_weights = jax.tree.map(jnp.add, d_weights._replace(params=d_params), new)
        return (d_state, d_weights), d_x_in

    wide = jax.tree.map(lambda w: jnp.promote_types(w.dtype, jnp.float32), weights)
    zeros = jax.tree.map(lambda w, dtype: jnp.zeros_like(w, dtype), weights, wide)  # sums over chunks
    steps = jnp.arange(xs.shape[1] // L)
    (d_state, d_weights), d_xs = jax.lax.scan(body, (d_state, zeros), (steps, kept), reverse=not spec.reverse)
    d_weights = jax.tree.map(lambda d, w: d.astype(w.dtype), d_weights, weights)
    return jnp.moveaxis(d_xs, 0, 1).reshape(xs.shape), d_weights, d_state, None, None


_chunks.defvjp(_chunks_forward, _chunks_backward)
