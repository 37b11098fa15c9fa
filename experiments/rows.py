"""The folder of a sweep: which config it belongs to, which runs are done, and who is at work on which.

DIR/sweep.json       the base config; another config is refused
DIR/results.jsonl    one row a finished run
DIR/runs/<id>/       the run's own folder; error.txt if it failed
DIR/locks/<id>       held by the process that runs it, released by the system even if that process is killed

A row's `seconds` are those of training and evaluation, added up over all calls that it took (a killed run's first part
included); its `wall_seconds` are those of the last call alone, set-up included: what the time left is reckoned from.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.build import flatten
from experiments.planning import Run, Sweep
from xlstm_jax import metrics

RESULTS = "results.jsonl"


def prepare(workdir: Path, sweep: Sweep) -> None:
    """Make the folder this sweep's; refuse one that cannot be written or that holds another config's runs."""
    try:
        for name in ("runs", "locks"):
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


def append(workdir: Path, row: dict[str, Any]) -> None:
    """Add one row, whole and on disk when this returns; a cut last line is removed first; no id twice."""
    with open(workdir / RESULTS, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        if row["id"] in read(workdir):
            return
        file.truncate(content.rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def claim(workdir: Path, run: Run) -> Iterator[bool]:
    """True while this process alone may run it; False if another process is at it."""
    with open(workdir / "locks" / run.id, "w") as file:
        yield any(_locked(file, fcntl.LOCK_EX, wait) for wait in (0.0, 0.02, 0.05))


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
    file = workdir / "runs" / run.id / "metrics.jsonl"
    if not file.exists():
        return {}
    with open(file, "rb") as lines:
        lines.seek(max(file.stat().st_size - 4096, 0))
        for line in reversed(lines.read().split(b"\n")[:-1]):
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and row.get("split") == "train":
                    return row
    return {}
