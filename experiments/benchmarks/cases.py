"""What is timed: a case is a row, with its sizes and the share of the best other's time that it may take.

Sizes: B batch, T time, D inputs, H width, N heads, K and V key and value width a head, S side of an image, C channels
in.
"""

from typing import NamedTuple

from xlstm_jax.names import unknown

FORWARD, BOTH = "forward", "forward and backward"
SMALL = dict(B=2, T=20, D=8, H=8, N=2, K=4, V=4, S=6, C=2, steps=2, length=4, prompt=12, seeds=2)  # --quick: at most


class Case(NamedTuple):
    """targets: by pass, at most this share of the best other's time; None where there is no target."""

    kind: str
    sizes: dict[str, int]
    targets: dict[str, float | None]

    @property
    def name(self) -> str:
        return f"{self.kind}-" + "x".join(map(str, self.sizes.values()))

    def units(self) -> tuple[str | None, int]:
        """What a run of a whole model works off, and how much of it."""
        s = self.sizes
        if self.kind == "parity":
            return "steps", s["seeds"] * s["steps"]
        if "layers" in s:
            return "tokens", s["B"] * s.get("T", s.get("length"))
        return None, 0

    def small(self) -> "Case":
        """The same for a machine that has no time: no target holds for it."""
        sizes = {axis: min(size, SMALL.get(axis, size)) for axis, size in self.sizes.items()}
        return self._replace(sizes=sizes, targets=dict.fromkeys(self.targets))


def table(kind: str, axes: str, rows: list[tuple[int, ...]], **targets: float | None) -> list[Case]:
    """One case a row of sizes; targets: forward=, both= or any other pass."""
    passes = {{"forward": FORWARD, "both": BOTH}.get(name, name): target for name, target in targets.items()}
    return [Case(kind, dict(zip(axes.split(), row)), passes) for row in rows]


LAYERS = [(32, 256, 256, 256), (64, 128, 512, 512), (16, 1024, 128, 128), (4, 1024, 64, 64)]
MEMORIES = [
    (4, 512, 4, 64, 64),
    (2, 2048, 4, 64, 64),
    (1, 4096, 4, 128, 128),
    (1, 1024, 4, 64, 64),
    (1, 8192, 4, 64, 64),
]

SUITES = {
    "cells": [
        *table("lstm", "B T D H", LAYERS, forward=1.2, both=1.0),
        *table("gru", "B T D H", LAYERS, forward=None, both=0.7),
        *table("bilstm", "B T D H", [(32, 256, 256, 256), (16, 256, 128, 128)], forward=None, both=0.7),
        *table("slstm", "B T H N", [(16, 256, 256, 4), (8, 512, 512, 4)], forward=None, both=0.4),
        *table("convlstm", "B T S C H", [(8, 16, 32, 1, 32)], forward=None, both=None),
    ],
    "mlstm": table("mlstm", "B T N K V", MEMORIES, forward=None, both=0.7),
    "train": [
        *table("train[1:0]", "B T D layers", [(8, 256, 256, 4)], step=0.7),
        *table("train[3:1]", "B T D layers", [(8, 256, 256, 4)], step=0.5),
        *table("train[0:1]", "B T D layers", [(8, 256, 256, 4)], step=0.5),
    ],
    "decode": [
        *table("prefill", "B T D layers", [(1, 2048, 512, 4)], prefill=0.7),
        *table("decode", "B length D layers", [(1, 128, 512, 4)], decode=0.5),
    ],
    "sweep": table("parity", "seeds B T H steps", [(1, 64, 40, 64, 50), (8, 64, 40, 64, 50)], steps=0.8),
}


def choose(suite: str, names: str | None, quick: bool) -> list[Case]:
    """The cases of a suite, or those of "NAME,NAME": a case's name, or a kind with all its sizes."""
    if suite not in SUITES:
        raise ValueError(unknown("--suite", suite, SUITES))
    everything = SUITES[suite]
    wanted = [name.strip() for name in names.split(",")] if names is not None else None
    for name in wanted or ():
        if not any(name in (case.kind, case.name) for case in everything):
            valid = [*dict.fromkeys(case.kind for case in everything), *(case.name for case in everything)]
            raise ValueError(unknown(f"--case of the suite {suite}", name, valid))
    chosen = [case for case in everything if wanted is None or {case.kind, case.name} & set(wanted)]
    if quick:
        chosen = list({small.name: small for small in (case.small() for case in chosen)}.values())
    return chosen
