"""Linear memories with time divided over the mesh axis `seq`: each device runs its own stretch from the right state.

    1. every device runs its stretch from the empty memory and keeps the end alone: what the stretch does to a memory
    2. the stretches before one's own are composed: the state at the start of one's stretch
    3. every device runs its stretch again, from that state, for the outputs

An mLSTM's stretch takes the memory (C, n, m) to, with F the sum of its log f and (C', n', m') its end from nothing,

    m'' = max(m + F, m');   C'' = exp(m + F - m'') C + exp(m' - m'') C';   n'' alike   (m'' = m without a stabiliser)

and one of a linear recurrence takes h to A h + B. Both compose, and a stretch with a reset in it hands on its own end
alone. The ends of up to `FEW` devices are gathered at once; of more, they are composed in log2 rounds of `ppermute`.
Nothing is exchanged inside the loops over time; what is exchanged does not grow with T.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

FEW = 16  # devices along time whose states are gathered at once
AXIS = "seq"


class Stretch(NamedTuple):
    """What a stretch of time does to an mLSTM's memory."""

    C: Float[Array, "B H K V"]  # its end from the empty memory, in units of exp(m)
    n: Float[Array, "B H K"]
    m: Float[Array, "B H"]
    F: Float[Array, "B H"]  # the sum of log f
    emptied: Bool[Array, "B H"]  # a reset lies in it


def _spread(x: Array, like: Array) -> Array:
    """x (B, H) as an array that multiplies `like` (B, H, ...)."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))


def compose(first: Stretch, then: Stretch, stabilise: bool, normalize: bool = True) -> Stretch:
    """What both do, one after the other; without a normaliser n is left alone."""
    m = jnp.maximum(first.m + then.F, then.m) if stabilise else first.m
    old, new = jnp.exp(first.m + then.F - m), jnp.exp(then.m - m)
    C, n = (_spread(old, a) * a + _spread(new, b) * b for a, b in ((first.C, then.C), (first.n, then.n)))
    joined = Stretch(C, n, m, first.F + then.F, first.emptied)
    joined = jax.tree.map(lambda a, b: jnp.where(_spread(then.emptied, a), a, b), then, joined)
    return joined if normalize else joined._replace(n=first.n)


def mlstm(
    run: Callable[..., tuple[Array, Any]], inputs: Any, state: Any, *, stabilise: bool, normalize: bool
) -> tuple[Array, Any]:
    """run(inputs, state) -> (h, last state) on each device's stretch; the last state is the last device's, on all."""
    lowest = jnp.finfo(state.m.dtype).min / 8 if stabilise else 0.0  # log of nothing, finite so that 0 times it is 0
    empty = jax.tree.map(jnp.zeros_like, state)._replace(m=jnp.full_like(state.m, lowest))
    log_f, reset = inputs.log_f, inputs.reset
    if reset is None:
        emptied = jnp.zeros(log_f.shape[:2], bool)
    else:
        emptied = jnp.broadcast_to(reset.any(axis=1)[:, None], log_f.shape[:2])
    nothing = Stretch(*empty, jnp.zeros_like(state.m), jnp.zeros_like(emptied))
    own = Stretch(*run(inputs, empty)[1], log_f.sum(axis=2), emptied)
    join = partial(compose, stabilise=stabilise, normalize=normalize)
    before = join(Stretch(*state, jnp.zeros_like(state.m), jnp.zeros_like(emptied)), exclusive(join, own, nothing))
    h, state = run(inputs, type(state)(*before[:3]))
    return h, last(state)


def linear(run: Callable[..., Array], kind: Any, a: Array, b: Array, state: Array, reset: Array | None):
    """Every h of each device's stretch (run(a, b, state, reset) -> hs) and the last device's last h."""

    def join(first, then):
        (A, B), (A_then, B_then) = first, then
        forgets = A_then == 0
        return jnp.where(forgets, 0, A * A_then), jnp.where(forgets, B_then, A_then * B + B_then)

    zero, one = jnp.zeros_like(state), jnp.ones_like(state)
    factor = run(a, jnp.full_like(b, kind.zero), one, reset)[:, -1]
    _, before = join((one, state), exclusive(join, (factor, run(a, b, zero, reset)[:, -1]), (one, zero)))
    hs = run(a, b, before, reset)
    return hs, last(hs[:, -1])


def exclusive(join: Callable[[Any, Any], Any], own: Any, nothing: Any) -> Any:
    """What the stretches of all devices before this one do; `nothing` is what none does."""
    size, index = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)

    def where(condition, new, old):
        return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)

    if size <= FEW:
        stretches = jax.lax.all_gather(own, AXIS)

        def body(before, inputs):
            n, stretch = inputs
            return join(before, where(n < index, stretch, nothing)), None

        return jax.lax.scan(body, nothing, (jnp.arange(size - 1), jax.tree.map(lambda a: a[:-1], stretches)))[0]

    def received(value, distance):  # from the device that many places before
        moved = jax.lax.ppermute(value, AXIS, [(n, n + distance) for n in range(size - distance)])
        return where(index >= distance, moved, nothing)

    total, distance = received(own, 1), 1
    while distance < size:
        total, distance = join(received(total, distance), total), 2 * distance
    return total


def last(value: Any) -> Any:
    """The last device's value, on all."""
    here = jax.lax.axis_index(AXIS) == jax.lax.axis_size(AXIS) - 1
    return jax.tree.map(lambda a: jax.lax.psum(jnp.where(here, a, 0), AXIS), value)
