"""Loops over time on each device's own rows, heads and stretch of time: no device waits for another inside them.

A mesh in context (`jax.set_mesh(mesh)`) with the axes of `AXES` divides what is traced under it; without one nothing
here does anything. Loops run under `jax.shard_map`, their weights entering whole, so that they are gathered once before
the loop and their gradients summed once after it.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped

AXES = ("runs", "data", "fsdp", "tensor", "seq")
ROWS = ("data", "fsdp")  # the axes of the mesh that the rows of a batch are divided over


def sizes() -> dict[str, int]:
    """The mesh axes to divide over, by name; empty where there is no mesh, or inside a loop that is already local."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(ROWS) <= set(mesh.shape):
        return {}
    left = {axis: mesh.shape[axis] for axis in AXES if axis in mesh.shape and axis not in mesh.manual_axes}
    return left if not mesh.manual_axes or math.prod(left.values()) > 1 else {}


def row_devices() -> int:
    """How many parts the rows of a batch are in."""
    return math.prod(sizes().get(axis, 1) for axis in ROWS)


def axes_for(length: int, axes: tuple[str, ...]) -> tuple[str, ...] | None:
    """Those mesh axes where together they divide an array's axis of this length, else None: it stays whole."""
    mesh = sizes()
    axes = tuple(axis for axis in axes if mesh.get(axis, 1) > 1)
    count = math.prod(mesh[axis] for axis in axes)
    return axes if axes and length % count == 0 else None


def constrain(x: Shaped[Array, "..."], *axes: tuple[str, ...] | str | None) -> Shaped[Array, "..."]:
    """x with its leading axes divided as named where they can be, the others whole; x itself without a mesh."""
    if not sizes():
        return x
    axes = ((axis,) if isinstance(axis, str) else axis for axis in axes)
    found = [None if axis is None else axes_for(length, axis) for length, axis in zip(x.shape, axes, strict=False)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*found))


def activations(xs: Shaped[Array, "B T ..."], *more: str) -> Shaped[Array, "B T ..."]:
    """Rows over data and fsdp, time over seq (and over `more`, where nothing else is left for those axes to do)."""
    return constrain(xs, ROWS, ("seq", *more))


def columns(layer: Any, xs: Float[Array, "B T D"], widths: tuple[int, ...]) -> tuple[Float[Array, "B T _"], ...]:
    """A linear layer's product in parts of these widths.

    Over a `tensor` axis it is one product a part, so that each part and not their row is divided over the axis.
    """
    starts = [sum(widths[:n]) for n in range(len(widths) + 1)]
    if sizes().get("tensor", 1) == 1:
        return tuple(jnp.split(layer(xs), starts[1:-1], axis=-1))  # the gradients of slices would be padded and added
    dtype = layer.dtype or jnp.promote_types(xs.dtype, layer.kernel.dtype)
    parts = []
    for start, stop in zip(starts, starts[1:]):
        kernel = constrain(layer.kernel[...][:, start:stop], None, "tensor")
        y = xs.astype(dtype) @ kernel.astype(dtype)
        parts.append(y if layer.bias is None else y + layer.bias[...][start:stop].astype(dtype)[None, None])
    return tuple(constrain(y, ROWS, "seq", "tensor") for y in parts)


def run(function: Callable[..., Any], arguments: tuple, specs: tuple, out_specs: Any) -> Any:
    """function(*arguments), under a mesh on each device's share as the specs say; what they do not name is whole.

    A spec is a `PartitionSpec` for every leaf of its argument. Gradients of what is whole are summed after the loop.
    """
    if math.prod(sizes().values()) == 1:
        return function(*arguments)
    specs = jax.tree.map(
        lambda spec, part: jax.tree.map(lambda _: spec, part),
        specs,
        arguments,
        is_leaf=lambda a: isinstance(a, PartitionSpec),
    )
    free = set(sizes())
    return jax.shard_map(function, in_specs=specs, out_specs=out_specs, axis_names=free, check_vma=False)(*arguments)


def summed_over_rows(
    function: Callable[..., tuple[Any, Any]], whole: tuple, divided: tuple, axes: Any, out_axes: Any
) -> tuple[Any, Any]:
    """function(*whole, *divided) -> (sums, others): each device's, of its own rows; the sums of all, added once after.

    axes, out_axes: the axis of the rows of every leaf of `divided` and of `others`. What is divided over `tensor` and
    `seq` still is.
    """
    if row_devices() == 1:
        return function(*whole, *divided)

    def rows(axis):
        return PartitionSpec(*(None,) * axis, ROWS)

    def run_rows(whole, divided):
        sums, others = function(*whole, *divided)
        return jax.lax.psum(sums, ROWS), others

    specs = PartitionSpec(), jax.tree.map(rows, axes)
    out_specs = PartitionSpec(), jax.tree.map(rows, out_axes)
    run_rows = jax.shard_map(run_rows, in_specs=specs, out_specs=out_specs, axis_names=set(ROWS), check_vma=False)
    return run_rows(whole, divided)
