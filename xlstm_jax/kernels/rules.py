"""A cell as a rule, and what every form of it shares: the linear maps, the weights, the rule on one step.

A rule is the elementwise heart of a cell in its paper's symbols,

    rule(x, r, state, params) -> (state, output)

with x the input's share and r the recurrent share of the pre-activations, each a tuple of one (B, D) array a gate, and
a NamedTuple state that has a field `h` (B, D), the vector that the recurrent matrix multiplies; the output is (B, D).
It treats each row on its own and counts axes from the last, as it may be handed one row (D,). A rule that needs a
second product within a step (a reset gate before the product, a projection after the output gate) is an object with a
method `inner(x, r, state, params)`: its value times S is appended to r. The linear maps of the inputs and of h are
`Dense` or other `Maps` (a convolution), so that a gate may have any shape (B, ..., D).

The maps also say in which order the axes of a step's arrays lie: rows first, or last (`feature_major.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from .choice import target

State = Any  # a NamedTuple of arrays (B, ...) with a field h
Gates = tuple[Array, ...]  # (B, ..., D) each
Rule = Callable[..., tuple[State, Array]]


class Maps:
    """The linear maps of a cell, `project` and `product`, and the order of the axes of a step's arrays."""

    rows = 0  # the axis of the batch in a step's arrays
    gates = -2  # the axis that `product` has and h has not
    inputs_in_loop = False  # whether `inputs` leaves the products with W to the loop, whose gates are then one array

    def by_step(self, xs: Float[Array, "B T ..."]) -> Float[Array, "T ..."]:
        """Time first, and then a step's arrays."""
        return jnp.swapaxes(xs, 0, 1)

    def by_row(self, ys: Float[Array, "T ..."]) -> Float[Array, "B T ..."]:
        """The inverse of `by_step`."""
        return jnp.swapaxes(ys, 0, 1)

    def push(self, R: Array) -> Callable[[Array], Array]:
        """h -> `product(h, R)`, for a loop: what can be done to R before it is done here."""
        return lambda h: self.product(h, R)

    def pull(self, R: Array, like: Array) -> Callable[[Gates], Array]:
        """The transposed map of h -> `product(h, R)`, for an h like this, from one array a gate."""
        return lambda d_r: jax.linear_transpose(lambda h: self.product(h, R), like)(self.stack(d_r))[0]

    def inputs(self, spec: "Spec", xs: Float[Array, "B T ..."], weights: "Weights", dtype: DTypeLike):
        """What a loop over time reads a step of, and how that becomes the input's share of the gates."""
        return self.unstack(project(spec, xs, weights, dtype)), lambda x: x

    def pull_step(self, spec: "Spec", weights: "Weights") -> Callable[[Gates], Any]:
        """What the loop does to the gradients of a step's gates on the way to those of the inputs."""
        return lambda dx: None

    def pull_inputs(self, spec: "Spec", xs: Float[Array, "B T ..."], weights: "Weights", dx: Array, d_xs: Any):
        """The gradients of xs, W and b from that of all gates and what the loop made of it."""
        run = lambda xs, W, b: project(spec, xs, weights._replace(W=W, b=b), dx.dtype)  # noqa: E731
        return jax.vjp(run, xs, weights.W, weights.b)[1](dx)

    def copies(self, kernel: Array) -> int:
        """How many copies of what a kernel is multiplied with its gradient takes."""
        return 0

    def unstack(self, gates: Array) -> Gates:
        """One array a gate.

        Loops over time take their steps from one array a gate: where a step is cut out of an array of all gates and
        then into gates, XLA does not vectorise the rule on a CPU (an LSTM's forward loop took 1.8 to 2.8 times as
        long).
        """
        return jnp.unstack(gates, axis=self.gates)

    def stack(self, gates: Gates) -> Array:
        """The inverse of `unstack`."""
        return stack(gates)


@dataclass(frozen=True)
class Dense(Maps):
    """The linear maps of a dense cell: W (D_in, G, D), and R (N, E, G, F), block-diagonal over N heads."""

    def project(self, xs: Float[Array, "T B D_in"], W: Array, dtype: DTypeLike) -> Float[Array, "T B G D"]:
        """The input's share of all gates of all steps, one product, summed in `dtype`."""
        T, B, D_in = xs.shape
        _, G, D = W.shape
        x = jnp.matmul(xs.reshape(-1, D_in), W.reshape(D_in, G * D), preferred_element_type=dtype)
        return x.reshape(T, B, G, D)

    def product(self, h: Float[Array, "*M D"], R: Float[Array, "N E G F"]) -> Float[Array, "*M G NF"]:
        """h R by head: in R's dtype, summed in h's."""
        (N, E, G, F), lead = R.shape, h.shape[:-1]
        if N == 1:
            r = jnp.matmul(h.astype(R.dtype), R.reshape(E, G * F), preferred_element_type=h.dtype)
            return r.reshape(*lead, G, F)
        r = jnp.matmul(by_head(h.astype(R.dtype), N), R.reshape(N, E, G * F), preferred_element_type=h.dtype)
        return jnp.moveaxis(r.reshape(N, *lead, G, F), 0, -2).reshape(*lead, G, N * F)

    def pull(self, R: Float[Array, "N E G F"], like: Float[Array, "*M D"]) -> Callable[[Gates], Array]:
        """With R turned before the loop, as XLA on a CPU would turn it at each step."""
        N, E, G, F = R.shape
        turned = jnp.swapaxes(R.reshape(N, E, G * F), 1, 2)

        def run(d_r):
            d_r = stack(tuple(by_head(d, N) for d in d_r)).reshape(N, -1, G * F).astype(R.dtype)
            d_h = jnp.matmul(d_r, turned, preferred_element_type=like.dtype)
            return jnp.swapaxes(d_h, 0, 1).reshape(like.shape)

        return run


