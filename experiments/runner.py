"""What every launcher shares: doing runs one after the other in this process, their order, and how long they will take.

The launchers themselves, one file each, are in `experiments/launchers`.
"""

import contextlib
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from rich.console import Console

from experiments import pruning, rows
from experiments.planning import Run, Sweep
from xlstm_jax.checkpoint import is_full

MAPS = Path("/proc/self/maps")  # a line for each memory map of this process; Linux allows it 65,530
MANY_MAPS = 16_000


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
    """Run what is missing, one after the other; a run that fails leaves error.txt and the others go on.

    Done, failed and other processes' runs are passed over. A full disk is nobody's failure: it stops the whole queue.
    """
    pruner = pruning.pruner(sweep, workdir)
    with telling_of_a_full_disk(sweep, workdir):
        queue = in_order(sweep.runs if runs is None else runs, *worker)
        for number, run in enumerate(queue, start=1):
            with rows.claim(workdir, run) as mine:
                done = rows.read(workdir)
                if not mine or run.id in done or rows.error_file(workdir, run).exists():
                    continue
                left = [r for r in queue[number - 1 :] if r.id not in done]
                clock = clock_or_unknown(seconds_left(sweep, left, done))
                console.print(f"run {number} of {len(queue)}: {run.id} (sweep: {clock} left)", highlight=False)
                free_programs()
                folder = workdir / "runs" / run.id
                folder.mkdir(parents=True, exist_ok=True)
                start = time.monotonic()
                try:
                    judged = {"pruned": pruner(run)} if pruner else {}
                    result = run_one(sweep.config(run), folder, progress=progress, **judged)
                except Exception as error:
                    if is_full(error):
                        raise
                    rows.error_file(workdir, run).write_text(traceback.format_exc())
                    console.print(f"  failed: {one_line(error)}", highlight=False, markup=False)
                    continue
                seconds = round(time.monotonic() - start, 3)
                named = {"id": run.id, "overrides": run.overrides}
                rows.append(workdir, named | {"seconds": seconds} | result | named | {"wall_seconds": seconds})


def free_programs() -> None:
    """Drop the programs of earlier runs once they hold many memory maps, a thousand or two a run; out of them, XLA
    ends the process."""
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()


@contextlib.contextmanager
def telling_of_a_full_disk(sweep: Sweep, workdir: Path) -> Iterator[None]:
    """One line that says what is safe and what to do."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise ValueError(
            f"{workdir}: the disk is full; {len(rows.read(workdir))} of {len(sweep.runs)} results are safe:"
            " make room, and the same command goes on"
        ) from error


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


def clock_or_unknown(seconds: float | None) -> str:
    """ "about 4:05", or that nothing is known yet."""
    if seconds is None:
        return "an unknown time"
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"about {hours}:{minutes:02d}:{seconds:02d}" if hours else f"about {minutes}:{seconds:02d}"


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


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
