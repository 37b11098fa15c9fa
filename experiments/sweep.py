"""All runs of a config: python -m experiments.sweep plan|run|status --config=configs/F.py[:arg] --workdir=DIR

    plan      every run: number, state, program, what it changes, id; programs, time and memory; starts nothing
    run       does what is missing; the same command goes on after an interruption, and repeats what had failed
    status    how far it is, and what the finished runs scored

    --launcher=inline|local    inline: one run after the other in this process; local: several processes on this machine
    --workers=N                for local; the number of cores if left out
    --index=K                  only the K-th run of the plan, from 0
    --vectorize=auto|on|off    runs that differ in seed and optimiser numbers as one program (auto: not on a CPU)
    --json                     for plan: as one JSON value
    --config.a.b=v             changes a field for all runs but those that the sweep itself gives another value

Exit codes: 0 all asked-for runs are done, 1 some are not (a list says which), 2 something in the request is wrong.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from rich.console import Console

from experiments import command, launch, overview, rows, table, vectorize
from experiments.planning import Sweep, headline, load, validate


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; `overrides` holds the --config.a.b=v as "a.b=v"."""
    parser = command.Arguments("sweep", __doc__)
    parser.add_argument("action", choices=("plan", "run", "status"))
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", type=command.folder, required=True)
    parser.add_argument("--launcher", choices=("inline", "local"), default="inline")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--index", type=int)
    parser.add_argument("--vectorize", choices=vectorize.MODES, default="auto")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # K/N, set by the local launcher
    return parser.with_overrides(argv)


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
    if options.vectorize == "on" and (options.launcher != "inline" or options.index is not None):
        raise ValueError("--vectorize=on: one process runs a group at once: leave --launcher and --index out")
    if options.workers < 1:
        raise ValueError(f"--workers={options.workers}: at least 1 is needed")
    configs = [sweep.config(run) for run in sweep.runs]
    say(console, headline(sweep.source, sweep.module, configs, workdir))
    if run_one is train.run:
        validate(sweep)
    if hasattr(sweep.module, "TABLE"):
        table.check(sweep)
    rows.prepare(workdir, sweep)
    if all(run.id in rows.read(workdir) for run in sweep.runs):
        say(console, "every run was finished already: nothing to train")
    if options.index is not None:
        asked = sweep.runs[options.index : options.index + 1]
        launch.inline(sweep, workdir, run_one, console=console, runs=asked)
        sweep = sweep._replace(runs=asked)
    elif options.launcher == "inline" and vectorize.wanted(options.vectorize):
        vectorize.launch_groups(sweep, workdir, console=console)
    elif options.launcher == "local":
        worker = worker_command(options.config, workdir, options.overrides)
        launch.local(sweep, workdir, worker, workers=options.workers, console=console)
    else:
        launch.inline(sweep, workdir, run_one, console=console)
    left = list(launch.failures(sweep, workdir))
    for line in left:
        say(console, line)
    say(console, f"{len(sweep.runs) - len(left)} of {len(sweep.runs)} runs done: {workdir / rows.RESULTS}")
    return 1 if left else 0


def plan(sweep: Sweep, options: argparse.Namespace, console: Console, memory: bool) -> None:
    """Every run, and what all of them need."""
    found = overview.plan(sweep, options.workdir, together=vectorize.wanted(options.vectorize), memory=memory)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        overview.show(found, console)


def status(sweep: Sweep, workdir: Path, console: Console) -> None:
    """State, step, duration and score of every run, and how many are in each state."""
    done = rows.read(workdir)
    states = {run.id: rows.state(workdir, run, done) for run in sweep.runs}
    metric = getattr(sweep.module, "TABLE", {}).get("metric")
    width = max(len(run.id) for run in sweep.runs)
    for index, run in enumerate(sweep.runs):
        row, found = done.get(run.id, {}), ""
        if row:
            score = f", {metric} {row[metric]:.4f}" if isinstance(row.get(metric), float) else ""
            found = f"{row['seconds']:.0f} s{score}"
        elif step := rows.last_metrics(workdir, run).get("step"):
            found = f"step {step} of {sweep.config(run).steps}"
        say(console, f"{index:>4}  {states[run.id]:7}  {run.id:{width}}  {found}".rstrip())
    for name in sorted(done.keys() - states.keys()):
        say(console, f"      no longer in the sweep: {name}")
    counts = [f"{list(states.values()).count(s)} {s}" for s in ("done", "running", "failed", "missing")]
    waiting = [run for run in sweep.runs if states[run.id] != "done"]
    left = launch.clock_or_unknown(launch.seconds_left(sweep, waiting, done))
    say(console, ", ".join(counts) + (f"; {left} left, one run after the other" if waiting else ""))


def say(console: Console, line: str) -> None:
    """One line as it is: not wrapped, not coloured."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


@command.exit_code
def main(argv: list[str], run_one=None) -> int:
    options = parse(argv)
    console = Console()
    sweep = load(options.config, options.overrides)
    if options.action == "run":
        return run(sweep, options, console, run_one)
    rows.check(options.workdir, sweep)
    if options.action == "plan":
        plan(sweep, options, console, memory=run_one is None)
    else:
        status(sweep, options.workdir, console)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
