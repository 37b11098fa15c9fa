"""The mLSTM's matrix memory (Beck et al. 2024, arXiv:2405.04517, eqs. 19-27) in three forms of one definition.

    m_t = max(log f_t + m_{t-1}, log i_t);   f' = exp(log f_t + m_{t-1} - m_t);   i' = exp(log i_t - m_t)
    C_t = f' C_{t-1} + i' k_t v_t^T;         n_t = f' n_{t-1} + i' k_t
    h_t = C_t^T q_t / (max(|n_t . q_t|, exp(-m_t)) + eps),   q scaled by K^-1/2

with log f = log sigmoid(f~) and log i = i~ (`input_gate="exp"`), or log i = log sigmoid(i~) and m = 0
(`"sigmoid"`, xLSTM 7B and TFLA papers, arXiv:2503.14376). All forms start from m = 0, so they agree to rounding:

    "recurrent"  one step after another, linear in T
    "parallel"   all pairs of steps at once, quadratic in T
    "chunkwise"  parallel inside chunks of at most `chunk_size` steps (None: by the widths and the device), recurrent
                 between them; the gradient keeps the memory before each chunk and computes the rest again
                 (`mlstm_chunkwise.py`)
    "pallas"     the same as one kernel forward and one backward, for a TPU (`pallas_mlstm.py`) or a GPU
                 (`pallas_mlstm_gpu.py`); "pallas_interpret": the same kernel interpreted, on any device, for tests
    "auto"       "pallas" where the program is for one TPU and the kernel serves it within the `memory_budget`, else
                 "chunkwise" (`choice.py`)

Gradients are exact, through the normaliser, the floor exp(-m) and the carried state.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from ..names import unknown
from . import local, mlstm_chunkwise, time_sharded
from .choice import CHOSEN_FORMS, choose, record, target
from .memory import check_budget, check_chunk, fitting, size, within
from .mlstm_chunkwise import denominator


class MLSTMState(NamedTuple):
    """C and n in units of exp(m)."""

    C: Float[Array, "B H K V"]
    n: Float[Array, "B H K"]
    m: Float[Array, "B H"]


class Inputs(NamedTuple):
    """q (scaled), k, v (B, H, T, .), the log gates (B, H, T), and reset (B, T) or None."""

    q: Array
    k: Array
    v: Array
    log_i: Array
    log_f: Array
    reset: Array | None


def initial_state(B: int, H: int, K: int, V: int, dtype=jnp.float32) -> MLSTMState:
    """The empty memory."""
    return MLSTMState(jnp.zeros((B, H, K, V), dtype), jnp.zeros((B, H, K), dtype), jnp.zeros((B, H), dtype))


def mlstm(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    i: Float[Array, "B T H"],
    f: Float[Array, "B T H"],
    state: MLSTMState | None = None,
    *,
    form: str = "chunkwise",
    chunk_size: int | None = None,
    input_gate: str = "exp",
    normalize: bool = True,
    eps: float = 1e-6,
    memory_budget: int | float | str | None = None,
    reset: Bool[Array, "B T"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H V"], MLSTMState]:
    """Reads and writes the matrix memory along T; i and f are the gates' pre-activations.

    `normalize=False` (sigmoid gate only) returns C^T q as it is and leaves n alone, at a reset too. A step with mask
    False copies the state through and outputs zeros; one with reset True starts from the empty memory, exactly.
    `chunk_size` None is chosen by the widths and the device (`usual_chunk`).
    `memory_budget`, in bytes or "auto", lets the chunkwise form take the chunk length nearest to `chunk_size` that fits
    (`memory.py`).
    """
    if form not in FORMS and form not in CHOSEN_FORMS:
        raise ValueError(unknown("form of mlstm", form, (*FORMS, *CHOSEN_FORMS)))
    check_gate(input_gate, normalize)
    chunk_size = usual_chunk(q.shape[-1], v.shape[-1]) if chunk_size is None else chunk_size
    check_chunk(chunk_size, ", or None for the usual one,")
    check_budget(memory_budget)
    B, T, H, K = q.shape
    dtype = jnp.promote_types(q.dtype, jnp.float32)  # of the gates and all sums, and of the state unless it is given
    if state is None:
        state = initial_state(B, H, K, v.shape[-1], dtype)
    kept = state
    log_i = i.astype(dtype) if input_gate == "exp" else jax.nn.log_sigmoid(i.astype(dtype))
    log_f = jax.nn.log_sigmoid(f.astype(dtype))
    if mask is not None:  # a masked step writes nothing and forgets nothing
        log_i, log_f = jnp.where(mask[..., None], log_i, -jnp.inf), jnp.where(mask[..., None], log_f, 0)
    inputs = Inputs(*(jnp.moveaxis(a, 1, 2) for a in (q * K**-0.5, k, v, log_i, log_f)), reset)
    options = dict(stabilise=input_gate == "exp", normalize=normalize, eps=eps)
    state = jax.tree.map(lambda a: a.astype(jnp.promote_types(a.dtype, dtype)), state)
    rows, heads = local.axes_for(B, local.ROWS), local.axes_for(H, ("tensor",))
    time = local.axes_for(T, ("seq",))
    specs = Inputs(*(P(rows, heads, time),) * 5, P(rows, time)), P(rows, heads)
    run = partial(_run, form, chunk_size, memory_budget, options)
    if time:
        run = partial(time_sharded.mlstm, run, stabilise=options["stabilise"], normalize=normalize)
    h, state = local.run(run, (inputs, state), specs, (specs[0].q, specs[1]))
    state = jax.tree.map(lambda a, old: a.astype(old.dtype), state, kept)
    h = jnp.moveaxis(h, 1, 2).astype(v.dtype)
    return (h if mask is None else jnp.where(mask[..., None, None], h, 0)), state


def usual_chunk(K: int, V: int) -> int:
    """64, and on a CPU the power of two nearest to sqrt(K V), from 32 to 256.

    A step takes L (K + V) multiplications within its chunk of L, and its part of the chunk's memory is K V / L numbers.
    """
    if target().platform != "cpu":
        return 64
    return min(max(2 ** round(math.log2(K * V) / 2), 32), 256)


def _run(form, chunk_size, memory_budget, options, inputs, state):
    """Outputs (B, H, T, V) and the last state, in the form that serves the arguments."""
    plan = partial(_plan, form, memory_budget, inputs, state, chunk_size, options)
    choice = choose(form, target(), plan, "chunkwise")
    if memory_budget is not None and choice.form == "chunkwise":
        fit = fitting(inputs.q.shape[2], chunk_size, memory_budget, [(False, chunkwise_bytes(inputs, state))])
        chunk_size = fit.L
        choice = choice._replace(reason=f"{choice.reason}; chunks of {fit.L}: {fit.bytes} bytes")
    elif memory_budget is not None and form == "auto":
        choice = choice._replace(reason=f"{choice.reason}; sets aside {choice.plan.bytes} bytes")
    elif memory_budget is not None:
        raise ValueError(f"memory_budget is for form='chunkwise', which chooses by it, and not for form={form!r}")
    record(choice)
    with jax.named_scope("time"):
        if choice.form == "pallas":
            return _kernel().run(choice.plan, inputs, state)
        return FORMS[choice.form](inputs, state, chunk_size, options)


def check_gate(input_gate: str, normalize: bool) -> None:
    """The gate is known, and goes with the normaliser or without."""
    if input_gate not in ("exp", "sigmoid"):
        raise ValueError(f"input_gate must be 'exp' or 'sigmoid', not {input_gate!r}")
    if not normalize and input_gate == "exp":
        raise ValueError("normalize=False needs input_gate='sigmoid': an exponential gate has to be normalised")


def _kernel():
    """The module of the target's kernels; imported here because Pallas is slow to load, and not needed on a CPU."""
    from . import pallas_mlstm, pallas_mlstm_gpu

    return pallas_mlstm_gpu if target().platform == "gpu" else pallas_mlstm


