"""All runs of a config: python -m experiments.sweep ACTION --config=configs/F.py[:arg] --workdir=DIR

    plan      every run: number, state, program, what it changes, id; programs, time and memory; starts nothing; --json
    run       does what is missing; the same command goes on after an interruption
    submit    starts what is missing and returns (local, slurm, ray with an address); again: only what is still missing
    status    how far it is, and what the finished runs scored; --watch: until all have ended

    --launcher=NAME    inline: one run after the other in this process (if left out)
                       local: several processes on this machine    --workers=N or as many as cores and memory hold
                       slurm: jobs of an array (submitit)           ray: tasks on a Ray cluster, or on one it starts
    --launcher_option=name=value    local: workers memory; slurm: partition time gpus_per_node runs_per_job …;
                       ray: address cpus gpus runs_per_task …; a wrong name lists the nearest
    --vectorize=auto|on|off    runs that differ in seed and optimiser numbers as one program (auto: not on a CPU); of
                       a worker, task or job: those that are its own
    --search=random|tpe --trials=20 --search_seed=0
                       runs drawn from the config's search(arg), TRIALS for each row of its sweep(arg); the same as
                       --config=FILE.py[:arg]@random,20,0, by which the other commands know such a sweep
    --prune=median     of a search: a run worse than the median of the others at an evaluation ends there (Optuna's
                       pruner); @random,20,0,median
    --retry=failed     also what had failed; without it a failed run is only named
    --index=K          only the K-th run of the plan, from 0
    --config.a.b=v     changes a field for all runs but those that the sweep itself gives another value

Exit codes: 0 all asked-for runs are done, 1 some are not (a list says which), 2 something in the request is wrong.
"""

import argparse
import json
import os
import sys
import time

from rich.console import Console

from experiments import command, launchers, overview, pruning, rows, runner, search, status, table, vectorize
from experiments.launchers.local import share_cores, worker_command
from experiments.planning import Sweep, headline, load, parts, search_space, validate

