"""The fused form on a CPU, with the rows of a batch last: a step's arrays are (D, B), its gates (G, D, B).

R h is then a product with R on the left, which reads R as it lies; with R on the right XLA brings all of it into
another order at each step, which takes about as long as the product with a few rows. The same holds for W x, so that
the loop over time does that too, and forward alone writes no share of all steps. It pays from two full vectors of the
processor on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .choice import target
from .rules import Dense, Gates, Given, Maps, Rule, Spec, State, Weights

VECTOR = 16  # float32 numbers of AVX-512
LEAST_ROWS = 2 * VECTOR
LONGEST_CHUNK = 16  # steps whose rule is linearised at once; nothing else needs a chunk where there is no remat


@dataclass(frozen=True)
class FeatureMajor(Maps):
    """The maps of `Dense`, with the same weights."""

    rows, gates, inputs_in_loop = -1, -3, True

    def by_step(self, xs: Float[Array, "B T ..."]) -> Float[Array, "T ... B"]:
        return jnp.moveaxis(xs, 0, -1)

    def by_row(self, ys: Float[Array, "T ... B"]) -> Float[Array, "B T ..."]:
        return jnp.moveaxis(ys, -1, 0)

    def product(self, h: Float[Array, "*M D B"], R: Float[Array, "N E G F"]) -> Float[Array, "*M G NF B"]:
        """h R by head."""
        (N, E, G, F), (*lead, _, B) = R.shape, h.shape
        r = jnp.einsum("...neb,negf->...gnfb", h.reshape(*lead, N, E, B), R)
        return r.reshape(*lead, G, N * F, B)

    def push(self, R: Float[Array, "N E G F"]) -> Callable[[Float[Array, "D B"]], Float[Array, "G NF B"]]:
        """With R turned before the loop."""
        N, E, G, F = R.shape
        turned = jnp.swapaxes(R.reshape(N, E, G * F), 1, 2)

        def run(h):
            r = jnp.matmul(turned, h.reshape(N, E, -1)).reshape(N, G, F, -1)
            return jnp.swapaxes(r, 0, 1).reshape(G, N * F, -1)

        return run

    def pull(self, R: Float[Array, "N E G F"], like: Array | None) -> Callable[[Gates], Float[Array, "D B"]]:
        N, E, G, F = R.shape

        def run(d_r):
            d_r = jnp.swapaxes(self.stack(d_r).reshape(G, N, F, -1), 0, 1).reshape(N, G * F, -1)
            return jnp.matmul(R.reshape(N, E, G * F), d_r).reshape(N * E, -1)

        return run

    def inputs(self, spec: Spec, xs: Float[Array, "B T ..."], weights: Weights, dtype: DTypeLike):
        b = 0.0 if weights.b is None else weights.b[..., None].astype(dtype)
        if weights.W is None:
            return self.by_step(xs).astype(dtype), lambda x: x + b
        push = spec.push(weights.W[None])

        def gates(t):
            x = jax.lax.dynamic_index_in_dim(xs, t, 1, keepdims=False)
            return push(x.T.astype(spec.dtype)) + b

        return jnp.arange(xs.shape[1]), gates

    def pull_step(self, spec: Spec, weights: Weights):
        return (lambda dx: None) if weights.W is None else spec.pull(weights.W[None], None)

    def pull_inputs(self, spec: Spec, xs: Float[Array, "B T ..."], weights: Weights, dx: Float[Array, "T G D B"], d_xs):
        d_b = None if weights.b is None else jnp.sum(dx, axis=(0, -1))
        d_W = None
        if weights.W is None:
            d_xs = dx
        else:
            x = self.by_step(xs).astype(spec.dtype)
            d_W = jax.vjp(lambda W: spec.product(x, W[None]), weights.W)[1](dx)[0]
        return self.by_row(d_xs).astype(xs.dtype), d_W, d_b

    def stack(self, gates: Gates) -> Array:
        *lead, D, B = gates[0].shape
        return jnp.concatenate(gates, axis=-2).reshape(*lead, len(gates), D, B)


@dataclass(frozen=True)
class Turned:
    """A rule for arrays with the rows last."""

    rule: Rule

    def __call__(self, x, r, state, params, *noise):
        return over_rows(self.rule, x, r, state, params, *noise)

    def inner(self, x, r, state, params):
        """What S multiplies."""
        return over_rows(self.rule.inner, x, r, state, params)


def over_rows(function: Callable, x: Gates, r: Gates, state: State, params: Any, *noise: Array) -> Any:
    """A function of rows first, of arrays with the rows last; parameters have an axis of one row in front.

    They are broadcast, as vmap would move the rows to the front beside an operand without them.
    """
    params = jax.tree.map(lambda p: jnp.broadcast_to(p[0][..., None], (*p.shape[1:], state.h.shape[-1])), params)
    return jax.vmap(function, in_axes=-1, out_axes=-1)(x, r, state, params, *noise)


def serves(spec: Spec, weights: Weights, state: State) -> bool:
    """Whether the rows are better last: dense maps in one dtype on a CPU, and whole vectors of rows."""
    return (
        target().platform == "cpu"
        and isinstance(spec.maps, Dense)
        and spec.dtype == state.h.dtype
        and len(state.h) >= LEAST_ROWS
        and len(state.h) % VECTOR == 0
        and all(a.ndim == 2 for a in jax.tree.leaves(state))
        and all(jnp.ndim(a) > 1 and len(a) == 1 for a in jax.tree.leaves(weights.params))
    )


def turned(spec: Spec, state: State, given: Given, scale: Array | None) -> tuple[Spec, State, Given, Array | None]:
    """All that has rows, but the inputs."""
    last = lambda a: jnp.moveaxis(a, 0, -1)  # noqa: E731
    flags = jax.tree.map(lambda a: a[:, None], given._replace(noise=()))
    given = flags._replace(noise=jax.tree.map(lambda a: jnp.moveaxis(a, 1, -1), given.noise))
    spec = spec._replace(rule=Turned(spec.rule), maps=FeatureMajor())
    return spec, jax.tree.map(last, state), given, None if scale is None else last(scale)
