"""TPU topologies by name, and what a chip of each generation can do.

Peak rates are those of cloud.google.com/tpu/docs (a chip, bfloat16, "interchip interconnect bandwidth"); between slices
those of jax-ml.github.io/scaling-book, a chip's share of its host's network.
"""

import math
from typing import NamedTuple

from xlstm_jax.names import unknown


class Chip(NamedTuple):
    """One chip: FLOP/s, bytes of memory, and bytes a second of memory, of its links in a slice and between slices."""

    flops: float
    memory: float
    memory_rate: float
    link_rate: float
    network_rate: float


GIB = 2**30
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1228e9, 2400e9 / 8, 3.1e9),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 1600e9 / 8, 3.1e9),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 4800e9 / 8, 6.2e9),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 3584e9 / 8, 12.5e9),
    "tpu7x": Chip(2307e12, 192 * GIB, 7370e9, 9600e9 / 8, 12.5e9),
}
DEVICES = (  # how a device's kind begins, its peak in bfloat16 (no sparsity), from the vendors' pages
    ("TPU v4 lite", None),
    ("TPU v4", CHIPS["v4"].flops),
    ("TPU v5 lite", CHIPS["v5e"].flops),
    ("TPU v5e", CHIPS["v5e"].flops),
    ("TPU v5", CHIPS["v5p"].flops),
    ("TPU v6", CHIPS["v6e"].flops),
    ("TPU7x", CHIPS["tpu7x"].flops / 2),  # a device is one of a chip's two cores
    ("NVIDIA H200", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA A100", 312e12),
)
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = (
    "2x2x1",
    "2x2x2",
    "2x2x4",
    "2x4x4",
    "4x4x4",
    "4x4x8",
    "4x8x8",
    "8x8x8",
    "8x8x16",
    "8x16x16",
    "16x16x16",
    "16x16x24",
)
SHAPES = {"v4": CUBES[:-1], "v5e": FLAT, "v5p": CUBES, "v6e": FLAT, "tpu7x": CUBES}
CORES_IN_NAME = {"v4": 2, "v5p": 2, "tpu7x": 2}  # users name these by TensorCores: v5p-1024 has 512 chips


class Topology(NamedTuple):
    """`slices` slices of one shape."""

    generation: str
    shape: str
    slices: int

    @property
    def name(self) -> str:
        return f"{self.generation}:{self.shape}" + (f"*{self.slices}" if self.slices > 1 else "")

    @property
    def chips(self) -> int:
        return self.slices * chips_of(self.shape)

    @property
    def device_count(self) -> int:
        """As JAX counts them: of a tpu7x each of a chip's two cores is one."""
        return self.chips * (2 if self.generation == "tpu7x" else 1)

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    def devices(self) -> list:
        """The devices of an ahead-of-time compile; ValueError where libtpu is not installed."""
        from jax.experimental import topologies

        options = {"num_slices": self.slices} if self.slices > 1 else {}
        if self.generation == "v4":
            options["chip_config_name"] = "megacore"
        try:
            name = f"{self.generation}:{self.shape}"
            return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"no compiler for {self.name}: pip install -e '.[tpu]' brings it, no TPU is needed ({error})"
            ) from error


def peak(kind: str) -> float | None:
    """FLOP/s in bfloat16 of a device by the name that JAX gives it; None for a CPU, or where it is not known."""
    return next((flops for begin, flops in DEVICES if kind.startswith(begin)), None)


def chips_of(shape: str) -> int:
    """Chips of a slice: 256 of "16x16"."""
    return math.prod(int(length) for length in shape.split("x"))


def names() -> dict[str, tuple[str, str]]:
    """{name: (generation, shape)}: v5e:16x16 and v5e-256 (also v5litepod-256), v5p:8x8x8 and v5p-1024."""
    found = {}
    for generation, shapes in SHAPES.items():
        for shape in shapes:
            count = chips_of(shape) * CORES_IN_NAME.get(generation, 1)
            found[f"{generation}:{shape}"] = found[f"{generation}-{count}"] = generation, shape
            if generation == "v5e":
                found[f"v5litepod-{count}"] = generation, shape
    return found


def topology(text: str) -> Topology:
    """ "v5e:16x16", "v5e-256", or "v5e:16x16*2" for two slices."""
    name, star, slices = text.partition("*")
    if star and not (slices.isdigit() and int(slices) > 0):
        raise ValueError(f"topology {text!r}: after * comes the number of slices, as in v5e:16x16*2")
    if name not in names():
        raise ValueError(unknown("topology", name, names()))
    return Topology(*names()[name], int(slices) if star else 1)
