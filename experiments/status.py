"""How far a sweep is: the state of every run, the best so far, steps a second, the time left; once or live."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from experiments import rows, runner
from experiments.planning import Run, Sweep

POLL = 0.5  # seconds between two looks
PLAIN_INTERVAL = 20.0  # seconds between two lines where the output is no terminal
STATES = ("done", "running", "queued", "failed", "missing")
STYLES = {"done": "green", "running": "cyan", "queued": "blue", "failed": "bold red", "missing": "dim"}
GUESSES = (("valid_accuracy", max), ("valid_loss", min))  # what "best" means where the config has no TABLE


class Snapshot(NamedTuple):
    """A sweep at one moment."""

    done: dict[str, dict]
    states: dict[str, str]
    speeds: dict[str, float]  # steps a second of the running ones
    best: tuple[str, str, float] | None  # run, metric, value

    def count(self, state: str) -> int:
        return list(self.states.values()).count(state)


def snapshot(sweep: Sweep, workdir: Path, queued: Callable[[], set[str]] = set) -> Snapshot:
    """Reads the folder; `queued` names the runs that wait in a cluster's queue."""
    done = rows.read(workdir)
    states = {run.id: rows.state(workdir, run, done) for run in sweep.runs}
    waiting = queued() if "missing" in states.values() else set()
    states = {name: "queued" if state == "missing" and name in waiting else state for name, state in states.items()}
    speeds = {run.id: rows.steps_per_second(workdir, run) for run in sweep.runs if states[run.id] == "running"}
    return Snapshot(done, states, {name: speed for name, speed in speeds.items() if speed}, best(sweep, done))


def best(sweep: Sweep, done: dict[str, dict]) -> tuple[str, str, float] | None:
    """(run, metric, value) of the best finished run, by what the TABLE selects on, else by validation."""
    table = getattr(sweep.module, "TABLE", {})
    wanted = [(table.get("select", table.get("metric")), min if table.get("lower_is_better") else max), *GUESSES]
    for metric, better in wanted:
        whole = [run.id for run in sweep.runs if run.id in done and "pruned" not in done[run.id]]
        scores = {name: done[name].get(metric) for name in whole}
        found = {name: value for name, value in scores.items() if isinstance(value, float) and math.isfinite(value)}
        if found:
            name = better(found, key=found.get)
            return name, metric, found[name]
    return None


def time_left(sweep: Sweep, workdir: Path, seen: Snapshot, workers: int) -> float | None:
    """Expected wall-clock until the last of `workers` processes ends, in seconds; None while nothing is known."""
    waiting = [run for run in sweep.runs if seen.states[run.id] in ("missing", "queued")]
    total, rest = runner.seconds_left(sweep, waiting, seen.done), []
    for run in (run for run in sweep.runs if seen.states[run.id] == "running"):
        _, began = rows.holder(workdir, run) or (None, time.time())
        spent = max(time.time() - began, 0.0)
        part = rows.last_metrics(workdir, run).get("step", 0) / sweep.config(run).steps
        whole = spent / part if part > 0.2 else runner.seconds_for(sweep, run, seen.done)
        rest.append(None if whole is None else max(whole - spent, 1.0))
    if total is None or None in rest:
        return None
    return max([(total + sum(rest)) / max(workers, 1), *rest])


def summary(sweep: Sweep, workdir: Path, seen: Snapshot, workers: int) -> str:
    """ "3 done, 1 running, …; best valid_accuracy 0.9871 (id); 812 steps/s; about 1:05 left"."""
    words = [", ".join(f"{seen.count(s)} {s}" for s in STATES if s != "queued" or seen.count(s))]
    if pruned := sum("pruned" in row for row in seen.done.values()):
        words.append(f"{pruned} of them pruned")
    if seen.best:
        name, metric, value = seen.best
        words.append(f"best {metric} {value:.4f} ({name})")
    if seen.speeds:
        words.append(f"{sum(seen.speeds.values()):.4g} steps/s")
    if seen.count("missing") + seen.count("running") + seen.count("queued"):
        left = runner.clock_or_unknown(time_left(sweep, workdir, seen, workers))
        words.append(f"{left} left" + (", one run after the other" if workers == 1 else ""))
    return "; ".join(words)


