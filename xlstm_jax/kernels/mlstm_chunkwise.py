"""The mLSTM's chunkwise form: products of all chunks at once, the memory from chunk to chunk, and the gradient of both.

With F_t the sum of log f from the first step of the chunk, or of its own sequence in it, to t, and a_j = log i_j - F_j,

    m_t = F_t + max(m_in, max_{j <= t} a_j);   W_tj = exp(F_t + a_j - m_t), j <= t;   o_t = exp(F_t + m_in - m_t)
    h_t = (o_t C^T q_t + sum_j W_tj (q_t . k_j) v_j) / denominator;   C_out = o_L C + sum_j W_Lj k_j v_j^T   (n alike)

JAX differentiates the gates, and `_backward` the rest, from the memory before each chunk, with W computed again. The
gradient of a log weight is the weight times its own gradient, so that the sums over pairs of steps need no pairs:

    dF_t = q_t . dq_t;   da_j = k_j . dk_j;   dm_t = -eps h_t . dh_t / denominator

where the last is all that an output owes to its unit exp(m), as the true C, n and W have none. What C_out owes to its
decay and to W_L goes to F_L, and with the other sign to m_L.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .rules import emptied, select


class Gates(NamedTuple):
    """Of M memories, N chunks of L steps; segment: which sequence of its chunk a step is of; sound: m_in was finite."""

    F: Float[Array, "M N L"]
    a: Float[Array, "M N L"]
    m: Float[Array, "M N L"]
    m_in: Float[Array, "M N"]
    segment: Int[Array, "M N L"] | None
    sound: Bool[Array, "M N"] | None

    @property
    def carried(self) -> Bool[Array, "M N L"] | None:
        """The steps that see the memory before the chunk."""
        return None if self.segment is None else self.segment == 0


GROUP = 2**24  # numbers in the memories and the matrices of pairs that are worked on at once


def division(heads: int, memory: int, T: int, chunk_size: int) -> tuple[int, int, int]:
    """Groups of chunks, chunks of a group, steps of a chunk: equal ones, whose sum is T or a few steps more.

    heads: of all rows together; memory: numbers in that of one. The chunks of a group go at once, which is faster as
    long as they fit, and one group after another.
    """
    chunks = -(-T // chunk_size)
    L = -(-T // chunks)
    groups = -(-chunks // max(1, GROUP // (heads * (memory + L * L))))
    N = -(-chunks // groups)
    return groups, N, L


def run(
    groups: int,
    q: Array,
    k: Array,
    v: Array,
    log_i: Array,
    log_f: Array,
    reset: Array | None,
    state: Any,
    *,
    stabilise: bool,
    normalize: bool,
    eps: float,
) -> tuple[Float[Array, "M N L V"], Any]:
    """Chunks q, k (M, N, L, K), v (M, N, L, V), gates and reset (M, N, L) of M memories to h and the last state.

    The memories of all rows and heads are one axis, as XLA on a CPU takes ten times as long for sums where an axis of
    one row is left in front.
    """
    gates, m_last = _gates(log_i, log_f, reset, state.m, stabilise)
    memory, (h, sound) = _groups((groups, normalize, eps), (q, k, v), gates, (state.C, state.n))
    C, n = memory
    if reset is not None:  # what a memory that is no number gives is none either, but to the sequences after a reset
        h = jnp.where((sound[..., None] | ~gates.carried)[..., None], h, jnp.nan)
    return h, state._replace(C=C, n=n, m=m_last)


def _gates(log_i, log_f, reset, m, stabilise):
    """All of them, and the last m."""
    if reset is None:
        segment = carried = None
        F = jnp.cumsum(log_f, axis=-1)
        highest = F + jax.lax.cummax(log_i - F, axis=log_i.ndim - 1)
    else:  # sums that never leave their own sequence, so that nothing before a reset is in them, exactly
        segment = jnp.cumsum(reset, axis=-1)
        carried = segment == 0
        pairs = _pairs(log_f.shape[-1], segment)
        F = jnp.where(pairs, log_f[..., None, :], 0).sum(axis=-1)
        highest = F + jnp.where(pairs, (log_i - F)[..., None, :], -jnp.inf).max(axis=-1)

    def step(m, of_chunk):
        F, highest, carried = of_chunk
        start = emptied(None if carried is None else ~carried, m)
        return (jnp.maximum(F + start, highest) if stabilise else start), m

    last = jax.tree.map(lambda a: jnp.moveaxis(a[..., -1], 1, 0), (F, highest, carried))
    m_last, m_in = jax.lax.scan(step, m, last)
    m_in = m_in.T
    sound = None
    if reset is not None:
        sound = jnp.isfinite(m_in)
        m_in = jnp.where(sound, m_in, 0)
    start = m_in[..., None] if reset is None else jnp.where(carried, m_in[..., None], 0)
    m = jnp.maximum(F + start, highest) if stabilise else jnp.broadcast_to(start, F.shape)
    return Gates(F, log_i - F, m, m_in, segment, sound), m_last


def _pairs(L, segment):
    """Which step (second last axis) sees which: those before it and itself, of its own sequence."""
    pairs = jnp.tril(jnp.ones((L, L), bool))[None, None]
    return pairs if segment is None else pairs & (segment[..., :, None] == segment[..., None, :])


def _weights(gates):
    """W (M, N, L, L)."""
    F, a, m, _, segment, _ = gates
    return jnp.exp(jnp.where(_pairs(F.shape[-1], segment), (F - m)[..., :, None] + a[..., None, :], -jnp.inf))


def _carried_weights(gates):
    """o (M, N, L), of the memory before the chunk at each step."""
    o = jnp.exp(gates.F + gates.m_in[..., None] - gates.m)
    return o if gates.segment is None else jnp.where(gates.carried, o, 0)


def _last_weights(gates):
    """W_L (M, N, L), of each step in the memory after the chunk."""
    w = jnp.exp((gates.F - gates.m)[..., -1:] + gates.a)
    return w if gates.segment is None else jnp.where(gates.segment == gates.segment[..., -1:], w, 0)


def denominator(den: Array, m: Array, eps: float) -> Array:
    """max(|den|, exp(-m)) + eps."""
    return jnp.maximum(jnp.abs(den), jnp.exp(_floor(m))) + eps


def _floor(m):
    """-m inside the range of its dtype's exp."""
    return jnp.minimum(-m, 0.9 * math.log(jnp.finfo(m.dtype).max))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _groups(options, qkv, gates, memory):
    """The last C and n; h, and with resets whether the memory before each chunk was a number."""
    return _groups_forward(options, qkv, gates, memory)[0]


