"""A run folder belongs to one job at a time, and all processes of that job see the same one."""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from xlstm_jax import distributed

LOCK = "lock"  # in the folder; locked as long as a job lives, and left behind
LOST = 120  # seconds for which a file server may keep the lock of a machine that is lost
SHARED = 10  # seconds for what one machine writes to be seen by another


@contextlib.contextmanager
def owned(workdir: Path) -> Iterator[None]:
    """A job's alone until the block ends; ValueError on every process where another job has the folder, or where a
    process sees another folder than process 0."""
    with contextlib.ExitStack() as held:
        mark = distributed.of_first("take the folder of the run", lambda: held.enter_context(_taken(workdir, LOST)))
        with distributed.together("find the folder of the run"):
            if jax.process_index():
                _find(workdir, mark, SHARED)
        yield


@contextlib.contextmanager
def _taken(workdir: Path, lost: float | int) -> Iterator[str]:
    """The mark of this job, in the locked file; a holder on this machine is alive, one on another may be lost."""
    host, mark, deadline = socket.gethostname(), secrets.token_hex(8), time.monotonic() + lost
    with open(workdir / LOCK, "a+", encoding="utf-8") as file:
        while not _locked(file):
            holder = _content(workdir)
            if holder.get("host") == host or time.monotonic() > deadline:
                raise ValueError(
                    f"workdir {workdir} is in use by process {holder.get('process')} on {holder.get('host')}: stop it,"
                    " or choose another folder"
                )
            time.sleep(min(1, lost / 4))
        file.truncate(0)
        file.write(json.dumps({"host": host, "process": os.getpid(), "mark": mark}))
        file.flush()
        yield mark


def _find(workdir: Path, mark: str, patience: float | int) -> None:
    deadline = time.monotonic() + patience
    while _content(workdir).get("mark") != mark:
        if time.monotonic() > deadline:
            raise ValueError(f"workdir {workdir} is not the folder that process 0 sees: all need one that they share")
        time.sleep(min(0.2, patience / 4))


def _content(workdir: Path) -> dict[str, str | int]:
    try:
        return json.loads((workdir / LOCK).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or not whole yet
        return {}


def _locked(file) -> bool:
    """Whether the lock could be taken; on a file system without locks, always."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
