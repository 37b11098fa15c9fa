"""The elementwise linear recurrence h_t = a_t h_{t-1} + b_t in three forms of one definition.

    "scan"         one step after another, differentiated by JAX: the obvious form, which tests compare the others with
    "associative"  steps compose, (a, b) then (a', b') is (a' a, a' b + b'): chunks of L steps are composed side by
                   side, then h goes from chunk to chunk. L + T / L steps in a row instead of T; memory linear in T
    "log"          the same from log a and log b, for positive a and b: sums for products and logaddexp for sums
                   (Heinsen 2023, arXiv:2311.06281; Feng et al. 2024, arXiv:2410.01201, appendix B). The share of the
                   state is kept apart, so that it may be zero

The last two have a gradient of their own, as the reverse of a linear recurrence is one as well,

    db_t = dh_t + a_{t+1} db_{t+1};   da_t = db_t h_{t-1};   dh_0 = a_1 db_1

It is exact, also where a, b or the state is zero; it keeps a and h only; it has no forward-mode derivative.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from ..names import unknown
from . import local, time_sharded
from .memory import check_chunk

FORMS = ("scan", "associative")


class Arithmetic(NamedTuple):
    """What stands for 0, 1, product and sum, and the number that a symbol stands for."""

    zero: float
    one: float
    times: Callable[[Array, Array], Array]
    plus: Callable[[Array, Array], Array]
    value: Callable[[Array], Array]


PLAIN = Arithmetic(0.0, 1.0, jnp.multiply, jnp.add, lambda x: x)
LOG = Arithmetic(-jnp.inf, 0.0, jnp.add, jnp.logaddexp, jnp.exp)


def linear_recurrence(
    a: Float[Array, "B T D"],
    b: Float[Array, "B T D"],
    state: Float[Array, "B D"],
    *,
    form: str = "associative",
    chunk_size: int = 32,
    mask: Bool[Array, "B T"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """h_t = a_t h_{t-1} + b_t for all t, and the last h, in float32 or wider.

    A step with mask False copies h through and outputs zeros; one with reset True starts from h = 0, exactly: not
    even an infinite h is seen after it.
    """
    if form not in FORMS:
        raise ValueError(unknown("form of a linear recurrence", form, FORMS))
    a, b, state = _prepare(PLAIN, a, b, state, chunk_size, mask, reset)
    hs, state = _divided(PLAIN, form, chunk_size, a, b, state, reset)
    return _output(hs, mask), state


def log_linear_recurrence(
    log_a: Float[Array, "B T D"],
    log_b: Float[Array, "B T D"],
    state: Float[Array, "B D"],
    *,
    chunk_size: int = 32,
    mask: Bool[Array, "B T"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """The form "log": as `linear_recurrence`, of exp(log_a) and exp(log_b); -inf stands for zero. h is no logarithm."""
    log_a, log_b, state = _prepare(LOG, log_a, log_b, state, chunk_size, mask, reset)
    hs, state = _divided(LOG, "log", chunk_size, log_a, log_b, state, reset)
    return _output(hs, mask), state


def _divided(kind, form, chunk_size, a, b, state, reset):
    """Every h and the last one, each device having its own rows, features and stretch of time."""
    lengths = zip(a.shape, (local.ROWS, ("seq",), ("tensor",)), strict=True)
    rows, time, features = (local.axes_for(length, axes) for length, axes in lengths)
    steps, ends = P(rows, time, features), P(rows, features)

    def run(a, b, state, reset):
        with jax.named_scope("time"):
            return _scan(a, b, state, reset) if form == "scan" else _chunks(kind, chunk_size, a, b, state)

    if time:
        run_one = partial(time_sharded.linear, run, kind)
    else:
        run_one = lambda *arguments: (hs := run(*arguments), hs[:, -1])  # noqa: E731
    return local.run(run_one, (a, b, state, reset), (steps, steps, ends, P(rows, time)), (steps, ends))


def _prepare(kind: Arithmetic, a, b, state, chunk_size, mask, reset):
    """Checked and wide; a masked step is h = 1 h + 0, and one with a reset has a = 0."""
    check_chunk(chunk_size)
    if a.ndim != 3 or b.shape != a.shape:
        raise ValueError(f"a and b must have one shape (B, T, D), not {a.shape} and {b.shape}")
    if state.shape != (a.shape[0], a.shape[2]):
        raise ValueError(f"state must have the shape {(a.shape[0], a.shape[2])}, not {state.shape}")
    dtype = jnp.result_type(a, b, state, jnp.float32)
    a, b, state = (x.astype(dtype) for x in (a, b, state))
    if mask is not None:
        a, b = jnp.where(mask[..., None], a, kind.one), jnp.where(mask[..., None], b, kind.zero)
    return (a if reset is None else jnp.where(reset[..., None], kind.zero, a)), b, state


def _output(hs: Array, mask: Array | None) -> Array:
    return hs if mask is None else jnp.where(mask[..., None], hs, 0)


def _scan(a, b, state, reset):
    def step(h, inputs):
        a, b, reset = inputs
        h = a * (h if reset is None else jnp.where(reset[:, None], 0, h)) + b
        return h, h

    steps = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (a, b, reset))
    return jnp.swapaxes(jax.lax.scan(step, state, steps)[1], 0, 1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunks(kind: Arithmetic, chunk_size: int, a: Array, b: Array, state: Array) -> Array:
    """Every h (B, T, D): A and B compose the steps of a chunk so far, h = A (the h before the chunk) + B."""
    (batch, T, D), N = a.shape, -(-a.shape[1] // chunk_size)
    L = -(-T // N)  # chunks as equal as can be; what is missing in the last one is filled with steps that do nothing

    def cut(x, nothing):
        x = jnp.pad(x, ((0, 0), (0, N * L - T), (0, 0)), constant_values=nothing)
        return jnp.moveaxis(x.reshape(batch, N, L, D), 2, 0)

    def compose(before, step):  # where a step forgets all, nothing of what is before it is looked at
        (A, B), (a, b) = before, step
        forgets = a == kind.zero
        A = jnp.where(forgets, kind.zero, kind.times(a, A))
        B = jnp.where(forgets, b, kind.plus(kind.times(a, B), b))
        return (A, B), (A, B)

    def advance(h, steps):
        A, B = steps
        return jnp.where(A == 0, B, A * h + B), h

    nothing = tuple(jnp.full((batch, N, D), x, a.dtype) for x in (kind.one, kind.zero))
    _, steps = jax.lax.scan(compose, nothing, (cut(a, kind.one), cut(b, kind.zero)))
    A, B = (kind.value(x) for x in steps)
    _, before = jax.lax.scan(advance, state, (jnp.swapaxes(A[-1], 0, 1), jnp.swapaxes(B[-1], 0, 1)))
    hs, _ = advance(jnp.swapaxes(before, 0, 1)[None], (A, B))
    return jnp.moveaxis(hs, 0, 2).reshape(batch, N * L, D)[:, :T]


def _chunks_forward(kind, chunk_size, a, b, state):
    hs = _chunks(kind, chunk_size, a, b, state)
    return hs, (a, b if kind is LOG else None, state, hs)


def _chunks_backward(kind, chunk_size, residuals, d_hs):
    a, b, state, hs = residuals
    a = kind.value(a)
    following = jnp.concatenate([a[:, 1:], jnp.zeros_like(a[:, :1])], axis=1)
    backwards = (jnp.flip(x, axis=1) for x in (following, d_hs))
    d_b = jnp.flip(_chunks(PLAIN, chunk_size, *backwards, jnp.zeros_like(state)), axis=1)
    d_a = d_b * jnp.concatenate([state[:, None], hs[:, :-1]], axis=1)
    d_state = a[:, 0] * d_b[:, 0]
    return (a * d_a, kind.value(b) * d_b, d_state) if kind is LOG else (d_a, d_b, d_state)


_chunks.defvjp(_chunks_forward, _chunks_backward)
