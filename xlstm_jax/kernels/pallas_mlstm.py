"""The chunkwise mLSTM as one TPU kernel forward and one backward: the form "pallas" of `mlstm`.

The grid is (rows times heads, chunks); a head's memory stays in VMEM from chunk to chunk. For the gradient the memory
before each chunk is kept, and the backward kernel is `jax.vjp` of `chunk`, so it is exact, through the normaliser, the
floor and the carried memory. All products and sums are in the state's dtype.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from .mlstm import Inputs, MLSTMState
from .mlstm_chunkwise import denominator
from .pallas_plan import LANES, SUBLANES, vmem_budget
from .pallas_recurrent import matrix_product


class Plan(NamedTuple):
    """Steps of a chunk L, whether there are resets, the definition's options; VMEM needed and that may be used.

    bytes: that forward and backward set aside beside VMEM (of a GPU not counted).
    """

    L: int
    reset: bool
    stabilise: bool
    normalize: bool
    eps: float
    vmem: int
    budget: int
    interpret: bool
    bytes: int = 0


def vmem_bytes(L: int, K: int, V: int, itemsize: int = 4) -> int:
    """VMEM of the backward kernel, the larger one: blocks twice, because the next is fetched while one is worked on."""
    L, K, V = (-(-size // LANES) * LANES for size in (L, K, V))
    memory = (K * V + SUBLANES * (K + LANES)) * itemsize
    steps = (4 * L * K + 4 * L * V + 4 * SUBLANES * L) * itemsize
    values = (5 * K * V + 12 * L * L + 8 * L * max(K, V)) * itemsize  # of the rule and its transpose, at most
    return 2 * (4 * memory + steps) + values


def set_aside(inputs: Inputs, state: MLSTMState, L: int) -> int:
    """Bytes in chunks of L steps: q, k, v, h and their gradients, and the memory before each chunk."""
    B, H, T, K = inputs.q.shape
    K, V = (-(-size // LANES) * LANES for size in (K, inputs.v.shape[-1]))
    step = 2 * (2 * K + V) * inputs.q.dtype.itemsize + 2 * V * state.C.dtype.itemsize
    return B * H * -(-T // L) * (L * step + K * V * state.C.dtype.itemsize)


def plan_for(
    inputs: Inputs, state: MLSTMState, chunk_size: int, options: dict, *, vmem: int, interpret: bool
) -> Plan | str:
    """The kernel's plan, from shapes alone, or why these arguments have none."""
    T, K = inputs.q.shape[2:]
    V, L = inputs.v.shape[-1], min(chunk_size, T)
    if not interpret and any(leaf.dtype != jnp.float32 for leaf in state):
        return f"the kernel is for a float32 state, not {state.C.dtype}"
    needed, budget = vmem_bytes(L, K, V, state.C.dtype.itemsize), vmem_budget(vmem)
    if needed > budget:
        return (
            f"chunks of {L} steps with {K} x {V} numbers a head need {needed} bytes of VMEM; {budget} may be used"
            + (" (a smaller chunk_size needs less)" if L > LANES else "")
        )
    memory = dict(vmem=needed, budget=budget, bytes=set_aside(inputs, state, L))
    return Plan(L, inputs.reset is not None, **options, **memory, interpret=interpret)


def run(
    plan: Plan, inputs: Inputs, state: MLSTMState, kernels: tuple[Callable, Callable] | None = None
) -> tuple[Float[Array, "B H T V"], MLSTMState]:
    """Outputs and the last state, as the other forms; the last chunk is filled with steps that write nothing.

    kernels: like `forward` and `backward`, which are those for TPUs.
    """
    B, H, T, _ = inputs.q.shape
    missing = -T % plan.L

    def chunks(a, value=0):
        a = jnp.pad(a, [(0, 0)] * 2 + [(0, missing)] + [(0, 0)] * (a.ndim - 3), constant_values=value)
        return a.reshape(B * H, -1, plan.L, *a.shape[3:])

    matrices = (chunks(a) for a in inputs[:3])
    gates = (chunks(a, value)[:, :, None] for a, value in ((inputs.log_i, -jnp.inf), (inputs.log_f, 0)))  # along lanes
    segment = None
    if plan.reset:
        reset = jnp.pad(inputs.reset, [(0, 0), (0, missing)]).reshape(B, 1, -1, 1, plan.L)
        reset = jnp.where(reset, 1, 0)  # a cast of booleans of 32 rows ends libtpu 0.0.42's compiler for v5p
        segment = jnp.cumsum(reset, axis=-1, dtype=state.m.dtype)  # which sequence of its chunk a step is of
        segment = jnp.broadcast_to(segment, (B, H, *segment.shape[2:])).reshape(B * H, -1, 1, plan.L)
    C, n, m = state
    flat = MLSTMState(C.reshape(B * H, *C.shape[2:]), n.reshape(B * H, 1, -1), m.reshape(B * H, 1, 1))
    h, last = _mlstm(kernels or (forward, backward), plan, (*matrices, *gates), segment, flat)
    last = jax.tree.map(lambda a, like: a.reshape(like.shape), last, state)
    return h.reshape(B, H, -1, h.shape[-1])[:, :, :T], last


