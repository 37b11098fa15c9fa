"""Result rows: what is written of a measurement, and how rows of several runs add up in one file."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks import peers, timing
from experiments.benchmarks.cases import Case
from experiments.benchmarks.timing import Machine, Program
from xlstm_jax import metrics
from xlstm_jax.metrics import write_atomically

OURS, BOUND = "ours", "bound"  # the two libraries that are no peers
DEFAULT = "default"  # the form that a user gets without asking
PRODUCTS, LOOP = "products alone", "loop alone"


class Entry(NamedTuple):
    """One contender in one pass; times or an error."""

    library: str
    label: str
    program: Program | None
    times: list[float] | None
    error: str | None
    difference: float | None = None  # of its outputs from our plain form's, the largest
    check: dict[str, Any] | None = None


def rows(
    run: dict[str, Any], case: Case, pass_: str, entries: list[Entry], operations: float | None, machine: Machine
) -> list[dict[str, Any]]:
    """One row a contender, with its ratio to the fastest peer of the same run.

    run: what stands in every row: its suite, its start, and whether it is a quick one.
    """
    timed = [entry for entry in entries if entry.times]
    others = [entry for entry in timed if entry.library not in (OURS, BOUND)]
    best = min(others, key=lambda entry: np.median(entry.times), default=None)
    environment = metrics.environment()
    found = []
    for entry in entries:
        row = run | {
            "case": case.name,
            "kind": case.kind,
            "sizes": case.sizes,
            "pass": pass_,
            "library": entry.library,
            "implementation": entry.label,
            "error": entry.error and " ".join(entry.error.split())[:300],
            "gradient_check": entry.check,
            "difference": entry.difference,
            "target": case.targets[pass_],
        }
        if entry.times:
            unit, count = case.units()
            seconds, program = float(np.median(entry.times)), entry.program
            row |= {
                "milliseconds": timing.spread(entry.times),
                "rounds": len(entry.times),
                "best_other": best.label if best else None,
                "ratio": timing.ratio(entry.times, best.times) if best else None,
                "compile_seconds": rounded(program.compile_seconds),
                "temp_bytes": program.temp_bytes,
                "traffic_bytes": program.traffic_bytes,
                "parameters": program.parameters,
                "operations": operations,
                "rate": {"unit": f"{unit}/s", "value": rounded(count / seconds)} if unit else None,
                "share_of_products": rounded(operations and operations / seconds / machine.flops),
                "share_of_bandwidth": rounded(
                    program.traffic_bytes and program.traffic_bytes / seconds / machine.bandwidth
                ),
            }
        versions = environment["versions"]
        if entry.library not in (OURS, BOUND):
            versions = versions | {entry.library: peers.version(entry.library)}
        peak = {"gigaflops": rounded(machine.flops / 1e9), "gigabytes_a_second": rounded(machine.bandwidth / 1e9)}
        found.append(row | {"machine": peak | {"cores": timing.cores()}} | environment | {"versions": versions})
    return found


def rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def file_of(folder: Path, suite: str) -> Path:
    return folder / f"{suite}.jsonl"


def key(row: dict[str, Any]) -> tuple:
    """A newer measurement of the same case and pass on the same kind of device takes the place of the older."""
    return row["case"], row["pass"], row["device"]["kind"], row["machine"]["cores"]


def add(folder: Path, suite: str, new: list[dict[str, Any]]) -> None:
    """Put the rows of one case and pass into the suite's file, in the place of its older ones."""
    file = file_of(folder, suite)
    replaced = {key(row) for row in new}
    kept = [row for row in read(folder, suite) if key(row) not in replaced]
    write_atomically(file, "".join(json.dumps(row) + "\n" for row in kept + new))


def read(folder: Path, suite: str) -> list[dict[str, Any]]:
    """The rows of a suite; none if it was never run."""
    found = metrics.read(file_of(folder, suite))
    for number, row in enumerate(found, start=1):
        if not isinstance(row, dict) or not row.keys() >= {"case", "pass", "library", "implementation", "device"}:
            raise ValueError(f"{file_of(folder, suite)}, line {number} is no row of a benchmark: restore or delete it")
    return found
