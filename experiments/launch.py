"""Launchers: how the missing runs of a sweep get done. `inline`: in this process; `local`: by several processes."""

import os
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from experiments import rows
from experiments.planning import ROOT, Run, Sweep

POLL = 0.5  # seconds between two looks at the workers
PLAIN_INTERVAL = 20.0  # seconds between two lines where the output is no terminal


def inline(
    sweep: Sweep,
    workdir: Path,
    run_one: Callable,
    *,
    console: Console,
    worker: tuple[int, int] = (0, 1),
    progress: bool = True,
    runs: list[Run] | None = None,
) -> None:
    """Run what is missing, one after the other; a run that fails leaves error.txt and the others go on."""
    queue = in_order(sweep.runs if runs is None else runs, *worker)
    for number, run in enumerate(queue, start=1):
        with rows.claim(workdir, run) as mine:
            done = rows.read(workdir)
            error_file = rows.error_file(workdir, run)
            if not mine or run.id in done or (worker[1] > 1 and error_file.exists()):  # failed with another worker
                continue
            left = [r for r in queue[number - 1 :] if r.id not in done]
            clock = clock_or_unknown(seconds_left(sweep, left, done))
            console.print(f"run {number} of {len(queue)}: {run.id} (sweep: {clock} left)", highlight=False)
            folder = workdir / "runs" / run.id
            folder.mkdir(parents=True, exist_ok=True)
            error_file.unlink(missing_ok=True)
            start = time.monotonic()
            try:
                result = run_one(sweep.config(run), folder, progress=progress)
            except Exception as error:
                error_file.write_text(traceback.format_exc())
                console.print(f"  failed: {one_line(error)}", highlight=False, markup=False)
                continue
            seconds = round(time.monotonic() - start, 3)
            named = {"id": run.id, "overrides": run.overrides}
            rows.append(workdir, named | {"seconds": seconds} | result | named | {"wall_seconds": seconds})


