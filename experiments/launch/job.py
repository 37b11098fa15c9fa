"""What every kind of machine is told: which slices, and which command each of their hosts runs."""

import shlex
from pathlib import Path
from typing import NamedTuple

from experiments.topology import CORES_IN_NAME, Topology, chips_of


class Hosts(NamedTuple):
    """The machines of a TPU generation as Google Cloud names them (tpu/docs and kubernetes-engine/docs there)."""

    prefix: str  # of the accelerator type
    runtime: str | None  # software version of a TPU VM; None: there are none, only Kubernetes has this generation
    node: str  # GKE's accelerator label
    alone: int  # the most chips that one host has alone; in larger slices a host has 4


HOSTS = {
    "v4": Hosts("v4", "tpu-ubuntu2204-base", "tpu-v4-podslice", 4),
    "v5e": Hosts("v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 8),
    "v5p": Hosts("v5p", "v2-alpha-tpuv5", "tpu-v5p-slice", 4),
    "v6e": Hosts("v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice", 8),
    "tpu7x": Hosts("tpu7x", None, "tpu7x", 4),
}


def hosts_of(where: Topology) -> int:
    """Of one of its slices."""
    chips = chips_of(where.shape)
    return 1 if chips <= HOSTS[where.generation].alone else chips // 4


def accelerator(where: Topology) -> str:
    """Of one slice: v5litepod-256, v4-128 (that is 64 chips), ..."""
    return f"{HOSTS[where.generation].prefix}-{chips_of(where.shape) * CORES_IN_NAME.get(where.generation, 1)}"


def training(config: str, workdir: Path, overrides: list[str], python: str = "python") -> list[str]:
    """The command of every host; killed and started again, it goes on."""
    words = [python, "-m", "experiments.train", f"--config={config}", f"--workdir={workdir}", "--processes=auto"]
    return [*words, *(f"--config.{each}" for each in overrides)]


def shell(words: list[str]) -> str:
    """One line for a shell."""
    return shlex.join(words)
