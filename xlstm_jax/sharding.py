"""One mesh, and how it divides a train state: rules by a parameter's name, for the parameters and the optimiser alike.

    runs     independent runs of one program         data, fsdp   the rows of a batch; fsdp the stored weights too
    tensor   heads, and the widths between them      seq          time, for the mLSTM and the linear cells

Weights are stored in parts and gathered layer by layer, each once before its loop over time (`gathered`); loops over
time are local to a device (`kernels.local`). A dense LSTM or GRU is never divided along its recurrence: its rows are.
"""

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from .kernels import local
from .kernels.local import AXES
from .names import unknown
from .optim import parameter_name

# (pattern of the end of a parameter's name, mesh axis of each of its axes); the first of its rank that fits decides.
# "fsdp" is how a weight is stored, "tensor" how it is stored and used; what does not divide stays whole.
RULES = (
    (r"(down|out)\.kernel", ("tensor", "fsdp")),
    (r"o\.kernel", ("fsdp", "tensor")),
    (r"[qkvifzo]\.kernel", ("tensor", "fsdp", None)),  # head-wise
    (r"[if]\.kernel", (None, None)),  # one number a head, and few heads
    (r"R", ("tensor", "fsdp", None, None)),
)
# Any other is stored over both, along its longest axis that they divide, and used whole or cut by `local.columns`.
SMALLEST = 2**16  # elements of a weight that is divided at all: smaller ones are on every device


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of the axes named, the others of size 1; one size may be -1, for all devices that are left.

    Devices of several slices are divided along `data` (or `runs`) first: only gradients cross between slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(sizes, len(devices))
    shape = list(sizes.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        between = next((axis for axis in ("data", "runs", "fsdp") if sizes[axis] % slices == 0), None)
        if between is None:
            raise ValueError(f"no mesh axis of data, runs or fsdp is a multiple of the {slices} slices: make data one")
        outer = [slices if axis == between else 1 for axis in AXES]
        inner = [size // number for size, number in zip(shape, outer)]
        grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    return Mesh(np.asarray(grid), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(sizes: Mapping[str, int] | None, count: int) -> dict[str, int]:
    """The size of every axis of a mesh over so many devices; ValueError where that cannot be."""
    sizes = dict(sizes or {"data": -1})
    for axis, size in sizes.items():
        if axis not in AXES:
            raise ValueError(unknown("mesh axis", axis, AXES))
        if type(size) is not int or (size < 1 and size != -1):
            raise ValueError(f"mesh axis {axis} is {size!r}: a positive int is needed, or -1 for what is left")
    filled = [axis for axis, size in sizes.items() if size == -1]
    product = math.prod(size for size in sizes.values() if size != -1)
    if len(filled) > 1:
        raise ValueError(f"mesh axes {' and '.join(filled)} are both -1: only one can take what is left")
    if filled and count % product == 0:
        sizes[filled[0]] = count // product
    elif product != count:
        asked = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(
            f"mesh {asked} does not fit {count} devices: it needs {'a multiple of ' * bool(filled)}"
            f"{product}; data=-1 takes what is left"
        )
    return {axis: sizes.get(axis, 1) for axis in AXES}


def use(mesh: Mesh | None):
    """The context in which programs are divided over the mesh; one device without."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def check(mesh: Mesh, *, batch_sizes: Mapping[str, int], seq_len: int | None, model: nnx.Module) -> None:
    """ValueError where batches, the steps in time or the model's heads do not divide over the mesh."""
    sizes = mesh.shape
    if sizes["runs"] > 1:
        raise ValueError(
            f"mesh axis runs is {sizes['runs']}: one run is not divided over it; sweeps do so by themselves"
        )
    rows = math.prod(sizes[axis] for axis in local.ROWS)
    for name, size in batch_sizes.items():
        if size % rows:
            near = max(size // rows, 1) * rows
            raise ValueError(
                f"{name}={size} does not divide over data x fsdp = {rows}: take a multiple, such as {near}"
            )
    if seq_len is not None and seq_len % sizes["seq"]:
        raise ValueError(f"seq_len={seq_len} does not divide over seq={sizes['seq']}: take a multiple of it")
    for path, module in nnx.iter_modules(model):
        heads = getattr(module, "num_heads", 1)
        if isinstance(heads, int) and heads > 1 and heads % sizes["tensor"]:
            where = ".".join(str(part) for part in path)
            fitting = [size for size in range(1, heads + 1) if heads % size == 0]
            raise ValueError(
                f"num_heads={heads} of {where} ({type(module).__name__}) does not divide over tensor={sizes['tensor']}:"
                f" it can be {', '.join(map(str, fitting))}"
            )


def stored_spec(name: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """How a parameter of this name and shape (without the axis of a stack) is stored on a mesh of these sizes."""
    if math.prod(shape) < SMALLEST:
        return PartitionSpec()
    rule = _rule(name, shape)
    if rule is not None:
        return PartitionSpec(*(a if a and length % sizes[a] == 0 else None for length, a in zip(shape, rule)))
    for axes in (("fsdp", "tensor"), ("fsdp",)):
        parts = math.prod(sizes[axis] for axis in axes)
        fitting = [n for n, length in enumerate(shape) if length % parts == 0]
        if fitting:
            longest = max(fitting, key=lambda n: shape[n])
            return PartitionSpec(*(axes if n == longest else None for n in range(len(shape))))
    return PartitionSpec()


def used_spec(name: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """How it is where it is used: whole, or its heads divided."""
    rule = _rule(name, shape) or ()
    return PartitionSpec(*(a if a == "tensor" and length % sizes[a] == 0 else None for a, length in zip(rule, shape)))


def _rule(name: str, shape: tuple[int, ...]) -> tuple[str | None, ...] | None:
    fitting = (axes for pattern, axes in RULES if len(axes) == len(shape) and re.search(rf"(^|\.){pattern}$", name))
    return next(fitting, None)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(weight: Array, used: PartitionSpec, stored: PartitionSpec) -> Array:
    weight = jax.lax.with_sharding_constraint(weight, used)
    return checkpoint_name(weight, "gathered")


def _gather_backward(used, stored, _, gradient):
    gradient = jax.lax.with_sharding_constraint(gradient, used)  # summed first: else activations may be moved instead
    return (jax.lax.with_sharding_constraint(gradient, stored),)


_gather.defvjp(lambda weight, used, stored: (_gather(weight, used, stored), None), _gather_backward)


def gathered(module: nnx.Module) -> nnx.Module:
    """The module with its weights as they are used; their gradients arrive as the weights are stored."""
    sizes = local.sizes()
    if math.prod(sizes.values()) == 1:
        return module
    graphdef, params = nnx.split(module)

    def gather(path, weight):
        name = parameter_name(path)
        kinds = (used_spec, stored_spec if "fsdp" in sizes else used_spec)  # local rows have whole weights already
        specs = [spec(name, weight.shape, sizes) for spec in kinds]
        return _gather(weight, *specs) if any(axis for spec in specs for axis in spec) else weight

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(gather, params))


def parameter_specs(model: nnx.Module, sizes: Mapping[str, int]) -> dict[str, tuple[tuple[int, ...], PartitionSpec]]:
    """{name: (shape, stored spec)} of every parameter; the axis of the repeats of a stack is not divided."""
    stacks = [
        ".".join(map(str, (*path, "layers"))) + "."
        for path, module in nnx.iter_modules(model)
        if getattr(module, "repeats", 1) > 1
    ]
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.split(model)[1]):
        name = parameter_name(path)
        lead = sum(name.startswith(stack) for stack in stacks)
        found[name] = leaf.shape, PartitionSpec(*(None,) * lead, *stored_spec(name, leaf.shape[lead:], sizes))
    return found


def state_specs(state: PyTree, model: nnx.Module, sizes: Mapping[str, int]) -> PyTree:
    """A spec for every leaf of a train state: parameters by rule, the optimiser's leaves as the parameter whose name
    theirs ends in, carried states by rows; the rest on every device."""
    params = parameter_specs(model, sizes)
    rows = iter(jax.tree.leaves(_row_specs(model)) if state.carry else ())

    def spec(path, leaf):
        name = parameter_name(path)
        if name.partition(".")[0] == "carry":
            return next(rows)
        parts = name.split(".")
        owner = next((p for n in range(len(parts)) if (p := ".".join(parts[n:])) in params), None)
        return params[owner][1] if owner and params[owner][0] == leaf.shape else PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, state)


def row_axes(model: nnx.Module) -> PyTree:
    """The axis of the rows of each array of the model's state; the layers of a stack have theirs before it."""
    two, three = (nnx.eval_shape(lambda rows=rows: model.initial_state(rows)) for rows in (2, 3))
    return jax.tree.map(lambda a, b: next(n for n, size in enumerate(a.shape) if size != b.shape[n]), two, three)


def _row_specs(model: nnx.Module) -> PyTree:
    """Of each array of the model's state the spec that divides its rows."""
    return jax.tree.map(lambda axis: PartitionSpec(*(None,) * axis, local.ROWS), row_axes(model))


def keep(state: PyTree, graphdef: nnx.GraphDef) -> PyTree:
    """A train state with every leaf divided as it is stored; as it is without a mesh."""
    sizes = local.sizes()
    if math.prod(sizes.values()) == 1:
        return state
    specs = state_specs(state, nnx.merge(graphdef, state.params), sizes)
    return jax.tree.map(jax.lax.with_sharding_constraint, state, specs)


def whole(tree: PyTree) -> PyTree:
    """Every array on every device, so that every process can read it; as it is without a mesh."""
    if math.prod(local.sizes().values()) == 1:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), tree)


def everywhere(arrays: PyTree) -> PyTree:
    """What every process has read alike (a corpus), as arrays of the whole mesh; as it is without one."""
    if math.prod(local.sizes().values()) == 1:
        return arrays
    put = partial(jax.make_array_from_process_local_data, NamedSharding(jax.sharding.get_mesh(), PartitionSpec()))
    return jax.tree.map(lambda x: put(np.asarray(x), x.shape), arrays)


def carried(state: PyTree, model: nnx.Module) -> PyTree:
    """A model's recurrent state with its rows divided over the mesh; as it is without one."""
    if math.prod(local.sizes().values()) == 1:
        return state
    return jax.tree.map(jax.lax.with_sharding_constraint, state, _row_specs(model))


def parameter_shardings(model: nnx.Module, mesh: Mesh) -> PyTree:
    """The sharding of every parameter, in the structure of `nnx.split(model)[1]`."""
    specs = parameter_specs(model, mesh.shape)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: NamedSharding(mesh, specs[parameter_name(path)][1]), nnx.split(model)[1]
    )
