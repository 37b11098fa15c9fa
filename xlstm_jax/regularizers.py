"""Regularisers of recurrent layers. Whatever is random is drawn once, outside the loop over time; no key, no dropout.

dropout          each entry on its own
locked_dropout   the same entries at every step: variational dropout (Gal and Ghahramani 2016, arXiv:1512.05287)
Zoneout          units that keep their old state (Krueger et al. 2017, arXiv:1606.01305), around any rule
activation_l2, temporal_l2   AR and TAR (Merity et al. 2017, arXiv:1708.01009, section 4.6), to be added to a loss

Weight drop (DropConnect on the recurrent matrix, the same reference, section 2) is `dropout` of the matrix itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


def check_rates(**rates: float) -> None:
    """Raises ValueError for a rate outside [0, 1)."""
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{name} is {rate}: it must lie in [0, 1)")


def check_key(key: Any) -> None:
    """None, or one key of the kind that says what it is."""
    dtype = getattr(key, "dtype", None)
    if key is not None and not (dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and key.shape == ()):
        what = f"a {type(key).__name__}" if dtype is None else f"{dtype} {key.shape}"
        raise ValueError(f"key must be one key, such as jax.random.key(0), not {what}")


def split(key: Any, count: int) -> Key[Array, " N"] | list[None]:
    """As many keys, or as many times None."""
    check_key(key)
    return [None] * count if key is None else jax.random.split(key, count)


def dropout(x: Array, rate: float, key: Key[Array, ""] | None) -> Array:
    """Zeroes a share `rate` of x and scales the rest; without a key nothing is dropped."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def locked_scale(shape: tuple[int, ...], rate: float, key: Key[Array, ""] | None, dtype=jnp.float32) -> Array | None:
    """0 or 1 / (1 - rate) an entry, or None where nothing is dropped."""
    return None if key is None or rate == 0 else dropout(jnp.ones(shape, dtype), rate, key)


def locked_dropout(xs: Float[Array, "B T ..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "B T ..."]:
    """Dropout with one draw a row and feature for all steps."""
    scale = locked_scale((xs.shape[0], 1, *xs.shape[2:]), rate, key, xs.dtype)
    return xs if scale is None else xs * scale


@dataclass(frozen=True)
class Zoneout:
    """A rule whose units keep their old value with the given rate a state field; without noise, its expectation.

    fields: (name, rate) pairs. The noise is one bool array (B, ..., D) a field, True where the old value stays. The
    output is the state's h, so the rule's own output must be its h.
    """

    rule: Callable
    fields: tuple[tuple[str, float], ...]

    @property
    def inner(self) -> Callable:
        return self.rule.inner

    def __call__(self, x, r, state, params, *noise) -> tuple[Any, Array]:
        new, _ = self.rule(x, r, state, params)
        for n, (field, rate) in enumerate(self.fields):
            a, b = getattr(state, field), getattr(new, field)
            kept = jnp.where(noise[n], a, b) if noise else rate * a + (1 - rate) * b
            new = new._replace(**{field: kept})
        return new, new.h

    def noise(self, state: Any, T: int, key: Key[Array, ""]) -> tuple[Bool[Array, "B T ..."], ...]:
        """The draws of all T steps, each of the shape of its field."""
        keys = jax.random.split(key, len(self.fields))
        shapes = [jnp.shape(getattr(state, field)) for field, _ in self.fields]
        return tuple(
            jax.random.bernoulli(k, rate, (shape[0], T, *shape[1:]))
            for k, shape, (_, rate) in zip(keys, shapes, self.fields)
        )


def activation_l2(
    ys: Float[Array, "B T D"],
    mask: Bool[Array, "B T"] | None = None,
    count: Int[Array, ""] | int | None = None,
) -> Float[Array, ""]:
    """Mean square of the outputs over the valid steps (AR), to be scaled by alpha.

    count: what to divide by, if it is not the number of these steps: that of the batch which this is a part of.
    """
    return mean_square(ys, jnp.ones(ys.shape[:2], bool) if mask is None else mask, count)


def temporal_l2(
    ys: Float[Array, "B T D"],
    mask: Bool[Array, "B T"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    count: Int[Array, ""] | int | None = None,
) -> Float[Array, ""]:
    """Mean square of h_t - h_{t-1} (TAR), to be scaled by beta, over `neighbours`; count: as for `activation_l2`."""
    return mean_square(ys[:, 1:] - ys[:, :-1], neighbours(ys.shape[:2], mask, reset), count)


def neighbours(
    shape: tuple[int, int], mask: Bool[Array, "B T"] | None, reset: Bool[Array, "B T"] | None
) -> Bool[Array, "B S"]:
    """Whether steps t and t + 1 are valid steps of one sequence: a step and the next valid one beyond a gap are not."""
    valid = jnp.ones(shape, bool) if mask is None else mask
    pairs = valid[:, 1:] & valid[:, :-1]
    return pairs if reset is None else pairs & ~reset[:, 1:]


def mean_square(
    x: Float[Array, "B T D"], valid: Bool[Array, "B T"], count: Int[Array, ""] | int | None = None
) -> Float[Array, ""]:
    """Over the valid entries, or their sum over `count`; 0 if there is none."""
    total = jnp.sum(jnp.where(valid[..., None], x, 0) ** 2)
    return total / (jnp.maximum(valid.sum() if count is None else count, 1) * x.shape[-1])
