"""What a run does about a bad step: a loss or gradient that is not finite, or a loss far above its running mean."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

ON_BAD_STEP = ("stop", "skip", "rollback")
SETTLED = 20  # good steps before a loss can be a spike
DECAY = 0.98  # of the running mean of the loss


class Guard(NamedTuple):
    """What the judgement of a step needs to remember; part of the train state, so that a resumed run judges alike."""

    bad: Int[Array, ""]  # steps skipped, or rolled back from, so far
    in_a_row: Int[Array, ""]  # of them, since the last good step
    moved_on: Int[Array, ""]  # batches that rollbacks passed over: the next one is batch `step` + this
    good: Int[Array, ""]
    loss: Float[Array, ""]  # decaying sum of the good steps' losses


def initial(on_bad_step: str, spike: float) -> Guard | tuple:
    """At step 0; () where a run stops at what is not finite, and so has nothing to remember."""
    if on_bad_step == "stop" and not spike:
        return ()
    zero = jnp.zeros((), jnp.int32)
    return Guard(zero, zero, zero, zero, jnp.zeros((), jnp.float32))


def batch_number(guard: Any, step: Int[ArrayLike, ""]) -> Int[ArrayLike, ""]:
    """Of the batch that update number `step` is made of."""
    return step + guard.moved_on if guard else step


def judge(
    guard: Any, loss: Float[Array, ""], finite: Bool[Array, ""], spike: float
) -> tuple[Bool[Array, ""], Any, Any]:
    """Whether the step is good, and the guard after it if it was good, and if it was bad."""
    if not guard:
        return finite, guard, guard
    loss = loss.astype(jnp.float32)
    mean = guard.loss / jnp.maximum(1 - DECAY ** guard.good.astype(jnp.float32), 1e-6)
    good = finite
    if spike:
        good = finite & ((guard.good < SETTLED) | (loss <= spike * mean))
    after = guard._replace(
        in_a_row=jnp.zeros_like(guard.in_a_row),
        good=guard.good + 1,
        loss=DECAY * guard.loss + (1 - DECAY) * jnp.where(good, loss, 0),
    )
    return good, after, guard._replace(bad=guard.bad + 1, in_a_row=guard.in_a_row + 1)
