"""The chunkwise mLSTM as one GPU kernel forward and one backward (Pallas to Triton), as `pallas_mlstm`.

A program is a row and a head: its memory stays on the chip, and the chunks are a loop inside the kernel. The backward
kernel is `jax.vjp` of `chunk` too. Widths and chunks are powers of two, of at least 16, that matrix units take.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from . import pallas_mlstm
from .mlstm import Inputs, MLSTMState
from .pallas_mlstm import Plan, chunk
from .pallas_recurrent import padded

LEAST, LONGEST = 16, 64  # of a width and a chunk, steps of a chunk
ON_CHIP = 64 * 2**10  # bytes of the memory of one head: a quarter of a core's registers


def power_of_two(n: int) -> int:
    """The next one, of at least 16."""
    return max(LEAST, 1 << (n - 1).bit_length())


def plan_for(inputs: Inputs, state: MLSTMState, chunk_size: int, options: dict, *, interpret: bool) -> Plan | str:
    """The kernels' plan, from shapes alone, or why these arguments have none."""
    if not interpret and any(leaf.dtype != jnp.float32 for leaf in state):
        return f"the kernel is for a float32 state, not {state.C.dtype}"
    K, V = inputs.q.shape[-1], inputs.v.shape[-1]
    needed = power_of_two(K) * power_of_two(V) * state.C.dtype.itemsize
    if needed > ON_CHIP:
        return f"a memory of {K} x {V} numbers a head needs {needed} bytes on the chip; {ON_CHIP} may be used"
    L = power_of_two(min(chunk_size, LONGEST, inputs.q.shape[2]))
    return Plan(L, inputs.reset is not None, **options, vmem=needed, budget=ON_CHIP, interpret=interpret)


def run(plan: Plan, inputs: Inputs, state: MLSTMState) -> tuple[Float[Array, "B H T V"], MLSTMState]:
    """As `pallas_mlstm.run`, with widths filled with zeros, which add nothing."""
    K, V = inputs.q.shape[-1], inputs.v.shape[-1]
    q, k, v = (padded(a, power_of_two(a.shape[-1]), axis=3) for a in inputs[:3])
    C = padded(padded(state.C, q.shape[-1], axis=2), v.shape[-1], axis=3)
    state = MLSTMState(C, padded(state.n, q.shape[-1], axis=2), state.m)
    h, (C, n, m) = pallas_mlstm.run(plan, inputs._replace(q=q, k=k, v=v), state, kernels=(forward, backward))
    return h[..., :V], MLSTMState(C[:, :, :K, :V], n[..., :K], m)


def _call(kernel, plan, heads, inputs, out_shape):
    """One program a head, which sees all of it."""

    def head(a):
        return pl.BlockSpec((1, *a.shape[1:]), lambda n: (n, *(0,) * (a.ndim - 1)))

    return pl.pallas_call(
        kernel,
        grid=(heads,),
        in_specs=jax.tree.map(head, inputs),
        out_specs=jax.tree.map(head, out_shape),
        out_shape=out_shape,
        interpret=plan.interpret,
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=1),
    )(*inputs)


def _at(refs, *place):
    """The matrices at a place of a tree of (1, ., .) or (1, N, ., .)."""
    return jax.tree.map(lambda ref: ref[(0, *place)], refs)


def _put(refs, values, *place):
    for ref, value in zip(jax.tree.leaves(refs), jax.tree.leaves(values)):
        ref[(0, *place)] = value


def _shapes(arrays):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)


def forward(plan, steps, segment, state, keep):
    """Outputs, the last memory and, if asked for, the memory before each chunk."""
    BH, N = steps[0].shape[:2]
    whole = slice(None), slice(None)

    def kernel(steps, segment, start, h, last, kept):
        def step(c, before):
            _put(kept, before, c, *whole)
            after, out = chunk(plan, before, *_at(steps, c, *whole), _at(segment, c, *whole))
            _put(h, out, c, *whole)
            return after

        _put(last, jax.lax.fori_loop(0, N, step, _at(start, *whole)), *whole)

    h = jax.ShapeDtypeStruct(steps[2].shape, state.m.dtype)
    kept = jax.tree.map(lambda a: jax.ShapeDtypeStruct((BH, N, *a.shape[1:]), a.dtype), state) if keep else None
    return _call(kernel, plan, BH, (steps, segment, state), (h, _shapes(state), kept))


def backward(plan, steps, segment, kept, d_h, d_last):
    """The gradients of the steps and of the first memory."""
    BH, N = steps[0].shape[:2]
    whole = slice(None), slice(None)

    def kernel(steps, segment, kept, d_h, d_last, d_steps, d_start):
        def step(n, d_after):
            c = N - 1 - n
            of_chunk = _at(segment, c, *whole)
            pull = jax.vjp(lambda state, *steps: chunk(plan, state, *steps, of_chunk), *_at((kept, *steps), c, *whole))[
                1
            ]
            d_before, *d_own = pull((d_after, _at(d_h, c, *whole)))
            _put(d_steps, d_own, c, *whole)
            return d_before

        _put(d_start, jax.lax.fori_loop(0, N, step, _at(d_last, *whole)), *whole)

    return _call(kernel, plan, BH, (steps, segment, kept, d_h, d_last), (_shapes(steps), _shapes(d_last)))