def _groups_forward(options, qkv, gates, memory):
    groups, normalize, eps = options
    memory, (outputs, kept) = _scan(groups, partial(_forward, normalize, eps), memory, (qkv, gates))
    return (memory, outputs), (qkv, gates._replace(sound=outputs[1]), outputs[0], kept)


def _groups_backward(options, residuals, cotangents):
    groups, normalize, eps = options
    d_memory, (dh, _) = cotangents
    backward = partial(_backward, normalize, eps)
    d_memory, (d_qkv, d_gates) = _scan(groups, backward, d_memory, (*residuals, dh), reverse=True)
    return d_qkv, d_gates, d_memory


_groups.defvjp(_groups_forward, _groups_backward)


def _scan(groups, body, carry, chunks, reverse=False):
    """`jax.lax.scan` over groups of chunks; without a loop where there is one."""
    if groups == 1:
        return body(carry, chunks)
    parts = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(len(a), groups, -1, *a.shape[2:]), 1, 0), chunks)
    carry, ys = jax.lax.scan(body, carry, parts, reverse=reverse)
    return carry, jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:]), ys)


def _from_chunk_to_chunk(step, memory, chunks, reverse=False):
    """`jax.lax.scan` over axis 1 of what is read and of what is kept: step(memory, chunk) -> memory, kept.

    `jax.lax.scan` itself would copy all of it to have the chunks first.
    """
    N = chunks[0].shape[1]

    def at(n):
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, n, 1, keepdims=False), chunks)

    def body(number, carry):
        memory, all_kept = carry
        n = N - 1 - number if reverse else number
        memory, kept = step(memory, at(n))
        return memory, jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, n, 1), all_kept, kept)

    kept = jax.eval_shape(step, memory, jax.eval_shape(at, 0))[1]
    kept = jax.tree.map(lambda a: jnp.zeros((len(a), N, *a.shape[1:]), a.dtype), kept)
    return jax.lax.fori_loop(0, N, body, (memory, kept))


def _product(spec, *arrays):
    wide = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    return jnp.einsum(spec, *arrays, preferred_element_type=wide)