def local(
    sweep: Sweep,
    workdir: Path,
    command: list[str],
    *,
    workers: int,
    console: Console,
    title: str = "sweep",
    later: float = 0.0,
) -> None:
    """The same with `workers` processes `command --worker=K/N`, each on its share of the cores; this one only watches.

    `later` is added to the time left: what the caller still does afterwards, in seconds.
    """
    missing = [run for run in sweep.runs if run.id not in rows.read(workdir)]
    workers = max(min(workers, len(missing)), 1)
    if not missing:
        return
    (workdir / "logs").mkdir(exist_ok=True)
    for run in missing:
        rows.error_file(workdir, run).unlink(missing_ok=True)
    processes = []
    try:
        for index in range(workers):
            with open(workdir / "logs" / f"worker-{index}.txt", "ab") as log:
                environment = os.environ | {
                    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
                }
                arguments = [*command, f"--worker={index}/{workers}"]
                processes.append(
                    subprocess.Popen(arguments, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
                )
        watch(sweep, workdir, processes, console, title, later)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def watch(sweep: Sweep, workdir: Path, processes: list, console: Console, title: str, later: float) -> None:
    """Show the state of all runs until the workers have ended."""
    began: dict[str, float] = {}
    finished: set[str] = set(rows.read(workdir))
    failed: set[str] = set()
    printed = 0.0
    with Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else NoLive() as live:
        while True:
            alive = any(process.poll() is None for process in processes)
            done = rows.read(workdir)
            states = {run.id: rows.state(workdir, run, done) for run in sweep.runs}
            running = [run for run in sweep.runs if states[run.id] == "running"]
            for run in running:
                began.setdefault(run.id, time.monotonic())
            for run in sweep.runs:
                if run.id in done and run.id not in finished:
                    finished.add(run.id)
                    console.print(f"  done    {run.id}  {done[run.id]['wall_seconds']:.0f} s", highlight=False)
                if states[run.id] == "failed" and run.id in began and run.id not in failed:
                    failed.add(run.id)
                    console.print(f"  failed  {run.id}: {rows.error_file(workdir, run)}", highlight=False)
            waiting = [run for run in sweep.runs if states[run.id] == "missing"]
            left = time_left(sweep, workdir, waiting, running, began, done, len(processes))
            clock = clock_or_unknown(None if left is None else left + later)
            head = f"{title}: {len(done)} of {len(sweep.runs)} runs done, {len(running)} running, {clock} left"
            lines = [progress_line(sweep, workdir, run) for run in running]
            live.update(panel(head, lines))
            if not console.is_terminal and time.monotonic() - printed >= PLAIN_INTERVAL:
                printed = time.monotonic()
                console.print("; ".join([head, *lines]), highlight=False, soft_wrap=True)
            if not alive:
                return
            time.sleep(POLL)


class NoLive:
    """Stands in for `Live` where the output is no terminal."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, _):
        pass


def panel(head: str, lines: list[str]) -> Table:
    table = Table.grid()
    for line in [head, *(f"  {line}" for line in lines)]:
        table.add_row(line)
    return table


def progress_line(sweep: Sweep, workdir: Path, run: Run) -> str:
    """ "parity-lstm-seed0-…  step 400 of 1000, loss 0.6931"."""
    row = rows.last_metrics(workdir, run)
    if not row:
        return f"{run.id}  starting"
    return f"{run.id}  step {row['step']} of {sweep.config(run).steps}, loss {row.get('loss', float('nan')):.4f}"


def in_order(runs: list[Run], index: int = 0, workers: int = 1) -> list[Run]:
    """Runs that differ only in the seed follow each other; worker K of N begins with every N-th such group, and then
    helps with the others' from the back."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(str({k: v for k, v in run.overrides.items() if k != "seed"}), []).append(run)
    listed = list(groups.values())
    mine = listed[index::workers]
    others = [group for i, group in enumerate(listed) if i % workers != index]
    return [run for group in [*mine, *reversed(others)] for run in group]


def seconds_for(sweep: Sweep, run: Run, done: dict[str, dict]) -> float | None:
    """The config's own guess, scaled by how it did so far; else the mean of the most similar runs."""
    known = [r for r in sweep.runs if r.id in done]
    guess = sweep.expected_seconds(run)
    if guess is not None:
        guesses = sum(sweep.expected_seconds(r) or 0.0 for r in known)
        return guess * (sum(done[r.id]["wall_seconds"] for r in known) / guesses if guesses else 1.0)
    if not known:
        return None
    alike = {r.id: sum(r.overrides.get(k) == v for k, v in run.overrides.items() if k != "seed") for r in known}
    best = [done[i]["wall_seconds"] for i, count in alike.items() if count == max(alike.values())]
    return sum(best) / len(best)


def seconds_left(sweep: Sweep, waiting: list[Run], done: dict[str, dict]) -> float | None:
    """Expected duration of all `waiting` runs, one after the other; None while nothing is known."""
    each = [seconds_for(sweep, run, done) for run in waiting]
    return None if None in each else sum(each)


def time_left(
    sweep: Sweep,
    workdir: Path,
    waiting: list[Run],
    running: list[Run],
    began: dict[str, float],
    done: dict,
    workers: int,
) -> float | None:
    """Expected wall-clock until the last worker ends."""
    total = seconds_left(sweep, waiting, done)
    rest = []
    for run in running:
        spent = time.monotonic() - began[run.id]
        part = rows.last_metrics(workdir, run).get("step", 0) / sweep.config(run).steps
        whole = spent / part if part > 0.2 else seconds_for(sweep, run, done)
        rest.append(None if whole is None else max(whole - spent, 1.0))
    if total is None or None in rest:
        return None
    return max([(total + sum(rest)) / workers, *rest])


def clock_or_unknown(seconds: float | None) -> str:
    """ "about 4:05", or that nothing is known yet."""
    if seconds is None:
        return "an unknown time"
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"about {hours}:{minutes:02d}:{seconds:02d}" if hours else f"about {minutes}:{seconds:02d}"


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def share_cores(index: int, workers: int) -> None:
    """Keep a worker to its share of the cores, so that the workers do not wait for each other (Linux)."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, set(cores[index::workers]) or {cores[index % len(cores)]})


def end_with_parent() -> None:
    """A worker whose parent was killed ends too, so that its runs are free to be taken up again."""
    parent = os.getppid()

    def wait():
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def failures(sweep: Sweep, workdir: Path) -> Iterator[str]:
    """One line for each run that has no row."""
    done = rows.read(workdir)
    for run in sweep.runs:
        state = rows.state(workdir, run, done)
        if state == "failed":
            last = rows.error_file(workdir, run).read_text().strip().splitlines()[-1:] or ["(empty error.txt)"]
            yield f"failed   {run.id}: {last[0]} ({rows.error_file(workdir, run)})"
        elif state != "done":
            yield f"{state:8} {run.id}"
