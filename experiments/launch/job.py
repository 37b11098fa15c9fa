"""What every kind of machine is told: which slices, and which command each of their hosts runs."""

import math
import re
import shlex
from typing import NamedTuple

from xlstm_jax.names import unknown


class Chip(NamedTuple):
    """A TPU generation as Google Cloud names it (cloud.google.com: tpu/docs and kubernetes-engine/docs)."""

    prefix: str  # of the accelerator type
    counted: int  # what that counts a chip
    runtime: str  # software version of a TPU VM
    node: str  # GKE's accelerator label
    one_host: int  # the most chips that one host has alone; in larger slices a host has 4


CHIPS = {
    "v4": Chip("v4", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice", 4),
    "v5e": Chip("v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 8),
    "v5p": Chip("v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice", 4),
    "v6e": Chip("v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice", 8),
}


class Slice(NamedTuple):
    """One of the equal slices of a job: `v5e:16x16`."""

    chip: Chip
    shape: str

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.shape.split("x")))

    @property
    def hosts(self) -> int:
        return 1 if self.chips <= self.chip.one_host else self.chips // 4

    @property
    def accelerator(self) -> str:
        """v5litepod-256, v4-128 (that is 64 chips), ..."""
        return f"{self.chip.prefix}-{self.chips * self.chip.counted}"


def parse(topology: str) -> Slice:
    """ "v5e:16x16"; ValueError names the generations."""
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS:
        raise ValueError(unknown("TPU generation", kind, CHIPS) + "; a topology is written v5e:16x16")
    sizes = 3 if kind in ("v4", "v5p") else 2
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") != sizes - 1:
        raise ValueError(f"--topology={topology}: {kind} has {sizes} axes, such as {kind}:{'x'.join(['4'] * sizes)}")
    found = Slice(CHIPS[kind], shape)
    if found.chips > found.chip.one_host and found.chips % 4:
        raise ValueError(f"--topology={topology}: {found.chips} chips do not fill hosts of 4")
    return found


def training(config: str, workdir: str, overrides: list[str], python: str = "python") -> list[str]:
    """The command of every host; killed and started again, it goes on."""
    words = [python, "-m", "experiments.train", f"--config={config}", f"--workdir={workdir}", "--processes=auto"]
    return [*words, *(f"--config.{each}" for each in overrides)]


def shell(words: list[str]) -> str:
    """One line for a shell."""
    return shlex.join(words)