def _forward(normalize, eps, memory, group):
    """One group: the memory after it, and (h, sound) with what the gradient needs, (C, n) before each chunk and den."""
    (q, k, v), gates = group
    o, w = _carried_weights(gates), _last_weights(gates)

    written = w[..., None] * k
    own = _product("...jk,...jv->...kv", written, v), written.sum(axis=-2) if normalize else None

    def step(memory, of_chunk):
        decay, own, carried, sound = of_chunk
        if sound is not None:  # a memory that is no number is put back where it is seen: 0 times an infinity is no 0
            C, n = memory
            sound = sound & jnp.isfinite(C).all((1, 2)) & jnp.isfinite(n).all(1)
            memory = select(sound, memory, jax.tree.map(jnp.zeros_like, memory))
        before = C, n = memory
        C = decay[..., None, None] * C + own[0]
        n = decay[..., None] * n + own[1] if normalize else n
        if sound is not None:
            C, n = select(sound | ~carried, (C, n), jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), (C, n)))
        return (C, n), (before if normalize else (before[0], None), sound)

    carried = None if gates.segment is None else gates.carried[..., -1]
    memory, ((C, n), sound) = _from_chunk_to_chunk(step, memory, (o[..., -1], own, carried, gates.sound))
    P = _product("...tk,...jk->...tj", q, k) * _weights(gates)
    h = o[..., None] * _product("...tk,...kv->...tv", q, C) + _product("...tj,...jv->...tv", P, v)
    den = None
    if normalize:
        den = o * (q * n[..., None, :]).sum(axis=-1) + P.sum(axis=-1)
        h = h / denominator(den, gates.m, eps)[..., None]
    return memory, ((h, sound), (C, n, den))


def _backward(normalize, eps, d_memory, group):
    """One group: the gradients of the memory before it and of its inputs."""
    (q, k, v), gates, h, (C, n, den), dh = group
    o, w, carried = _carried_weights(gates), _last_weights(gates), gates.carried
    unit = (dh * h).sum(axis=-1)  # what the outputs owe to the units of their numerators
    d_num, d_den = dh, None
    if normalize:
        whole, floor = denominator(den, gates.m, eps), _floor(gates.m)
        d_num = dh / whole[..., None]
        above = jnp.abs(den) > jnp.exp(floor)
        d_den = jnp.where(above, -unit / whole * jnp.sign(den), 0)
        unit = jnp.where(above | (floor == -gates.m), unit * (eps / whole), unit)
    d_m = -unit

    d_old = _product("...tk,...tv->...kv", o[..., None] * q, d_num)
    d_n_old = (q * (o * d_den)[..., None]).sum(axis=-2) if normalize else None

    def step(d_memory, of_chunk):
        decay, own, carried, sound = of_chunk
        if sound is not None:
            d_memory = select(sound | ~carried, d_memory, jax.tree.map(jnp.zeros_like, d_memory))
        dC, dn = d_memory
        d_before = (
            decay[..., None, None] * dC + own[0],
            decay[..., None] * dn + own[1] if normalize else dn,
        )
        return emptied(None if sound is None else ~sound, d_before), (dC, dn if normalize else None)

    last_carried = None if carried is None else carried[..., -1]
    chunks = o[..., -1], (d_old, d_n_old), last_carried, gates.sound
    d_memory, (dC, dn) = _from_chunk_to_chunk(step, d_memory, chunks, reverse=True)

    W = _weights(gates)
    P = _product("...tk,...jk->...tj", q, k) * W
    dP = _product("...tv,...jv->...tj", d_num, v)
    dS = (dP + d_den[..., None] if normalize else dP) * W
    dq_old = _product("...tv,...kv->...tk", d_num, C)
    dk_last = _product("...jv,...kv->...jk", v, dC)
    if normalize:
        dq_old, dk_last = dq_old + d_den[..., None] * n[..., None, :], dk_last + dn[..., None, :]
    dq_old, dk_last = o[..., None] * dq_old, w[..., None] * dk_last
    dq = dq_old + _product("...tj,...jk->...tk", dS, k)
    dk = dk_last + _product("...tj,...tk->...jk", dS, q)
    dv = _product("...tj,...tv->...jv", P, d_num) + w[..., None] * _product("...jk,...kv->...jv", k, dC)

    decayed = (dC * C).sum((-2, -1)) + ((dn * n).sum(-1) if normalize else 0)
    decayed = o[..., -1] * decayed
    d_m_in = (q * dq_old).sum((-2, -1)) + decayed
    d_last = (k * dk_last).sum((-2, -1)) + decayed
    dF, da = (q * dq).sum(-1).at[..., -1].add(d_last), (k * dk).sum(-1)
    d_m = d_m.at[..., -1].add(-d_last)
    d_gates = Gates(dF, da, d_m, d_m_in, None, None)
    return d_memory, (tuple(d.astype(x.dtype) for d, x in zip((dq, dk, dv), (q, k, v))), d_gates)
