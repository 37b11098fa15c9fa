"""Several processes, one program: they start, find that they agree, wait with a limit, and notice who stalls.

    start()                                   # TPU pods and SLURM say themselves who is who
    start("10.0.0.1:1234", 4, index)          # or every process is told
    agree("the config", {"steps": 100})       # ValueError on every process where one of them differs
    with Watch(limit=600) as watch:           # ends the process where no step was done for so long, says who is behind
        watch.beat(step)

Processes talk through the key-value store of JAX's coordinator, which lives in process 0. A process that dies is
noticed by the heartbeats of JAX itself, which then ends the others. With one process all of this does nothing.
"""

import itertools
import json
import os
import sys
import threading
import time
from typing import Any

import jax
from jax._src.distributed import global_state  # the store has no public name

STALLED = 75  # exit code (EX_TEMPFAIL) of a process that has waited for too long: start the job again
_meetings = itertools.count()


def start(
    address: str | None = None,
    count: int | None = None,
    index: int | None = None,
    *,
    wait: float | int = 300,
    heartbeat: float | int = 60,
) -> None:
    """Joins the other processes; what is not given is found out by JAX (TPU, SLURM, Open MPI, Kubernetes).

    address: "host:port" of process 0; wait: seconds for all to come; heartbeat: seconds after which a silent one counts
    as dead.
    """
    given = {"address": address, "count": count, "index": index}
    if None not in given.values():
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"address is {address!r}: host:port of process 0 is needed")
        if not 0 <= index < count:
            raise ValueError(f"index is {index}: the number of one of {count} processes is needed, counted from 0")
    seconds = dict(initialization_timeout=int(wait), heartbeat_timeout_seconds=int(heartbeat))
    try:
        jax.distributed.initialize(address, count, index, **seconds)
    except (ValueError, RuntimeError) as error:
        missing = ", ".join(name for name, value in given.items() if value is None)
        hint = f"; not given: {missing}" if missing else ""
        words = " ".join(str(error).split())
        raise RuntimeError(f"the processes did not come together within {wait} s{hint} ({words[:300]})") from None


def meet(wait: float | int = 300, what: str = "to go on") -> None:
    """Returns when every process has called it as often as this one; RuntimeError names those that do not come."""
    folder = f"meet/{next(_meetings)}"
    _tell(folder, "here")
    _all_told(folder, wait, what)


def agree(what: str, values: dict[str, Any], wait: float | int = 300) -> None:
    """ValueError, the same on every process, where a value (plain JSON) is not the same on all of them."""
    folder = f"agree/{next(_meetings)}"
    _tell(folder, json.dumps(values, sort_keys=True))
    told = {rank: json.loads(text) for rank, text in _all_told(folder, wait, f"to compare {what}").items()}
    names = {name: None for each in told.values() for name in each}
    for name in names:
        ranks: dict[str, list[int]] = {}
        for rank in sorted(told):
            ranks.setdefault(repr(told[rank].get(name)), []).append(rank)
        if len(ranks) > 1:
            found = "; ".join(f"{value} on process {', '.join(map(str, some))}" for value, some in ranks.items())
            raise ValueError(f"the processes differ in {what}: {name} is {found}")


class Watch:
    """Ends this process with exit code 75 where `beat` was not called for `limit` seconds; says who is how far.

    0 or one process: it watches nothing.
    """

    def __init__(self, limit: float | int = 600):
        self.limit, self._step, self._last, self._done = limit, 0, time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True) if limit and jax.process_count() > 1 else None

    def beat(self, step: int) -> None:
        """This process has done the step."""
        self._step, self._last = step, time.monotonic()

    def _run(self) -> None:
        told = None
        while not self._done.wait(min(self.limit / 4, 10)):
            if told != self._step:
                told = self._step
                _tell("beat", str(told))
            if time.monotonic() - self._last > self.limit:
                steps = {rank: int(text) for rank, text in _told("beat").items()}
                least = min(steps.values(), default=0)
                behind = [rank for rank in range(jax.process_count()) if steps.get(rank, 0) == least]
                print(
                    f"process {jax.process_index()}: no step for {self.limit} s, the last was {self._step}; furthest "
                    f"behind, at step {least}: process {', '.join(map(str, behind))}. Ending: start the job again",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(STALLED)

    def __enter__(self):
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()


def _tell(folder: str, text: str) -> None:
    if jax.process_count() > 1:
        global_state.client.key_value_set(f"xlstm_jax/{folder}/{jax.process_index()}", text, allow_overwrite=True)


def _told(folder: str) -> dict[int, str]:
    """What each process has told so far."""
    if jax.process_count() == 1:
        return {}
    return {
        int(key.rpartition("/")[2]): text for key, text in global_state.client.key_value_dir_get(f"xlstm_jax/{folder}/")
    }


def _all_told(folder: str, wait: float | int, what: str) -> dict[int, str]:
    deadline = time.monotonic() + wait
    while len(told := _told(folder)) < jax.process_count() > 1:
        if time.monotonic() > deadline:
            missing = [str(rank) for rank in range(jax.process_count()) if rank not in told]
            raise RuntimeError(f"waited {wait} s {what}: process {', '.join(missing)} did not come")
        time.sleep(0.05)
    return told
