"""Cells made of cells: `Bidirectional` and `Stack`, under the same contract (a bidirectional one has no `step`)."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from ..kernels import local
from ..kernels.choice import target
from ..names import unknown
from ..regularizers import check_rates, dropout, split
from ..sharding import gathered
from .arguments import check_cell
from .base import Cell, masked

MERGES = {
    "concat": lambda a, b: jnp.concatenate([a, b], axis=-1),
    "sum": lambda a, b: a + b,
    "mean": lambda a, b: (a + b) / 2,
    "product": lambda a, b: a * b,
}


REMAT = {  # of each layer, the cheapest first
    "none": None,
    "weights": jax.checkpoint_policies.save_anything_except_these_names("gathered"),  # gathered again
    "elementwise": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # all but products with weights
    "layer": jax.checkpoint_policies.nothing_saveable,  # all but its inputs
}


UNROLLED = 8  # repeats of a stack's group: more would take too long to compile


class BidirectionalState(NamedTuple):
    forward: Any
    backward: Any


class Bidirectional(Cell):
    """One cell from the first step to the last, another from the last to the first (Schuster and Paliwal 1997).

    merge: "concat", "sum", "mean" or "product" of their outputs. Convolutional cells need their `space` for
    `initial_state`, here and in a Stack.

    Masks and resets hold for both, whatever the mask: each sequence is read backwards as if it were alone. The backward
    cell's state enters after the last step and leaves before the first.
    """

    def __init__(self, forward: Cell, backward: Cell, *, merge: str = "concat"):
        if merge not in MERGES:
            raise ValueError(unknown("merge", merge, MERGES))
        self.forward, self.backward, self.merge = forward, backward, merge

    def input_shape(self, xs: Any) -> tuple[int | str, ...]:
        """Both cells'."""
        return self.forward.input_shape(xs)

    def initial_state(self, batch_size: int) -> BidirectionalState:
        """Both cells' empty states."""
        return BidirectionalState(self.forward.initial_state(batch_size), self.backward.initial_state(batch_size))

    def __call__(
        self,
        xs: Float[Array, "B T ..."],
        state: BidirectionalState | None = None,
        mask: Bool[Array, "B T"] | None = None,
        reset: Bool[Array, "B T"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T ..."], BidirectionalState]:
        """xs (B, T, D_in) to the merged outputs (B, T, D) and both last states."""
        if state is not None and not isinstance(state, BidirectionalState):
            raise ValueError(f"state must be a BidirectionalState, not a {type(state).__name__}")
        forward, backward = (None, None) if state is None else state
        keys = split(key, 2)
        ys, forward = self.forward(xs, forward, mask, reset, key=keys[0])
        flip = lambda a: None if a is None else jnp.flip(a, axis=1)  # noqa: E731
        ends = None if reset is None else last_steps(mask, reset)
        zs, backward = self.backward(flip(xs), backward, flip(mask), flip(ends), key=keys[1])
        if ys.shape != zs.shape and self.merge != "concat":
            raise ValueError(f"merge={self.merge!r} needs outputs of one shape, not {ys.shape} and {zs.shape}")
        return MERGES[self.merge](ys, flip(zs)), BidirectionalState(forward, backward)

    @property
    def has_step(self) -> bool:
        """No: what comes later is needed."""
        return False


def last_steps(mask: Bool[Array, "B T"] | None, reset: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """The valid steps at which a sequence ends: a reset lies between it and the next valid step, or the row's end."""
    sequence = jnp.cumsum(reset, axis=1)
    if mask is None:
        following = jnp.concatenate([sequence[:, 1:], sequence[:, -1:]], axis=1)
        return following > sequence
    # the sequence of the next valid step, found from the end; where there is none, the last of the row
    at_valid = jnp.where(mask, sequence, jnp.iinfo(sequence.dtype).max)
    following = jnp.minimum(jax.lax.cummin(at_valid, axis=1, reverse=True), sequence[:, -1:])
    following = jnp.concatenate([following[:, 1:], sequence[:, -1:]], axis=1)
    return mask & (following > sequence)


class Stack(Cell):
    """Layers one after another, with residual connections and dropout between them if asked for.

    pattern: one kind a layer, equal kinds having parameters of equal shapes; the group that repeats is then stored
    stacked and run by one `lax.scan`, compiled once, and its states have a leading axis of repeats. On one CPU device
    up to `UNROLLED` repeats are compiled each: there the loop's copies of what the backward pass needs cost more.
    """

    def __init__(
        self,
        layers: Sequence[Cell],
        *,
        pattern: Sequence[str] | None = None,
        residual: bool = False,
        dropout: float = 0.0,
        remat: str = "none",
    ):
        """residual: x + layer(x); dropout: of each layer's output but the last's, before it is added to x.

        remat: what the backward pass of a layer computes again (`REMAT`).
        """
        if remat not in REMAT:
            raise ValueError(unknown("remat of a stack", remat, REMAT))
        self.remat = remat
        if not isinstance(layers, Sequence | nnx.List) or not layers:
            what = "empty" if isinstance(layers, Sequence | nnx.List) else f"a {type(layers).__name__}"
            raise ValueError(f"layers is {what}: a list of at least one layer is needed")
        for n, layer in enumerate(layers):
            check_cell(f"layer {n}", layer)
        layers, pattern = list(layers), None if pattern is None else tuple(pattern)
        if pattern is not None and len(pattern) != len(layers):
            raise ValueError(f"pattern names {len(pattern)} kinds for {len(layers)} layers")
        check_rates(dropout=dropout)
        if pattern is not None and dropout:
            raise ValueError("dropout between layers is for a stack without a pattern; here the layers have their own")
        self.residual, self.dropout = residual, dropout
        self.period = smallest_period(pattern) if pattern else len(layers)
        self.repeats = len(layers) // self.period
        groups = [nnx.List(layers[n * self.period : (n + 1) * self.period]) for n in range(self.repeats)]
        if self.repeats == 1:
            self.layers = groups[0]
        else:
            graphdef = nnx.graphdef(groups[0])
            shapes = [jax.tree.map(jnp.shape, nnx.state(group)) for group in groups]
            if any(nnx.graphdef(group) != graphdef for group in groups) or any(s != shapes[0] for s in shapes):
                raise ValueError("pattern: layers of one kind must be built alike, with equal options and shapes")
            params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.state(group) for group in groups))
            self.layers = nnx.merge(graphdef, params)

    @property
    def has_step(self) -> bool:
        """Whether every layer has one."""
        return all(layer.has_step for layer in self.layers)

    def input_shape(self, xs: Any) -> tuple[int | str, ...]:
        """The first layer's."""
        return self.layers[0].input_shape(xs)

    def initial_state(self, batch_size: int) -> tuple:
        """One state a layer of the repeating group, with a leading axis of repeats where there are several."""
        states = tuple(layer.initial_state(batch_size) for layer in self.layers)
        if self.repeats == 1:
            return states
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (self.repeats, *leaf.shape)), states)

    def call(self, layer, xs, state, mask, reset, key):
        """One layer with its weights gathered, and what `remat` says not kept for its backward pass."""
        if isinstance(layer, Stack) or (self.remat == "none" and not local.sizes()):
            return layer(xs, state, mask, reset, key=key)
        graphdef, params = nnx.split(layer)

        def apply(params, xs, state, key):
            return gathered(nnx.merge(graphdef, params))(local.activations(xs), state, mask, reset, key=key)

        if self.remat != "none":
            apply = jax.checkpoint(apply, policy=REMAT[self.remat])
        return apply(params, xs, state, key)

    def __call__(
        self,
        xs: Float[Array, "B T ..."],
        state: tuple | None = None,
        mask: Bool[Array, "B T"] | None = None,
        reset: Bool[Array, "B T"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T ..."], tuple]:
        """xs (B, T, D_in) to outputs (B, T, D) and the last states."""
        if state is not None and (type(state) is not tuple or len(state) != self.period):
            raise ValueError(
                f"state must be a tuple of {self.period} states, one a layer, not a {type(state).__name__}"
            )
        if self.repeats > 1 and any(jnp.shape(leaf)[:1] != (self.repeats,) for leaf in jax.tree.leaves(state)):
            raise ValueError(f"state must have a leading axis of the {self.repeats} repeats of this stack's pattern")

        def run(layers, xs, states, key):
            keys = split(key, 2 * self.period)
            new = []
            for n, layer in enumerate(layers):
                try:
                    ys, new_state = self.call(layer, xs, None if states is None else states[n], mask, reset, keys[n])
                except ValueError as error:
                    raise ValueError(f"layer {n}: {error}") from error
                if self.residual and ys.shape != xs.shape:
                    raise ValueError(
                        f"residual=True needs layers of equal widths; layer {n} maps {xs.shape} to {ys.shape}"
                    )
                if n + 1 < self.period:
                    ys = dropout(ys, self.dropout, keys[self.period + n])
                xs = masked(xs + ys, mask) if self.residual else ys
                new.append(new_state)
            return xs, tuple(new)

        if self.repeats == 1:
            return run(self.layers, xs, state, key)
        graphdef, params = nnx.split(self.layers)
        keys = None if key is None else split(key, self.repeats)

        def body(xs, inputs):
            params, states, key = inputs
            return run(nnx.merge(graphdef, params), xs, states, key)

        inputs = (params, state, keys)
        first = jax.tree.map(lambda a: a[0], inputs)
        dtype = jax.eval_shape(body, xs, first)[0].dtype  # layers may compute in another dtype than the inputs'
        unrolled = on_one_cpu() and self.repeats <= UNROLLED
        return jax.lax.scan(body, xs.astype(dtype), inputs, unroll=self.repeats if unrolled else 1)


def on_one_cpu() -> bool:
    """Whether what is traced now is for one CPU device."""
    here = target()
    return here.platform == "cpu" and here.devices == 1


def layers_apart(model: nnx.Module) -> nnx.Module:
    """On one CPU device the same model with the weights of each layer in arrays of their own, elsewhere the model.

    For loops that read all weights again and again: a slice of stacked ones would be copied each time. The states of
    a stack then have no axis of repeats. Outside of `jax.jit` the arrays are views, where they begin as JAX wants it
    (at multiples of 64 bytes), and else copies. All layers are compiled, however many: a step is little to compile, and
    a model of many layers has the more to copy.
    """
    if not on_one_cpu():
        return model

    def part(a, n):
        if isinstance(a, jax.core.Tracer):
            return a[n]
        return jax.device_put(np.asarray(a)[n], *a.devices(), may_alias=True)

    model = nnx.merge(*nnx.split(model))
    while stacks := [each for each in nnx.iter_graph(model) if isinstance(each[1], Stack) and each[1].repeats > 1]:
        _, stack = min(stacks, key=lambda each: len(each[0]))  # the weights of what is inside are of its repeats first
        graphdef, params = nnx.split(stack.layers)
        groups = [nnx.merge(graphdef, jax.tree.map(partial(part, n=n), params)) for n in range(stack.repeats)]
        stack.layers = nnx.List([layer for group in groups for layer in group])
        stack.period, stack.repeats = len(stack.layers), 1
    return model


def smallest_period(pattern: tuple[str, ...]) -> int:
    """The length of the shortest group whose repetition is the pattern."""
    n = len(pattern)
    return next(p for p in range(1, n + 1) if n % p == 0 and pattern == pattern[:p] * (n // p))
