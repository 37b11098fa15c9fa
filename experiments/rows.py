"""The folder of a sweep: which config it belongs to, which runs are done, and who is at work on which.

DIR/sweep.json       the base config; another config is refused
DIR/results.jsonl    one row a finished run
DIR/submitted.jsonl  one row a job that was handed to a cluster: its runs, and its name there
DIR/runs/<id>/       the run's own folder; error.txt if it failed, error-1.txt, … from earlier attempts
DIR/locks/<id>       held by the process that runs it (its number is in it), released by the system even if it is killed
DIR/logs/            what workers and jobs printed

A row's `seconds` are those of training and evaluation, added up over all calls that it took (a killed run's first part
included); its `wall_seconds` are those of the last call alone, set-up included: what the time left is reckoned from.
"""

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.build import flatten
from experiments.planning import Run, Sweep
from xlstm_jax import metrics

RESULTS = "results.jsonl"


def prepare(workdir: Path, sweep: Sweep) -> None:
    """Make the folder this sweep's; refuse one that cannot be written or that holds another config's runs."""
    try:
        for name in ("runs", "locks", "logs"):
            (workdir / name).mkdir(parents=True, exist_ok=True)
        check(workdir, sweep)
        if not (workdir / "sweep.json").exists():
            metrics.write_json(workdir / "sweep.json", {"source": sweep.source, "config": sweep.base.to_dict()})
    except OSError as error:
        raise ValueError(f"--workdir={workdir}: cannot be written ({error.strerror}); choose another folder") from None


def check(workdir: Path, sweep: Sweep) -> None:
    """Refuse a folder that holds the runs of another config."""
    file = workdir / "sweep.json"
    if not file.exists():
        if read(workdir):
            raise ValueError(
                f"{workdir} has results and no sweep.json, which says of what config they are: choose another --workdir"
            )
        return
    try:
        there = flatten(json.loads(file.read_text())["config"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{file} is damaged: it must hold the sweep's config; move it away or choose another folder"
        ) from None
    here = flatten(json.loads(json.dumps(sweep.base.to_dict())))
    missing = object()
    names = [n for n in sorted(there | here) if there.get(n, missing) != here.get(n, missing)]
    if names:
        shown = "; ".join(f"{n}: {there.get(n, 'absent')} there, {here.get(n, 'absent')} here" for n in names[:6])
        more = f"; and {len(names) - 6} more" if len(names) > 6 else ""
        raise ValueError(f"{workdir} holds the sweep of another config ({shown}{more}); choose another --workdir")


def read(workdir: Path) -> dict[str, dict]:
    """Rows of the finished runs by id; a last line cut short by a kill is left out."""
    found = {}
    for number, row in enumerate(metrics.read(workdir / RESULTS), start=1):
        if not row.keys() >= {"id", "overrides"}:
            raise ValueError(f"{workdir / RESULTS}, line {number} is no result row: restore or delete the line")
        found[row["id"]] = row
    return found


def tell_of_a_cut_line(workdir: Path) -> None:
    """One line on stderr if a kill in the middle of a write has cut the last row; `append` removes it."""
    file = workdir / RESULTS
    if not file.exists():
        return
    with open(file, "rb") as lines:
        fcntl.flock(lines, fcntl.LOCK_SH)  # nobody is writing now
        last = lines.read().rpartition(b"\n")[2]
    if last:
        words = f"its last line was cut, {len(last)} bytes of a row, and is left out; nothing else is lost"
        print(f"{file}: {words}", file=sys.stderr)


def append(workdir: Path, row: dict[str, Any]) -> None:
    """Add one row, whole and on disk when this returns; a cut last line is removed first; no id twice."""
    with open(workdir / RESULTS, "a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        if row["id"] in read(workdir):
            return
        file.truncate(whole)
        line = memoryview(json.dumps(row).encode() + b"\n")
        try:
            while line:
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        except OSError:  # a full disk: nothing of the row stays
            file.truncate(whole)
            raise


@contextlib.contextmanager
def claim(workdir: Path, run: Run) -> Iterator[bool]:
    """True while this process alone may run it; False if another process is at it."""
    with open(workdir / "locks" / run.id, "a+") as file:
        mine = any(_locked(file, fcntl.LOCK_EX, wait) for wait in (0.0, 0.02, 0.05))
        if mine:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield mine


@contextlib.contextmanager
def alone(workdir: Path, what: str) -> Iterator[str | None]:
    """None while this process alone does `what` in the folder; else the number of the process that is at it."""
    with open(workdir / "locks" / f".{what}", "a+") as file:
        if _locked(file, fcntl.LOCK_EX):
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield None
        else:
            file.seek(0)
            yield file.read() or "unknown"


def retry(workdir: Path, runs: list[Run]) -> None:
    """Let the failed runs be missing again; their error.txt stays as error-1.txt, error-2.txt, …"""
    for run in runs:
        with claim(workdir, run) as mine:
            if mine and (file := error_file(workdir, run)).exists():
                number = sum(1 for _ in file.parent.glob("error-*.txt")) + 1
                file.rename(file.with_name(f"error-{number}.txt"))


def holder(workdir: Path, run: Run) -> tuple[int, float] | None:
    """Number of the process that last took up the run, and when (seconds since 1970)."""
    lock = workdir / "locks" / run.id
    try:
        return int(lock.read_text()), lock.stat().st_mtime
    except (OSError, ValueError):
        return None


def _locked(file, kind: int, wait: float = 0.0) -> bool:
    """Whether the lock could be taken, after `wait` seconds: `state` of another process holds it for a moment only."""
    time.sleep(wait)
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def state(workdir: Path, run: Run, done: dict[str, dict]) -> str:
    """ "done", "running", "failed" or "missing"."""
    if run.id in done:
        return "done"
    lock = workdir / "locks" / run.id
    if lock.exists():
        with open(lock) as file:
            if not _locked(file, fcntl.LOCK_SH):
                return "running"
    return "failed" if error_file(workdir, run).exists() else "missing"


def error_file(workdir: Path, run: Run) -> Path:
    return workdir / "runs" / run.id / "error.txt"


def last_metrics(workdir: Path, run: Run) -> dict:
    """The newest training row that the run has written, or {}."""
    return _last(workdir / "runs" / run.id / "metrics.jsonl", lambda row: row.get("split") == "train")


def steps_per_second(workdir: Path, run: Run) -> float | None:
    """The newest speed that the run has written."""
    return _last(workdir / "runs" / run.id / "timing.jsonl", lambda row: True).get("steps_per_second")


def _last(file: Path, wanted: Callable[[dict], bool]) -> dict:
    """The last wanted row among the last few kilobytes of a JSON-lines file, or {}."""
    if not file.exists():
        return {}
    with open(file, "rb") as lines:
        lines.seek(max(file.stat().st_size - 4096, 0))
        for line in reversed(lines.read().split(b"\n")[:-1]):
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and wanted(row):
                    return row
    return {}