def chunk(plan: Plan, state: MLSTMState, q: Array, k: Array, v: Array, log_i: Array, log_f: Array, segment: Any):
    """One chunk of one head, as in `mlstm_chunkwise`, in matrices: q, k (L, K), v (L, V), gates (1, L), m (1, 1)."""
    C, n, m = state
    q, k, v = (a.astype(m.dtype) for a in (q, k, v))
    product = partial(matrix_product, dtype=m.dtype)
    t, j = (jax.lax.broadcasted_iota(jnp.int32, (plan.L, plan.L), axis) for axis in (0, 1))

    def column(row):
        return jnp.sum(jnp.where(t == j, row, jnp.zeros_like(row)), axis=1, keepdims=True)

    allowed, entering = j <= t, m
    if plan.reset:
        of_step = column(segment)
        allowed, carried = allowed & (of_step == segment), of_step == 0
        entering = jnp.where(carried, m, 0)
    F = jnp.sum(jnp.where(allowed, log_f, 0), axis=1, keepdims=True)
    F_row = jnp.sum(jnp.where(t == j, F, 0), axis=0, keepdims=True)
    D = jnp.where(allowed, F - F_row + log_i, -jnp.inf)
    base = F + entering
    m_all = (
        jnp.maximum(base, jnp.max(D, axis=1, keepdims=True))
        if plan.stabilise
        else jnp.broadcast_to(entering, base.shape)
    )
    old, weight = jnp.exp(base - m_all), jnp.exp(D - m_all)
    if plan.reset:
        old = jnp.where(carried, old, 0)
    P = product(q, k, (1, 1)) * weight
    h = old * product(q, C, (1, 0)) + product(P, v, (1, 0))
    if plan.normalize:
        den = old * jnp.sum(q * n, axis=1, keepdims=True) + jnp.sum(P, axis=1, keepdims=True)
        h = h / denominator(den, m_all, plan.eps)
    is_last = jax.lax.broadcasted_iota(jnp.int32, (plan.L, 1), 0) == plan.L - 1
    old, m = (jnp.sum(jnp.where(is_last, a, 0), axis=0, keepdims=True) for a in (old, m_all))
    written = column(jnp.sum(jnp.where(t == plan.L - 1, weight, 0), axis=0, keepdims=True)) * k
    C = old * C + product(written, v, (0, 0))
    if plan.normalize:
        n = old * n + jnp.sum(written, axis=0, keepdims=True)
    return MLSTMState(C, n, m), h


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mlstm(kernels, plan, steps, segment, state):
    """steps: q, k, v (BH, N, L, .), log_i, log_f (BH, N, 1, L) of N chunks; the state's leaves are matrices."""
    h, last, _ = kernels[0](plan, steps, segment, state, keep=False)
    return h, last


def _mlstm_forward(kernels, plan, steps, segment, state):
    h, last, kept = kernels[0](plan, steps, segment, state, keep=True)
    return (h, last), (steps, segment, kept)


def _mlstm_backward(kernels, plan, residuals, cotangents):
    d_steps, d_state = kernels[1](plan, *residuals, *cotangents)
    return d_steps, None, d_state


_mlstm.defvjp(_mlstm_forward, _mlstm_backward)


def _block(a, chunks, backwards):
    """One chunk of one head of (BH, N, ., .)."""
    return pl.BlockSpec((1, 1, *a.shape[2:]), lambda n, c: (n, chunks - 1 - c if backwards else c, 0, 0))


def _head(a):
    """One head of (BH, ., .)."""
    return pl.BlockSpec((1, *a.shape[1:]), lambda n, c: (n, 0, 0))


def _call(kernel, plan, grid, in_specs, out_specs, out_shape):
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        interpret=plan.interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=plan.budget
        ),
    )


def _read(refs):
    """The matrices of a tree of blocks (1, ., .) and (1, 1, ., .)."""
    return jax.tree.map(lambda ref: ref[(0,) * (ref.ndim - 2)], refs)


def _write(refs, values):
    for ref, value in zip(jax.tree.leaves(refs), jax.tree.leaves(values)):
        ref[(0,) * (ref.ndim - 2)] = value


def _shapes(arrays):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)


def forward(plan, steps, segment, state, keep):
    """Outputs, the last memory and, if asked for, the memory before each chunk."""
    BH, N = steps[0].shape[:2]

    def kernel(steps, segment, start, h, state, kept):
        @pl.when(pl.program_id(1) == 0)
        def _():
            _write(state, _read(start))

        before = _read(state)
        _write(kept, before)
        after, out = chunk(plan, before, *_read(steps), _read(segment))
        _write((state, h), (after, out))

    h = jax.ShapeDtypeStruct(steps[2].shape, state.m.dtype)
    kept = jax.tree.map(lambda a: jax.ShapeDtypeStruct((BH, N, *a.shape[1:]), a.dtype), state) if keep else None
    block = partial(_block, chunks=N, backwards=False)
    in_specs = (*jax.tree.map(block, (steps, segment)), jax.tree.map(_head, state))
    out_specs = (block(h), jax.tree.map(_head, state), jax.tree.map(block, kept))
    return _call(kernel, plan, (BH, N), in_specs, out_specs, (h, _shapes(state), kept))(steps, segment, state)


def backward(plan, steps, segment, kept, d_h, d_last):
    """The gradients of the steps and of the first memory."""
    BH, N = steps[0].shape[:2]

    def kernel(steps, segment, kept, d_h, d_last, d_steps, d_state):
        @pl.when(pl.program_id(1) == 0)
        def _():
            _write(d_state, _read(d_last))

        of_chunk = _read(segment)
        pull = jax.vjp(lambda state, *steps: chunk(plan, state, *steps, of_chunk), _read(kept), *_read(steps))[1]
        d_before, *d_own = pull((_read(d_state), _read(d_h)))
        _write((d_state, d_steps), (d_before, d_own))

    block = partial(_block, chunks=N, backwards=True)
    in_specs = (*jax.tree.map(block, (steps, segment, kept, d_h)), jax.tree.map(_head, d_last))
    out_specs = jax.tree.map(block, steps), jax.tree.map(_head, d_last)
    run_kernel = _call(kernel, plan, (BH, N), in_specs, out_specs, (_shapes(steps), _shapes(d_last)))
    return run_kernel(steps, segment, kept, d_h, d_last)