def _plan(form, memory_budget, inputs, state, chunk_size, options, target):
    """The kernel's plan for the target, for "auto" within the budget."""
    memory = {} if target.platform == "gpu" else {"vmem": target.vmem}
    planned = _kernel().plan_for(inputs, state, chunk_size, options, interpret=form == "pallas_interpret", **memory)
    return within(memory_budget if form == "auto" else None, planned)


def _step(state: MLSTMState, inputs: Inputs, *, stabilise, normalize, eps):
    q, k, v, log_i, log_f, reset = inputs
    C, n, m = state
    if reset is not None:
        empty = reset[:, None]
        C, m = jnp.where(empty[..., None, None], 0, C), jnp.where(empty, 0, m)
        n = jnp.where(empty[..., None], 0, n) if normalize else n
    m_new = jnp.maximum(log_f + m, log_i) if stabilise else m
    f, i = jnp.exp(log_f + m - m_new)[..., None], jnp.exp(log_i - m_new)[..., None]
    C = f[..., None] * C + (i * k)[..., None] * v[..., None, :].astype(C.dtype)
    if normalize:
        n = f * n + i * k
    num, den = jnp.einsum("bhk,bhkv->bhv", q, C), jnp.einsum("bhk,bhk->bh", q, n)
    return MLSTMState(C, n, m_new), num / denominator(den, m_new, eps)[..., None] if normalize else num


