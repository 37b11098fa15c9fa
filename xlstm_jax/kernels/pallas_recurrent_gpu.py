"""The recurrence of any rule as one GPU kernel forward and one backward (Pallas to Triton), as `pallas_recurrent`.

A program is a tile of rows and a head: R of that head stays on the chip, the state in registers, and time is a loop
inside the kernel. Features are padded to powers of two, of at least 16, that matrix units take.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array

from . import pallas_recurrent
from .pallas_plan import Sizes, sizes_for
from .pallas_recurrent import lanes_of, matrix_product, of_each, read, step_flags, step_gates, write
from .rules import Given, Spec, Weights, emptied, masked_rule, scaled

TILE = 16  # rows of a program and the least width of a head: what a matrix unit takes
ON_CHIP = 160 * 2**10  # bytes of R of one head, of the 256 KiB of registers and about as much shared memory of a core


class GPUSizes(Sizes):
    """With rows in whole tiles and a head's width a power of two."""

    @property
    def rows(self) -> int:
        return -(-self.B // TILE) * TILE

    @property
    def lanes(self) -> int:
        return max(TILE, 1 << (self.width - 1).bit_length())


class Plan(NamedTuple):
    """What the kernels are made for."""

    sizes: GPUSizes
    interpret: bool


def plan_for(
    spec: Spec,
    xs: Array,
    weights: Weights,
    state: Any,
    given: Given,
    scale: Array | None,
    *,
    interpret: bool = False,
) -> Plan | str:
    """The kernels' plan, from shapes alone, or why these arguments have none."""
    sizes = sizes_for(spec, xs, weights, state, given, scale, TILE, interpret)
    if isinstance(sizes, str):
        return sizes
    sizes = GPUSizes(*sizes)
    needed = sizes.K * sizes.lanes**2 * sizes.product_bytes
    if needed > ON_CHIP:
        return (
            f"{sizes.K} recurrent gates of a head of {sizes.width} features need {needed} bytes on the chip; "
            f"{ON_CHIP} may be used (more heads need less)"
        )
    return Plan(sizes, interpret)


def run(plan: Plan, *arguments: Any) -> tuple[Array, Any]:
    """As `pallas_recurrent.run`."""
    return pallas_recurrent.run(plan, *arguments, kernels=(forward, backward))


class Specs:
    """The part of each array that one program sees: all steps of a tile of rows and a head."""

    def __init__(self, s: GPUSizes):
        def per_step(gates):
            return pl.BlockSpec((s.T, TILE, gates * s.lanes), lambda b, n: (0, b, n))

        self.x, self.r, self.feature = per_step(s.G), per_step(s.K), per_step(1)
        self.flags = pl.BlockSpec((s.T, TILE, 1), lambda b, n: (0, b, 0))
        self.row = pl.BlockSpec((TILE, s.lanes), lambda b, n: (b, n))
        self.param = pl.BlockSpec((1, s.lanes), lambda b, n: (0, n))
        self.R = pl.BlockSpec((1, s.lanes, s.K * s.lanes), lambda b, n: (n, 0, 0))


def _call(kernel, plan, in_specs, out_specs, out_shape):
    return pl.pallas_call(
        kernel,
        grid=(plan.sizes.rows // TILE, plan.sizes.heads),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        interpret=plan.interpret,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
    )


def _matrices(s, R):
    """R of each gate."""
    return tuple(R[0, :, lanes_of(s, 0, s.K, gate)] for gate in range(s.K))


def _shares(h, matrices):
    """The recurrent share of each gate."""
    return tuple(matrix_product(h.astype(R.dtype), R, (1, 0), h.dtype) for R in matrices)


def _loop(s, backwards, step, carry):
    """step(t, carry) over all steps, first to last or the other way round."""
    return jax.lax.fori_loop(0, s.T, lambda n, carry: step(s.T - 1 - n if backwards else n, carry), carry)


def forward(spec, plan, x, R, state, params, flags, scale, keep):
    """Outputs, the last state and, if asked for, the state before each step."""
    s, specs = plan.sizes, Specs(plan.sizes)

    def kernel(x, R, start, params, flags, scale, ys, end, kept):
        matrices, own = _matrices(s, R), read(params, ...)
        own_scale = None if scale is None else scale[...]

        def step(t, before):
            given = step_flags(flags, t, before.h)
            before = emptied(given.reset, before)
            r = _shares(scaled(before.h, own_scale), matrices)
            after, y = masked_rule(spec, step_gates(s, x, t, 0, s.G), r, before, own, given)
            ys[t, :, :] = y
            write(kept, before, t, slice(None), slice(None))
            return after

        write(end, _loop(s, spec.reverse, step, read(start, ...)), ...)

    row, feature = of_each(state, specs.row), of_each(state, specs.feature)
    last = jax.ShapeDtypeStruct(state.h.shape, state.h.dtype)
    steps = jax.ShapeDtypeStruct((s.T, *state.h.shape), state.h.dtype)
    return _call(
        *(kernel, plan),
        (
            *(specs.x, specs.R, row, of_each(params, specs.param)),
            *(None if flags is None else specs.flags, None if scale is None else specs.row),
        ),
        (specs.feature, row, feature if keep else None),
        (steps, of_each(state, last), of_each(state, steps) if keep else None),
    )(x, R.astype(spec.dtype), state, params, flags, scale)


def backward(spec, plan, x, R, kept, params, flags, scale, d_ys, d_last):
    """The gradients of x, of the recurrent shares (None if they are the same), of the state and, a row, the params."""
    s, specs = plan.sizes, Specs(plan.sizes)

    def kernel(x, R, kept, params, flags, scale, d_ys, d_last, dx, dr, d_state, d_params):
        matrices, d_start = _matrices(s, R), read(d_last, ...)
        own = jax.tree.map(partial(jnp.broadcast_to, shape=d_start.h.shape), read(params, ...))
        own_scale = None if scale is None else scale[...]

        def step(t, carry):
            d_after, sums = carry
            before = read(kept, t, slice(None), slice(None))
            given = step_flags(flags, t, before.h)
            shares = step_gates(s, x, t, 0, s.G), _shares(scaled(before.h, own_scale), matrices)
            pull = jax.vjp(partial(masked_rule, spec, given=given), *shares, before, own)[1]
            d_x, d_r, d_before, d_own = pull((d_after, d_ys[t, :, :]))
            for gate in range(s.G):
                dx[t, :, lanes_of(s, 0, s.G, gate)] = d_x[gate]
            for gate in range(0 if s.same else s.K):
                dr[t, :, lanes_of(s, 0, s.K, gate)] = d_r[gate]
            products = (matrix_product(d.astype(R.dtype), M, (1, 1), d.dtype) for d, M in zip(d_r, matrices))
            d_h = scaled(sum(products), own_scale)
            d_before = emptied(given.reset, d_before._replace(h=d_before.h + d_h))
            return d_before, jax.tree.map(jnp.add, sums, d_own)

        carry = d_start, jax.tree.map(jnp.zeros_like, own)
        write((d_state, d_params), _loop(s, not spec.reverse, step, carry), ...)

    row, feature = of_each(kept, specs.row), of_each(kept, specs.feature)
    shape = partial(jax.ShapeDtypeStruct, dtype=x.dtype)
    return _call(
        *(kernel, plan),
        (
            *(specs.x, specs.R, feature, of_each(params, specs.param)),
            *(None if flags is None else specs.flags, None if scale is None else specs.row),
            *(specs.feature, row),
        ),
        (specs.x, None if s.same else specs.r, row, of_each(params, specs.row)),
        (
            *(shape(x.shape), None if s.same else shape((*x.shape[:2], s.heads * s.K * s.lanes))),
            *(of_each(d_last, shape(d_last.h.shape)), of_each(params, shape(d_last.h.shape))),
        ),
    )(x, R.astype(spec.dtype), kept, params, flags, scale, d_ys, d_last)