def table(sweep: Sweep, workdir: Path, seen: Snapshot, height: int | None = None) -> Table:
    """One line a run; where `height` does not hold all: the best, running and failed ones, the rest counted."""
    metric = seen.best[1] if seen.best else "score"
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("#", "state", "run", "step", "steps/s", "seconds", metric):
        words = name in ("state", "run")
        grid.add_column(name, justify="left" if words else "right", no_wrap=name != "run", overflow="fold")
    shown = list(enumerate(sweep.runs))
    if height is not None and len(shown) > height:
        order = ("running", "failed", "done", "queued", "missing")
        first = seen.best[0] if seen.best else None
        shown.sort(key=lambda each: (each[1].id != first, order.index(seen.states[each[1].id])))
    for index, run in shown[:height]:
        row, state, steps = seen.done.get(run.id, {}), seen.states[run.id], sweep.config(run).steps
        step = row.get("steps") or rows.last_metrics(workdir, run).get("step")
        speed = seen.speeds.get(run.id)
        score = row.get(metric)
        mark = " *" if seen.best and run.id == seen.best[0] else ""
        grid.add_row(
            str(index),
            f"[{STYLES[state]}]{state}",
            Text(run.id),
            f"{step}/{steps}" if step else "",
            f"{speed:.4g}" if speed else "",
            f"{row['seconds']:.0f}" if "seconds" in row else "",
            f"{score:.4f}{mark}" if isinstance(score, float) else "",
        )
    if height is not None and len(shown) > height:
        grid.add_row("", "", f"and {len(shown) - height} more", style="dim")
    return grid


def show(
    sweep: Sweep, workdir: Path, console: Console, queued: Callable[[], set[str]] = set, live: bool = False
) -> None:
    """Print the table and the summary once, or keep them on the screen until every run is done or has failed."""
    if live:
        with Live(console=console, auto_refresh=False, transient=True) as screen:
            while True:
                seen = snapshot(sweep, workdir, queued)
                if seen.count("done") + seen.count("failed") == len(sweep.runs):
                    break
                lines = Group(table(sweep, workdir, seen, max(console.height - 4, 1)), summary(sweep, workdir, seen, 1))
                screen.update(lines, refresh=True)
                time.sleep(POLL)
    seen = snapshot(sweep, workdir, queued)
    console.print(table(sweep, workdir, seen), highlight=False)
    for name in sorted(seen.done.keys() - seen.states.keys()):
        console.print(f"no longer in the sweep: {name}", highlight=False, markup=False, soft_wrap=True)
    console.print(summary(sweep, workdir, seen, 1), highlight=False, markup=False, soft_wrap=True)


def watch(
    sweep: Sweep,
    workdir: Path,
    alive: Callable[[], bool],
    workers: int,
    console: Console,
    title: str,
    later: float = 0.0,
    queued: Callable[[], set[str]] = set,
) -> None:
    """Show the state of all runs while somebody is `alive` to do them; a line for each that ends."""
    told = {name for name, state in snapshot(sweep, workdir).states.items() if state in ("done", "failed")}
    printed = 0.0
    with Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else NoLive() as live:
        while True:
            going_on = alive()
            seen = snapshot(sweep, workdir, queued)
            for run in sweep.runs:
                if run.id in told or seen.states[run.id] not in ("done", "failed"):
                    continue
                told.add(run.id)
                seconds = f"{seen.done[run.id]['wall_seconds']:.0f} s" if run.id in seen.done else ""
                words = (
                    f"  done    {run.id}  {seconds}"
                    if seconds
                    else f"  failed  {run.id}: {rows.error_file(workdir, run)}"
                )
                console.print(words, highlight=False, markup=False, soft_wrap=True)
            running = [run for run in sweep.runs if seen.states[run.id] == "running"]
            left = time_left(sweep, workdir, seen, workers)
            clock = runner.clock_or_unknown(None if left is None else left + later)
            queue = f", {seen.count('queued')} queued" if seen.count("queued") else ""
            done = f"{seen.count('done')} of {len(sweep.runs)} runs done"
            head = f"{title}: {done}, {len(running)} running{queue}, {clock} left"
            lines = [progress_line(sweep, workdir, run) for run in running]
            live.update(Text("\n  ".join([head, *lines])))
            if not console.is_terminal and time.monotonic() - printed >= PLAIN_INTERVAL:
                printed = time.monotonic()
                console.print("; ".join([head, *lines]), highlight=False, markup=False, soft_wrap=True)
            if not going_on:
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


def progress_line(sweep: Sweep, workdir: Path, run: Run) -> str:
    """ "parity-lstm-seed0-…  step 400 of 1000, loss 0.6931"."""
    row = rows.last_metrics(workdir, run)
    if not row:
        return f"{run.id}  starting"
    return f"{run.id}  step {row['step']} of {sweep.config(run).steps}, loss {row.get('loss', float('nan')):.4f}"