PATIENCE = 3.0  # seconds; longer than `runner.end_with_parent` takes


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; `overrides` holds the --config.a.b=v as "a.b=v"."""
    parser = command.Arguments("sweep", __doc__)
    parser.add_argument("action", choices=("plan", "run", "submit", "status"))
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", type=command.run_folder, required=True)
    parser.add_argument("--launcher", choices=launchers.NAMES, default="inline")
    parser.add_argument("--launcher_option", action="append", default=[])
    parser.add_argument("--workers", type=int)
    parser.add_argument("--retry", choices=("failed",))
    parser.add_argument("--watch", action="store_true")
    parser.add_argument("--index", type=int)
    parser.add_argument("--vectorize", choices=vectorize.MODES, default="auto")
    parser.add_argument("--search", choices=search.METHODS)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--search_seed", type=int, default=0)
    parser.add_argument("--prune", choices=search.PRUNERS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # K/N, set by a launcher
    parser.add_argument("--only", help=argparse.SUPPRESS)  # ID,ID, set by a launcher
    options = parser.with_overrides(argv)
    if options.search:
        options.config += f"@{options.search},{options.trials},{options.search_seed}"
        options.config += f",{options.prune}" if options.prune else ""
    elif options.prune:
        raise ValueError(f"--prune={options.prune}: it ends runs of a search: add --search=random or --search=tpe")
    return options


def run(sweep: Sweep, options: argparse.Namespace, console: Console, run_one=None) -> int:
    """Does, or submits, what is missing; returns the exit code."""
    from experiments import train

    workdir = options.workdir
    run_one = run_one or train.run
    if options.worker or options.only:
        with runner.telling_of_a_full_disk(sweep, workdir):
            work(sweep, options, console, run_one)
        return 0
    found = check(options, sweep)
    configs = [sweep.config(run) for run in sweep.runs]
    say(console, headline(sweep.source, sweep.module, configs, workdir))
    accept(sweep, build=run_one is train.run)
    rows.prepare(workdir, sweep)
    rows.tell_of_a_cut_line(workdir)
    if options.index is not None:
        sweep = sweep._replace(runs=sweep.runs[options.index : options.index + 1])
    if options.retry:
        rows.retry(workdir, sweep.runs)
    done = rows.read(workdir)
    if all(run.id in done for run in sweep.runs):
        say(console, "every run was finished already: nothing to train")
    with runner.telling_of_a_full_disk(sweep, workdir):
        if options.action == "submit":
            return submit(sweep, options, found, console)
        with rows.alone(workdir, "launcher") as other:
            if other:
                say(console, f"process {other} is a launcher at work on this folder: sharing what is missing with it")
            if options.launcher == "inline" and options.index is None and vectorize.wanted(options.vectorize):
                vectorize.launch_groups(sweep, workdir, console=console)
            elif options.launcher == "inline":
                runner.inline(sweep, workdir, run_one, console=console)
            else:
                launchers.get(options.launcher).run(sweep, workdir, worker(options), found, console)
    left = list(runner.failures(sweep, workdir))
    for line in left:
        say(console, line)
    if any(line.startswith("failed") for line in left):
        say(console, "--retry=failed runs the failed ones again")
    say(console, f"{len(sweep.runs) - len(left)} of {len(sweep.runs)} runs done: {workdir / rows.RESULTS}")
    return 1 if left else 0


def accept(sweep: Sweep, build: bool = True) -> None:
    """ValueError where a run, or the TABLE, names what is not there; `build`: models and tasks are asked too."""
    names = validate(sweep) if build else None
    if hasattr(sweep.module, "TABLE"):
        table.check(sweep, names)


def searched(sweep: Sweep, options: argparse.Namespace, console: Console, run_one=None) -> int:
    """`run`; where a search learns from results, a round after the other, each with a proposal for every worker."""
    found = search.parse(parts(sweep.source)[2])
    if found is None or found.method == "random" or options.worker or options.only:
        return run(sweep, options, console, run_one)
    if options.action == "submit":
        raise ValueError("--search=tpe learns from the results of its runs: use run, which waits for them, not submit")
    made = getattr(sweep.module, "TABLE", {})
    if "select" not in made:
        raise ValueError("--search=tpe needs TABLE['select'], the validation metric that it is to improve")
    space, lower = search_space(sweep.source, sweep.module, sweep.changes), bool(made.get("lower_is_better"))
    most = 1 if options.launcher == "inline" else options.workers or os.cpu_count() or 1
    rows.prepare(options.workdir, sweep)
    code = run(sweep, options, console, run_one) if sweep.runs else 0
    while True:
        done = rows.read(options.workdir).values()
        values = {search.key(row["overrides"]): (table.number(row, made["select"]), row.get("pruned")) for row in done}
        if not search.propose(options.workdir, space, found, sweep.changes, values, lower, most):
            return code
        sweep = load(options.config, options.overrides, options.workdir)
        code = run(sweep, options, console, run_one)


def submit(sweep: Sweep, options: argparse.Namespace, found: dict, console: Console) -> int:
    """Starts what is missing, unless somebody is at it already."""
    with rows.alone(options.workdir, "launcher") as other:
        pass
    with rows.alone(options.workdir, "submit") as submitting:
        if other or submitting:
            say(console, f"process {other or submitting} is a launcher at work on this folder: nothing submitted")
        else:
            launchers.get(options.launcher).submit(sweep, options.workdir, worker(options), found, console)
    return 0


def worker(options: argparse.Namespace) -> list[str]:
    """What a launcher starts."""
    return [*worker_command(options.config, options.workdir, options.overrides), f"--vectorize={options.vectorize}"]


def work(sweep: Sweep, options: argparse.Namespace, console: Console, run_one) -> None:
    """What a launcher starts: some runs, for as long as whoever started this lives."""
    runner.end_with_parent()
    share = (0, 1)
    if options.worker:
        share = tuple(map(int, options.worker.split("/")))
        share_cores(*share)
    names = options.only.split(",") if options.only else None
    runs = [run for run in sweep.runs if names is None or run.id in names]

    def do() -> None:
        if vectorize.wanted(options.vectorize):
            vectorize.launch_groups(sweep, options.workdir, console=console, runs=runner.in_order(runs, *share))
        else:
            runner.inline(sweep, options.workdir, run_one, console=console, worker=share, progress=False, runs=runs)

    do()
    done = rows.read(options.workdir)
    if names and any(rows.state(options.workdir, run, done) == "running" for run in runs):
        time.sleep(PATIENCE)  # a requeued job's earlier process may still be ending
        do()


def check(options: argparse.Namespace, sweep: Sweep) -> dict:
    """The launcher's options; ValueError for what does not go together."""
    if options.index is not None and not 0 <= options.index < len(sweep.runs):
        raise ValueError(f"--index={options.index}: the sweep has runs 0 to {len(sweep.runs) - 1}")
    if options.index is not None and options.vectorize == "on":
        raise ValueError("--vectorize=on: a group is more than one run: leave --index out")
    words = list(options.launcher_option)
    if options.workers is not None:
        if options.launcher != "local":
            raise ValueError(f"--workers={options.workers}: it goes with --launcher=local, not {options.launcher}")
        words.append(f"workers={options.workers}")
    if options.action == "submit" and options.launcher == "inline":
        raise ValueError("submit needs a launcher that goes on without this process: --launcher=local, slurm or ray")
    pruning.pruner(sweep, options.workdir)
    found = launchers.parse_options(options.launcher, words)
    if options.launcher != "inline":
        launchers.get(options.launcher).check(options.action, found)
    return found


def plan(sweep: Sweep, options: argparse.Namespace, console: Console, memory: bool) -> None:
    """Every run, and what all of them need."""
    accept(sweep, build=memory)
    found = overview.plan(sweep, options.workdir, together=vectorize.wanted(options.vectorize), memory=memory)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        overview.show(found, console)


def say(console: Console, line: str) -> None:
    """One line as it is: not wrapped, not coloured."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


@command.exit_code
def main(argv: list[str], run_one=None) -> int:
    options = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 240)
    sweep = load(options.config, options.overrides, options.workdir)
    if options.action in ("run", "submit"):
        return searched(sweep, options, console, run_one)
    rows.check(options.workdir, sweep)
    rows.tell_of_a_cut_line(options.workdir)
    if not sweep.runs:
        say(console, "the search has proposed no run yet")
    elif options.action == "plan":
        plan(sweep, options, console, memory=run_one is None)
    else:
        status.show(sweep, options.workdir, console, lambda: launchers.queued(options.workdir), options.watch)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
