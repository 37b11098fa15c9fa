"""The recurrence of any rule as one TPU kernel forward and one backward: the form "pallas" of `recurrent`.

R lies in VMEM for the whole sequence, blocks of time stream through, the state stays in VMEM between them. The grid is
(batch tiles, groups of heads, blocks of time). Forward, a step is one product a head and the rule; what is kept for the
gradient is the state before each step. Backward, the recurrent shares of a block are computed again in one product, and
a step is `jax.vjp` of the rule and one product with R transposed. The gradients of R, W, b and the inputs are one
product each outside. Served is a rule that is elementwise in the features, with Dense maps and without `inner` and
noise, and finite on zeros, for features are padded to whole lanes (a head of 128) and rows to whole sublanes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array

from .pallas_plan import Plan, Sizes, Tiles
from .rules import Given, Spec, Weights, emptied, masked_rule, project, scaled

# Packing: an axis of features (D,) becomes one of heads in whole lanes, gates (G, D) one of heads of gates.


def pack(a: Array, sizes: Sizes) -> Array:
    """(..., D) to (..., heads * lanes)."""
    a = a.reshape(*a.shape[:-1], sizes.heads, sizes.width)
    return padded(a, sizes.lanes, axis=-1).reshape(*a.shape[:-2], -1)


def unpack(a: Array, sizes: Sizes) -> Array:
    """The inverse of `pack`."""
    a = a.reshape(*a.shape[:-1], sizes.heads, sizes.lanes)[..., : sizes.width]
    return a.reshape(*a.shape[:-2], -1)


def pack_gates(a: Array, sizes: Sizes) -> Array:
    """(..., G, D) to (..., 1, heads * G * lanes): as one gate."""
    *lead, G, _ = a.shape
    a = jnp.swapaxes(a.reshape(*lead, G, sizes.heads, sizes.width), -3, -2)
    return padded(a, sizes.lanes, axis=-1).reshape(*lead, 1, -1)


def pack_matrix(R: Array, sizes: Sizes) -> Array:
    """R (N, E, G, F) to (heads, lanes, G * lanes); merged heads stand on the diagonal of a block."""
    N, E, G, F = R.shape
    merged = N // sizes.heads
    if merged > 1:
        R = jnp.einsum("hnegf,nm->hnegmf", R.reshape(-1, merged, E, G, F), jnp.eye(merged, dtype=R.dtype))
    R = R.reshape(sizes.heads, sizes.width, G, sizes.width)
    return padded(padded(R, sizes.lanes, axis=1), sizes.lanes, axis=3).reshape(sizes.heads, sizes.lanes, -1)


def padded(a: Array, size: int, axis: int) -> Array:
    """With zeros up to `size` entries along an axis."""
    if a.shape[axis] == size:
        return a
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, size - a.shape[axis])
    return jnp.pad(a, widths)


def run(
    plan: Any,
    spec: Spec,
    xs: Array,
    weights: Weights,
    state: Any,
    given: Given,
    scale: Array | None,
    kernels: tuple[Callable, Callable] | None = None,
) -> tuple[Array, Any]:
    """Outputs (B, T, D) and the last state, as the other forms; all but the recurrence itself is plain JAX.

    kernels: like `forward` and `backward`, which are those for TPUs.
    """
    s = plan.sizes

    def rows(a, axis=0):
        return padded(a, s.rows, axis)

    def whole(xs, weights, state):
        if weights.W is None:
            projection = weights._replace(b=None if weights.b is None else pack_gates(weights.b, s))
            x = project(spec, rows(pack_gates(xs, s)), projection, state.h.dtype)
        else:
            packed = jax.tree.map(lambda a: pack_gates(a, s), (weights.W, weights.b))
            x = project(spec, rows(xs), weights._replace(W=packed[0], b=packed[1]), state.h.dtype)
        start, params = jax.tree.map(lambda a: pack(a, s), (jax.tree.map(rows, state), weights.params))
        ys, last = _recurrence(
            *(kernels or (forward, backward), spec, plan, x[:, :, 0], pack_matrix(weights.R, s), start, params),
            *(packed_flags(given, s), None if scale is None else pack(rows(scale.astype(state.h.dtype)), s)),
        )
        return unpack(jnp.swapaxes(ys[:, : s.B], 0, 1), s), jax.tree.map(lambda a: unpack(a[: s.B], s), last)

    return (jax.checkpoint(whole) if spec.remat else whole)(xs, weights, state)


def packed_flags(given: Given, sizes: Sizes) -> Array | None:
    """(T, B, 1): 1 where the step is masked, 2 where it is reset; None if none ever is."""
    if not sizes.flags:
        return None
    skip = 0 if given.mask is None else jnp.where(given.mask, 0, 1)
    empty = 0 if given.reset is None else jnp.where(given.reset, 2, 0)
    return padded(skip + empty, sizes.rows, axis=1).astype(jnp.int32)[..., None]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _recurrence(kernels, spec, plan, x, R, state, params, flags, scale):
    """x (T, rows, heads * G * lanes), R (heads, lanes, K * lanes), leaves of the state (rows, heads * lanes)."""
    ys, last, _ = kernels[0](spec, plan, x, R, state, params, flags, scale, keep=False)
    return ys, last


def _recurrence_forward(kernels, spec, plan, x, R, state, params, flags, scale):
    ys, last, kept = kernels[0](spec, plan, x, R, state, params, flags, scale, keep=True)
    return (ys, last), (x, R, params, flags, scale, kept)


class Specs:
    """Blocks of the arrays for one kernel's tiles; time runs backwards through the blocks if `backwards`."""

    def __init__(self, plan: Plan, tiles: Tiles, backwards: bool):
        s = plan.sizes
        blocks = plan.grid(tiles)[2]

        def at(t):
            return blocks - 1 - t if backwards else t

        def per_step(gates, lanes=s.lanes):
            return pl.BlockSpec((tiles.steps, tiles.rows, tiles.heads * gates * lanes), lambda b, n, t: (at(t), b, n))

        self.x, self.r, self.feature = per_step(s.G), per_step(s.K), per_step(1)
        self.flags = pl.BlockSpec((tiles.steps, tiles.rows, 1), lambda b, n, t: (at(t), b, 0))
        self.row = pl.BlockSpec((tiles.rows, tiles.heads * s.lanes), lambda b, n, t: (b, n))
        self.param = pl.BlockSpec((1, tiles.heads * s.lanes), lambda b, n, t: (0, n))
        once = pl.Buffered(1)
        self.R = lambda *shape: pl.BlockSpec((tiles.heads, *shape), lambda b, n, t: (n, 0, 0), pipeline_mode=once)