DENSE = Dense()


def by_head(a: Float[Array, "*M D"], N: int) -> Float[Array, "N M E"]:
    """Heads first: products with one matrix a head are then batched, and XLA does not turn R at every step."""
    return jnp.swapaxes(a.reshape(-1, N, a.shape[-1] // N), 0, 1)


class Weights(NamedTuple):
    """R of h, S of the rule's inner value or None, W of the inputs or None if they are gates, b (G, D) or None; the
    rule's own."""

    R: Array
    S: Array | None
    W: Array | None
    b: Array | None
    params: Any


class Given(NamedTuple):
    """What is not differentiated, time-major (T, B, ...); None where there is none, so that it costs nothing.

    noise: arrays that the rule gets after its params, one entry a step.
    """

    mask: Array | None
    reset: Array | None
    noise: tuple[Array, ...]


class Spec(NamedTuple):
    """What is known when a program is traced."""

    rule: Rule
    maps: Any
    dtype: DTypeLike
    remat: bool
    reverse: bool

    def product(self, h: Array, R: Array) -> Array:
        """h R in the compute dtype; the cast is here so that gradients of R are summed in R's own dtype."""
        return self.maps.product(h, R.astype(self.dtype))

    def push(self, R: Array) -> Callable[[Array], Array]:
        """The same for a loop; its gradient would be summed in the compute dtype."""
        return self.maps.push(R.astype(self.dtype))

    def pull(self, R: Array, like: Array | None) -> Callable[[Gates], Array]:
        """Gradients of the shares, one array a gate, to that of an h like this."""
        return self.maps.pull(R.astype(self.dtype), like)


def project(spec: Spec, xs: Float[Array, "B T ..."], weights: Weights, dtype: DTypeLike) -> Float[Array, "T B ..."]:
    """The input's share of all gates of all steps, time-major."""
    x = jnp.swapaxes(xs, 0, 1)  # before the product: the inputs are smaller than the gates
    if weights.W is None:
        x = x.astype(dtype)
    else:
        x = spec.maps.project(x.astype(spec.dtype), weights.W.astype(spec.dtype), dtype)
    if weights.b is None:
        return x
    return x + weights.b.reshape((1,) * (x.ndim - 2) + weights.b.shape).astype(dtype)


def stack(gates: Gates) -> Array:
    """All gates along the last axis but one; on a CPU written one by one, as XLA does not vectorise a concatenation."""
    if target().platform != "cpu":
        return jnp.stack(gates, axis=-2)
    stacked = jnp.empty((*gates[0].shape[:-1], len(gates), gates[0].shape[-1]), gates[0].dtype)
    for n, gate in enumerate(gates):
        stacked = stacked.at[..., n, :].set(gate)
    return stacked


def select(keep: Bool[Array, "*M"] | None, new: State, old: State) -> State:
    """new where `keep`, old elsewhere, for every leaf (*M, ...); `keep` None keeps all."""
    if keep is None:
        return new
    return jax.tree.map(lambda n, o: jnp.where(keep.reshape(keep.shape + (1,) * (n.ndim - keep.ndim)), n, o), new, old)


def emptied(reset: Bool[Array, "*M"] | None, state: State) -> State:
    """The state with the rows that `reset` names set to zero: nothing of them remains, in values and gradients."""
    return state if reset is None else select(~reset, state, jax.tree.map(jnp.zeros_like, state))


def scaled(h: Array, scale: Array | None) -> Array:
    """h (*M, B, ..., D) times a scale (B, ..., D), if there is one."""
    return h if scale is None else h * jnp.broadcast_to(scale, h.shape)


def inner(spec: Spec, x: Gates, r: Gates, state: State, params: Any, scale: Array | None) -> Array:
    """What S multiplies; the rule sees h as the products do."""
    return spec.rule.inner(x, r, state._replace(h=scaled(state.h, scale)), params)


def masked_rule(spec: Spec, x: Gates, r: Gates, state: State, params: Any, given: Given) -> tuple[State, Array]:
    """The rule on one step: a False mask copies the state through and outputs zeros."""
    new, y = spec.rule(x, r, state, params, *given.noise)
    return select(given.mask, new, state), select(given.mask, y, jnp.zeros_like(y))


def step(
    spec: Spec,
    products: tuple[Callable, Callable | None],
    weights: Weights,
    state: State,
    x: Gates,
    given: Given,
    scale,
) -> tuple[tuple[Gates, Gates], State, Array]:
    """Both recurrent shares of the gates (the second empty without S), the next state and the output.

    products: h to h R, and the inner value to its product with S if there is one.
    """
    r, u = spec.maps.unstack(products[0](scaled(state.h, scale))), ()
    if weights.S is not None:
        u = spec.maps.unstack(products[1](inner(spec, x, r, state, weights.params, scale)))
    return (r, u), *masked_rule(spec, x, (*r, *u), state, weights.params, given)
