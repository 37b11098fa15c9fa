"""Which form `form="auto"` is, for the device that a program is traced for, and why.

That device is JAX's default one or, where a program is compiled ahead of time for another, that of the mesh in context
(`jax.sharding.use_abstract_mesh(mesh.abstract_mesh)`, or `jax.set_mesh(mesh)`).
"""

import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax

CHOSEN_FORMS = ("auto", "pallas", "pallas_interpret")  # those that are decided here
SMALLEST_VMEM = 16 * 2**20  # bytes, of a core of TPU v4


class Target(NamedTuple):
    """A device: its platform ("cpu", "gpu", "tpu"), how many the compiler divides the program over, and of a TPU the
    bytes of a core's VMEM and the number of cores."""

    platform: str
    devices: int = 1
    vmem: int = SMALLEST_VMEM
    cores: int = 1


class Choice(NamedTuple):
    """A form and why it is that one; of a kernel, its plan."""

    form: str
    reason: str
    plan: Any = None


def target() -> Target:
    """What a program that is traced here will run on."""
    mesh = jax.sharding.get_abstract_mesh()
    platform = mesh.abstract_device.platform if mesh.abstract_device else jax.default_backend()
    divided = [size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes]
    devices = jax.device_count() if mesh.empty else math.prod(divided)
    if platform != "tpu":
        return Target(platform, devices)
    from jax.experimental.pallas import tpu as pltpu

    info = pltpu.get_tpu_info()
    return Target(platform, devices, info.vmem_capacity_bytes, info.num_cores)


def choose(form: str, target: Target, plan: Callable[[Target], Any], otherwise: str = "fused") -> Choice:
    """The form itself, or for "auto" the TPU's kernel where it can run and else `otherwise`.

    plan(target): the kernel's plan, or a line that says why there is none; it is not asked where there is no kernel.
    """
    if form not in CHOSEN_FORMS:
        return Choice(form, "as asked")
    if form == "pallas" and target.platform not in ("tpu", "gpu"):
        raise ValueError(
            f"form='pallas' needs a TPU or a GPU, and this program is for a {target.platform}; "
            f"form={otherwise!r} runs on any device"
        )
    if form == "auto" and target.platform == "gpu":
        return Choice(otherwise, "no committed measurement shows the kernel to be faster on a GPU")
    if form == "auto" and target.platform != "tpu":
        return Choice(otherwise, f"the kernels are for TPUs and GPUs, and this program is for a {target.platform}")
    if form == "auto" and target.devices > 1:
        return Choice(
            otherwise, f"the kernel is for one device and the program for {target.devices}, with no shard_map"
        )
    planned = plan(target)
    if not isinstance(planned, str):
        memory = f"; {planned.vmem} bytes of VMEM" if target.platform == "tpu" else ""
        return Choice("pallas", f"the kernel serves this rule and these sizes{memory}", planned)
    if form == "auto":
        return Choice(otherwise, planned)
    raise ValueError(f"form={form!r}: {planned}; form={otherwise!r} would serve it")


_chosen: ContextVar[list[Choice] | None] = ContextVar("chosen", default=None)


def record(choice: Choice) -> Choice:
    """Notes a choice for `chosen_forms`."""
    if _chosen.get() is not None:
        _chosen.get().append(choice)
    return choice


def chosen_forms(function: Callable[..., Any], *args: Any) -> tuple[Choice, ...]:
    """Which forms the cells in a function (a cell, a model, a loss) run, in their order, by tracing it on `args`."""
    token = _chosen.set([])
    try:
        jax.eval_shape(lambda *args: function(*args), *args)
        return tuple(_chosen.get())
    finally:
        _chosen.reset(token)