def _recurrent(inputs, state, chunk_size, options):
    steps = Inputs(*(jnp.moveaxis(a, 2, 0) for a in inputs[:-1]), None if inputs.reset is None else inputs.reset.T)
    state, h = jax.lax.scan(partial(_step, **options), state, steps)
    return jnp.moveaxis(h, 0, 2), state


def _chunkwise(inputs, state, chunk_size, options):
    """The sequence is filled up with steps that neither write nor forget."""
    B, H, T = inputs.log_i.shape
    groups, N, L = mlstm_chunkwise.division(B * H, math.prod(state.C.shape[2:]), T, chunk_size)
    chunks = groups * N

    def cut(a, fill=0):
        """(B, H, T, ...) to (M, N, L, ...)."""
        a = jnp.pad(a, [(0, 0), (0, 0), (0, chunks * L - T), *[(0, 0)] * (a.ndim - 3)], constant_values=fill)
        return a.reshape(B * H, chunks, L, *a.shape[3:])

    reset = None if inputs.reset is None else jnp.broadcast_to(inputs.reset[:, None], (B, H, T))
    parts = jax.tree.map(cut, inputs._replace(reset=reset))._replace(log_i=cut(inputs.log_i, -jnp.inf))
    memories = jax.tree.map(lambda a: a.reshape(B * H, *a.shape[2:]), state)
    if chunks == 1 and target().platform == "cpu":
        memories = memories._replace(C=_no_constant(memories.C, parts.k, parts.v))
    h, memories = mlstm_chunkwise.run(groups, *parts, memories, **options)
    state = jax.tree.map(lambda a, old: a.reshape(old.shape), memories, state)
    return h.reshape(B, H, chunks * L, -1)[:, :, :T], state


def _no_constant(C: Array, k: Array, v: Array) -> Array:
    """C itself, by a choice that is always the same and that XLA cannot foresee.

    jaxlib 0.10.2 fuses the chunk's products into one call of YNNPACK, which on a CPU gives any numbers at all where one
    of them is with a broadcast constant, as the empty memory is.
    """
    never = k[:, 0, 0, :, None] + v[:, 0, 0, None, :] > jnp.inf
    return jnp.where(never, 1, C)


class Bytes(NamedTuple):
    """What the chunkwise form sets aside, as in `memory.py`, for groups of N chunks of L steps

        T step + groups N memory + N (4 memory + 4 L^2 pair)

    in bytes of a step of the inputs (as chunks), of all heads' memories, and of one number a head for a pair of steps.
    heads: of all rows; numbers: in the memory of one.
    """

    heads: int
    numbers: int
    step: int
    memory: int
    pair: int

    def total(self, T: int, L: int) -> int:
        """Those for chunks of L steps at most."""
        groups, N, L = mlstm_chunkwise.division(self.heads, self.numbers, T, L)
        return T * self.step + groups * N * self.memory + 4 * N * (self.memory + L * L * self.pair)


def chunkwise_bytes(inputs: Inputs, state: MLSTMState) -> Bytes:
    """From the shapes."""
    B, H, T, _ = inputs.q.shape
    return Bytes(B * H, math.prod(state.C.shape[2:]), size(inputs) // T, size(state), size(state.m))


def _parallel(inputs, state, chunk_size, options):
    return _chunkwise(inputs, state, inputs.q.shape[2], options)


FORMS = {"recurrent": _recurrent, "parallel": _parallel, "chunkwise": _chunkwise}
