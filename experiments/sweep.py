"""All runs of a config: python -m experiments.sweep plan|run|status --config=configs/F.py[:arg] --workdir=DIR

    plan      every run, its overrides and its state; starts nothing
    run       does what is missing; the same command goes on after an interruption, and repeats what had failed
    status    how far it is

    --launcher=inline|local    inline: one run after the other in this process; local: several processes on this machine
    --workers=N                for local; the number of cores if left out
    --index=K                  only the K-th run of the plan, from 0
    --config.a.b=v             changes a field for all runs

Exit codes: 0 all asked-for runs are done, 1 some are not (a list says which), 2 something in the request is wrong.
"""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from experiments import launch, rows
from experiments.planning import Sweep, load, validate
from experiments.train import fail


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; `overrides` holds the --config.a.b=v as "a.b=v"."""
    parser = argparse.ArgumentParser(prog="experiments.sweep", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("action", choices=("plan", "run", "status"))
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--launcher", choices=("inline", "local"), default="inline")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--index", type=int)
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # K/N, set by the local launcher
    options, rest = parser.parse_known_args(argv)
    options.overrides = [word.removeprefix("--config.") for word in rest if word.startswith("--config.")]
    for word in rest:
        if not word.startswith("--config."):
            parser.error(f"unknown argument {word}")
    return options


def worker_command(source: str, workdir: Path, overrides: list[str] | tuple[str, ...] = ()) -> list[str]:
    """What the local launcher starts."""
    changed = [f"--config.{word}" for word in overrides]
    return [sys.executable, "-m", "experiments.sweep", "run", f"--config={source}", f"--workdir={workdir}", *changed]


def run(sweep: Sweep, options: argparse.Namespace, console: Console, run_one=None) -> int:
    """Does what is missing; returns the exit code."""
    from experiments import train

    workdir = options.workdir
    run_one = run_one or train.run
    if options.worker:
        index, workers = map(int, options.worker.split("/"))
        launch.end_with_parent()
        launch.share_cores(index, workers)
        launch.inline(sweep, workdir, run_one, console=console, worker=(index, workers), progress=False)
        return 0
    if options.index is not None and not 0 <= options.index < len(sweep.runs):
        raise ValueError(f"--index={options.index}: the sweep has runs 0 to {len(sweep.runs) - 1}")
    if run_one is train.run:
        validate(sweep)
    rows.prepare(workdir, sweep)
    if options.index is not None:
        asked = sweep.runs[options.index : options.index + 1]
        launch.inline(sweep, workdir, run_one, console=console, runs=asked)
        sweep = sweep._replace(runs=asked)
    elif options.launcher == "local":
        command = worker_command(options.config, workdir, options.overrides)
        launch.local(sweep, workdir, command, workers=options.workers, console=console)
    else:
        launch.inline(sweep, workdir, run_one, console=console)
    left = list(launch.failures(sweep, workdir))
    for line in left:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{len(sweep.runs) - len(left)} of {len(sweep.runs)} runs done: {workdir / rows.RESULTS}", soft_wrap=True
    )
    return 1 if left else 0


def plan(sweep: Sweep, workdir: Path) -> Table:
    """Every run, its overrides and its state."""
    done = rows.read(workdir)
    names = list(dict.fromkeys(name for run in sweep.runs for name in run.overrides))
    table = Table("", Column("run", overflow="fold"), *names, "state")
    for index, run in enumerate(sweep.runs):
        values = [str(run.overrides.get(name, "")) for name in names]
        table.add_row(str(index), run.id, *values, rows.state(workdir, run, done))
    return table


def status(sweep: Sweep, workdir: Path) -> Table:
    """State, step and duration of every run, and how many are in each state."""
    done = rows.read(workdir)
    states = {run.id: rows.state(workdir, run, done) for run in sweep.runs}
    counts = [f"{list(states.values()).count(s)} {s}" for s in ("done", "running", "failed", "missing")]
    waiting = [run for run in sweep.runs if states[run.id] != "done"]
    left = launch.clock_or_unknown(launch.seconds_left(sweep, waiting, done))
    caption = ", ".join(counts) + (f"; {left} left, one run after the other" if waiting else "")
    table = Table(Column("run", overflow="fold"), "state", "step", "seconds", caption=caption)
    for run in sweep.runs:
        row, steps = done.get(run.id, {}), sweep.config(run).steps
        step = steps if row else rows.last_metrics(workdir, run).get("step", 0)
        seconds = f"{row['seconds']:.0f}" if row else ""
        table.add_row(run.id, states[run.id], f"{step} of {steps}", seconds)
    for name in sorted(done.keys() - states.keys()):
        table.add_row(name, "no longer in the sweep", "", f"{done[name]['seconds']:.0f}")
    return table


def main(argv: list[str], run_one=None) -> int:
    options = parse(argv)
    console = Console()
    try:
        sweep = load(options.config, options.overrides)
        if options.action == "run":
            return run(sweep, options, console, run_one)
        rows.check(options.workdir, sweep)
        console.print((plan if options.action == "plan" else status)(sweep, options.workdir))
    except (ValueError, OSError) as error:
        return fail(error)
    except KeyboardInterrupt:
        return fail("interrupted; the same command goes on", 130)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
