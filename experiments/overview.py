"""What a sweep is going to do: every run, the programs to compile, an estimate of time and memory; starts nothing."""

import json
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments import rows, runner, vectorize
from experiments.build import build_model, build_optimizer, build_task, resolve
from experiments.planning import Sweep

STATES = {"done": "green", "running": "cyan", "failed": "red", "missing": ""}
ENDED = ("done", "failed")  # what `run` leaves alone


def plan(sweep: Sweep, workdir: Path, *, together: bool, memory: bool = True) -> dict[str, Any]:
    """The plan as plain values: {"runs": [...], "groups": [...], "states", "programs", "seconds", "bytes", ...}.

    `seconds` (of the runs that have not ended, one after another on one device; None: unknown) come from the config's
    expected_seconds and the finished runs; `bytes` are those of parameters, gradients and optimiser state, of all the
    runs of a program; activations come on top.
    """
    done = rows.read(workdir)
    states = {run.id: rows.state(workdir, run, done) for run in sweep.runs}
    programs: dict[str, int] = {}
    sizes: dict[str, tuple[int, int]] = {}
    lines, groups = [], []
    constant = common(sweep)
    for index, run in enumerate(sweep.runs):
        config = sweep.config(run)
        key = vectorize.program(config, together)
        if key not in programs:
            programs[key] = len(programs)
            parameters, size = state_size(sweep, run, sizes) if memory else (None, None)
            groups.append({"runs": 0, "left": 0, "parameters": parameters, "bytes_a_run": size})
        group, state = programs[key], states[run.id]
        groups[group]["runs"] += 1
        groups[group]["left"] += state not in ENDED
        spent = done[run.id].get("wall_seconds") if state == "done" else runner.seconds_for(sweep, run, done)
        changes = {name: value for name, value in run.overrides.items() if name not in constant}
        lines.append(
            {"index": index, "id": run.id, "changes": changes} | {"group": group, "state": state, "seconds": spent}
        )
    for group in groups:
        size, at_once = group["bytes_a_run"], min(group["left"], vectorize.TOGETHER if together else 1)
        group["bytes"] = None if size is None else size * at_once
    left = [line["seconds"] for line in lines if line["state"] not in ENDED]
    return {
        "runs": lines,
        "groups": groups,
        "constant": constant,
        "states": {name: list(states.values()).count(name) for name in STATES},
        "programs": sum(group["left"] > 0 for group in groups),
        "vectorized": together,
        "seconds": None if None in left else sum(left),
        "bytes": max((group["bytes"] or 0 for group in groups), default=0) if memory else None,
        "no_longer_in_the_sweep": sorted(done.keys() - states.keys()),
    }


def common(sweep: Sweep) -> dict[str, Any]:
    """The overrides that all runs share."""
    first = sweep.runs[0].overrides if len(sweep.runs) > 1 else {}
    return {
        name: value
        for name, value in first.items()
        if all(name in run.overrides and run.overrides[name] == value for run in sweep.runs)
    }


def state_size(sweep: Sweep, run, known: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """(parameters, bytes of parameters, gradients and optimiser state) of a run, from shapes alone; builds no array."""
    plain = resolve(sweep.config(run))
    try:
        task, tx = build_task(plain), build_optimizer(plain)
        widths = {name: getattr(task, name, None) for name in ("vocab_size", "num_classes", "num_features")}
        key = json.dumps([plain["kind"], plain["model"], plain["optimizer"].get("name"), widths], sort_keys=True)
        if key not in known:
            params = nnx.split(nnx.eval_shape(lambda: build_model(plain, task, 0)))[1]
            both = jax.tree.leaves([params, params, jax.eval_shape(tx.init, params)])
            parameters = sum(x.size for x in jax.tree.leaves(params))
            known[key] = parameters, sum(x.size * x.dtype.itemsize for x in both)
    except ValueError as error:
        raise ValueError(f"run {run.id}: {error}") from None
    return known[key]


def show(found: dict[str, Any], console: Console) -> None:
    """The plan as a table, a block a program, and its sums."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name, align in (
        ("run", "right"),
        ("state", "left"),
        ("program", "right"),
        ("changes", "left"),
        ("time", "right"),
    ):
        table.add_column(name, justify=align, no_wrap=True)
    table.add_column("id", no_wrap=True)
    last = None
    for line in sorted(found["runs"], key=lambda line: line["group"]):
        if last not in (None, line["group"]):
            table.add_section()
        last, state = line["group"], line["state"]
        changes = ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in line["changes"].items())
        cells = [str(line["index"]), f"[{STATES[state]}]{state}[/]" if STATES[state] else state, str(line["group"])]
        table.add_row(*cells, escape(changes), clock(line["seconds"]), escape(line["id"]))
    if not console.is_terminal:  # all of it, however wide
        console = Console(file=console.file, width=10_000)
    console.print(table)
    for line in summary(found):
        console.print(line, highlight=False, markup=False)


def summary(found: dict[str, Any]) -> list[str]:
    """The sums of a plan, a line each."""
    lines = [f"{len(found['runs'])} runs: " + ", ".join(f"{count} {name}" for name, count in found["states"].items())]
    if found["constant"]:
        lines.append("all runs: " + ", ".join(f"{name}={value}" for name, value in found["constant"].items()))
    kind = (
        "runs that differ in seed and optimiser numbers are one" if found["vectorized"] else "one for each but the seed"
    )
    lines.append(f"programs to compile: {found['programs']} ({kind})")
    if any(line["state"] not in ENDED for line in found["runs"]):
        lines.append(f"time left: {runner.clock_or_unknown(found['seconds'])}, one run after the other")
    if found["states"]["failed"]:
        lines.append("failed runs are not counted in these: --retry=failed runs them again")
    if found["bytes"]:
        lines.append(f"memory: {size(found['bytes'])} for parameters, gradients and optimiser of the largest program")
    lines += [f"no longer in the sweep: {name}" for name in found["no_longer_in_the_sweep"]]
    return lines


def clock(seconds: float | None) -> str:
    return "?" if seconds is None else runner.clock_or_unknown(seconds).removeprefix("about ")


def size(count: int) -> str:
    """Bytes in the largest unit that leaves a number of 1 or more."""
    number, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while number >= 1024 and len(units) > 1:
        number, units = number / 1024, units[1:]
    return f"{number:.4g} {units[0]}"