def _call(kernel, plan, tiles, in_specs, out_specs, out_shape, scratch=()):
    return pl.pallas_call(
        kernel,
        grid=plan.grid(tiles),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        interpret=plan.interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=plan.budget
        ),
    )


def matrix_product(a: Array, b: Array, axes: tuple[int, int], dtype: DTypeLike) -> Array:
    """The product along an axis of each, summed in `dtype`, in the precision that JAX's default asks for.

    Mosaic has two: its own default, and "highest", which bfloat16 operands must not ask for.
    """
    own = a.dtype == jnp.bfloat16 or jax.config.jax_default_matmul_precision in (None, "default", "fastest", "bfloat16")
    precision = jax.lax.Precision.DEFAULT if own else jax.lax.Precision.HIGHEST
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=dtype)


def _steps(sizes, tiles, backwards, step):
    """Runs step(t) over the steps of this block of time that exist, first to last or the other way round."""
    blocks = -(-sizes.T // tiles.steps)
    block = blocks - 1 - pl.program_id(2) if backwards else pl.program_id(2)
    count = tiles.steps if sizes.T % tiles.steps == 0 else jnp.minimum(tiles.steps, sizes.T - block * tiles.steps)

    def body(n, _):
        step(count - 1 - n if backwards else n)

    jax.lax.fori_loop(0, count, body, None)


def lanes_of(sizes, head, gates=1, gate=0):
    """Where a gate of a head stands among all gates of a tile's heads."""
    return pl.ds((head * gates + gate) * sizes.lanes, sizes.lanes)


def step_gates(sizes, ref, t, head, gates):
    """A step's gates of one head."""
    return tuple(ref[t, :, lanes_of(sizes, head, gates, gate)] for gate in range(gates))


def step_flags(flags, t, like):
    """Mask and reset of a step, one flag a feature."""
    if flags is None:
        return Given(None, None, ())
    value = jnp.broadcast_to(flags[t], like.shape)
    return Given(value % 2 == 0, value >= 2, ())


def read(refs, *place):
    """Reads each leaf."""
    return jax.tree.map(lambda ref: ref[place], refs)


def of_each(tree, value):
    """The same value for each leaf."""
    return jax.tree.map(lambda _: value, tree)


def write(refs, values, *place):
    """Writes each leaf."""
    for ref, value in zip(jax.tree.leaves(refs), jax.tree.leaves(values)):
        ref[place] = value


def forward(spec, plan, x, R, state, params, flags, scale, keep):
    """Outputs, the last state and, if asked for, the state before each step."""
    s, tiles, everything = plan.sizes, plan.forward, slice(None)
    specs = Specs(plan, tiles, spec.reverse)

    def kernel(x, R, start, params, flags, scale, ys, state, kept):
        @pl.when(pl.program_id(2) == 0)
        def _():
            write(state, read(start, ...), ...)

        def step(t):
            for head in range(tiles.heads):
                lanes = lanes_of(s, head)
                before, own = read((state, params), everything, lanes)
                given = step_flags(flags, t, before.h)
                before = emptied(given.reset, before)
                h = scaled(before.h, None if scale is None else scale[:, lanes])
                r = matrix_product(h.astype(R.dtype), R[head], (1, 0), h.dtype)
                r = tuple(jnp.split(r, s.K, axis=1))
                after, y = masked_rule(spec, step_gates(s, x, t, head, s.G), r, before, own, given)
                ys[t, :, lanes] = y
                write(state, after, everything, lanes)
                write(kept, before, t, everything, lanes)

        _steps(s, tiles, spec.reverse, step)

    row, feature = of_each(state, specs.row), of_each(state, specs.feature)
    steps = jax.ShapeDtypeStruct((s.T, *state.h.shape), state.h.dtype)
    return _call(
        *(kernel, plan, tiles),
        (
            *(specs.x, specs.R(s.lanes, s.K * s.lanes), row, of_each(params, specs.param)),
            *(None if flags is None else specs.flags, None if scale is None else specs.row),
        ),
        (specs.feature, row, feature if keep else None),
        (steps, state, of_each(state, steps) if keep else None),
    )(x, R.astype(spec.dtype), state, params, flags, scale)


def _recurrence_backward(kernels, spec, plan, residuals, cotangents):
    """The gradients: of x, the state and the parameters by the kernel, of R by one product."""
    x, R, params, flags, scale, kept = residuals
    s = plan.sizes
    dx, dr, d_state, d_params = kernels[1](spec, plan, x, R, kept, params, flags, scale, *cotangents)
    h, dr = scaled(kept.h, scale), dx if dr is None else dr
    h, dr = (a.astype(spec.dtype).reshape(s.T, s.rows, s.heads, -1) for a in (h, dr))
    d_R = jnp.einsum("tbhe,tbhf->hef", h, dr, preferred_element_type=jnp.promote_types(R.dtype, jnp.float32))
    d_params = jax.tree.map(lambda d: jnp.sum(d, axis=0, keepdims=True), d_params)
    return dx, d_R.astype(R.dtype), d_state, d_params, None, None


_recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def backward(spec, plan, x, R, kept, params, flags, scale, d_ys, d_last):
    """The gradients of x, of the recurrent shares (None if they are the same), of the state and, a row, the params."""
    s, tiles, everything = plan.sizes, plan.backward, slice(None)
    specs = Specs(plan, tiles, not spec.reverse)

    def kernel(x, R, kept, params, flags, scale, d_ys, d_last, dx, dr, d_state, d_params, r):
        @pl.when(pl.program_id(2) == 0)
        def _():
            write(d_state, read(d_last, ...), ...)
            write(d_params, jax.tree.map(jnp.zeros_like, read(d_params, ...)), ...)

        def own_scale(lanes):
            return None if scale is None else scale[:, lanes]

        def recompute(n, _):
            steps = pl.ds(n * tiles.steps_at_once, tiles.steps_at_once)
            for head in range(tiles.heads):
                h = scaled(kept.h[steps, :, lanes_of(s, head)], own_scale(lanes_of(s, head)))
                shares = matrix_product(h.reshape(-1, s.lanes).astype(R.dtype), R[head], (1, 1), h.dtype)
                gates = pl.ds(head * s.K * s.lanes, s.K * s.lanes)
                r[steps, :, gates] = shares.reshape(*h.shape[:2], -1)

        jax.lax.fori_loop(0, tiles.steps // tiles.steps_at_once, recompute, None)

        def step(t):
            for head in range(tiles.heads):
                lanes = lanes_of(s, head)
                before = read(kept, t, everything, lanes)
                d_after, own, sums = read((d_state, params, d_params), everything, lanes)
                own = jax.tree.map(partial(jnp.broadcast_to, shape=before.h.shape), own)
                given = step_flags(flags, t, before.h)
                shares = step_gates(s, x, t, head, s.G), step_gates(s, r, t, head, s.K)
                pull = jax.vjp(partial(masked_rule, spec, given=given), *shares, before, own)[1]
                d_x, d_r, d_before, d_own = pull((d_after, d_ys[t, :, lanes]))
                for gate in range(s.G):
                    dx[t, :, lanes_of(s, head, s.G, gate)] = d_x[gate]
                for gate in range(0 if s.same else s.K):
                    dr[t, :, lanes_of(s, head, s.K, gate)] = d_r[gate]
                d_r = jnp.concatenate(d_r, axis=1).astype(R.dtype)
                d_h = scaled(matrix_product(d_r, R[head], (1, 0), before.h.dtype), own_scale(lanes))
                d_before = emptied(given.reset, d_before._replace(h=d_before.h + d_h))
                write(d_state, d_before, everything, lanes)
                write(d_params, jax.tree.map(jnp.add, sums, d_own), everything, lanes)

        _steps(s, tiles, not spec.reverse, step)

    row, feature = of_each(kept, specs.row), of_each(kept, specs.feature)
    shape = partial(jax.ShapeDtypeStruct, dtype=x.dtype)
    sums = of_each(params, shape(d_last.h.shape))
    return _call(
        *(kernel, plan, tiles),
        (
            *(specs.x, specs.R(s.K * s.lanes, s.lanes), feature, of_each(params, specs.param)),
            *(None if flags is None else specs.flags, None if scale is None else specs.row),
            *(specs.feature, row),
        ),
        (specs.x, None if s.same else specs.r, row, of_each(params, specs.row)),
        (shape(x.shape), None if s.same else shape((*x.shape[:2], s.heads * s.K * s.lanes)), d_last, sums),
        scratch=[pltpu.VMEM((tiles.steps, tiles.rows, tiles.heads * s.K * s.lanes), x.dtype)],
    )(x, jnp.swapaxes(R.astype(spec.dtype), 1, 2), kept, params, flags, scale, d_ys, d_last)
