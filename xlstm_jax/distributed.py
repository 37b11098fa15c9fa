"""Several processes, one program: they start, find that they agree, wait with a limit, and notice who stalls.

    start()                                   # TPU pods and SLURM say themselves who is who
    start("10.0.0.1:1234", 4, index)          # or every process is told
    agree("the config", {"steps": 100})       # ValueError on every process where one of them differs
    with together("read the data"):           # an error of one process becomes one of every process
        ...
    with Stop() as stop, Watch(limit=600) as watch:
        watch.beat(step)                      # ends the process where no step was done for so long, says who is behind
        stop.told()                           # SIGTERM, or a notice of preemption: True at the same step on all of them

Processes talk through the key-value store of JAX's coordinator, which lives in process 0. A process that dies is
noticed by the heartbeats of JAX itself, which then ends the others: with exit code 75 and a line that says so. With one
process all of this does nothing, but that SIGTERM is heard.
"""

import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TextIO
from unittest import mock

import jax
from jax._src.distributed import _jax, global_state  # the store, and the limit of a start, have no public names
from jax.experimental import multihost_utils

GRACE = 10  # seconds after which one that process 0 does not answer ends by itself
AGAIN = 75  # exit code (EX_TEMPFAIL): told to stop, or a process stalled or was lost; the same command goes on
_meetings = itertools.count()
_handlers = []  # of signals, kept alive
_questions = itertools.count(1)  # JAX names one of them, the same on all processes, as that at which all stop


class Missing(RuntimeError):
    """Another process did not come."""


def join(processes: str, **options: float | int) -> None:
    """`start` as a command line says it: auto; HOST:PORT,COUNT,INDEX; HOST:PORT, where SLURM knows the rest."""
    if processes == "auto":
        return start(**options)
    address, *numbers = processes.split(",")
    if not numbers:
        numbers = [os.environ.get(name, "") for name in ("SLURM_NTASKS", "SLURM_PROCID")]
    if len(numbers) != 2 or not all(number.strip().isdecimal() for number in numbers):
        raise ValueError(
            f"processes is {processes!r}: auto, HOST:PORT,COUNT,INDEX or, under SLURM (SLURM_NTASKS, SLURM_PROCID),"
            " HOST:PORT is needed"
        )
    start(address, *map(int, numbers), **options)


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
    if not wait > 0:
        raise ValueError(f"the limit of a start is {wait}: seconds are needed, more than 0")
    if heartbeat < 1:
        raise ValueError(f"heartbeat is {heartbeat}: seconds are needed, at least 1")
    given = {"address": address, "count": count, "index": index}
    if None not in given.values():
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"address is {address!r}: host:port of process 0 is needed")
        if not 0 <= index < count:
            raise ValueError(f"index is {index}: the number of one of {count} processes is needed, counted from 0")
    seconds = dict(initialization_timeout=int(wait) + 60, heartbeat_timeout_seconds=int(heartbeat))
    if None not in given.values():
        seconds["cluster_detection_method"] = "deactivate"  # SLURM's would leave each process one GPU of its node
    with _held_back() as (stderr, held):
        me = "this process" if index is None else f"process {index}"
        unheard = f"nothing was heard of process 0{f' at {address}' if address else ''} for {wait} s"
        alarm = threading.Timer(wait + GRACE, _end, (me, unheard, stderr))
        alarm.daemon = True
        alarm.start()
        _on_abort(lambda: _end(me, _who_did_not_come(_text(held), wait), stderr))
        limited = partial(_jax.get_distributed_runtime_service, cluster_register_timeout=max(int(wait), 1))
        try:
            with mock.patch.object(_jax, "get_distributed_runtime_service", limited):
                jax.distributed.initialize(address, count, index, **seconds)
        except (ValueError, RuntimeError) as error:
            missing = ", ".join(name for name, value in given.items() if value is None)
            hint = f"; not given, and to be found out from TPU, SLURM or the like: {missing}" if missing else ""
            words = " ".join(str(error).split())
            raise RuntimeError(f"the processes did not come together within {wait} s{hint} ({words[:300]})") from None
        finally:
            alarm.cancel()
    _on_abort(_another_was_lost)
    if global_state.client is not None:
        _same_count(wait)


def _same_count(wait: float | int) -> None:
    """ValueError on every process where one was told of another number of processes than process 0."""

    def told(rank):
        return int(global_state.client.blocking_key_value_get(f"xlstm_jax/count/{rank}", int(1000 * wait)))

    global_state.client.key_value_set(f"xlstm_jax/count/{global_state.process_id}", str(global_state.num_processes))
    counts = [told(rank) for rank in range(told(0))]
    if set(counts) != {len(counts)}:
        raise ValueError(f"processes 0, 1, ... were told differently how many they are: {', '.join(map(str, counts))}")


@contextlib.contextmanager
def _held_back() -> Iterator[tuple[TextIO, TextIO]]:
    """Standard error, and the file that takes what anybody, JAX's C++ too, writes to it until the end of the block."""
    sys.stderr.flush()
    with os.fdopen(os.dup(2), "w") as stderr, tempfile.TemporaryFile("w+", errors="replace") as held:
        os.dup2(held.fileno(), 2)
        try:
            yield stderr, held
        finally:
            sys.stderr.flush()
            os.dup2(stderr.fileno(), 2)
            stderr.write(_text(held))


def _text(file: TextIO) -> str:
    file.seek(0)
    return file.read()


def _who_did_not_come(said: str, wait: float | int) -> str:
    """One line of what JAX says before it aborts at the start."""
    listed = re.search(r"timed out task names:\n((?:\S*\d\n)+)", said)
    if listed is None:
        return f"the others did not come within {wait} s ({' '.join(said.split())[:300]})"
    ranks = sorted(int(name) for name in re.findall(r"(\d+)\n", listed[1]))
    return f"waited {wait} s for all to come: process {', '.join(map(str, ranks))} did not"


def _on_abort(tell: Callable[[], None]) -> None:
    """JAX aborts where others do not come, where the coordinator says that one is lost, or is lost itself.

    Python's own handlers do not run then, so this is one of C.
    """
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: tell())
    _handlers.append(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)


def _another_was_lost() -> None:
    if threading.get_native_id() != threading.main_thread().native_id:  # else it is an error of this process
        _end(f"process {global_state.process_id}", "another process was lost, as is said above")


def _end(me: str, words: str, file: TextIO | None = None) -> None:
    """Ends this process from any thread, with one line."""
    print(f"error: {me}: {words}. Ending: start the job again", file=file or sys.stderr, flush=True)
    os._exit(AGAIN)


def meet(wait: float | int = 300, what: str = "to go on") -> None:
    """Returns when every process has called it as often as this one; `Missing` names those that do not come."""
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


@contextlib.contextmanager
def together(what: str, wait: float | int = 300) -> Iterator[None]:
    """A ValueError or OSError of one process within the block is raised on every one, when all are at its end."""
    error = None
    try:
        yield
    except (ValueError, OSError) as caught:
        error = caught
    folder = f"together/{next(_meetings)}"
    _tell(folder, "" if error is None else str(error))
    told = _all_told(folder, wait, f"to {what}")
    if error is not None:
        raise error
    for rank in sorted(rank for rank, text in told.items() if text):
        raise ValueError(f"process {rank}: {told[rank]}")


def of_first(what: str, call: Callable[[], Any], wait: float | int = 300) -> Any:
    """What `call` returns on process 0, plain JSON, on every process; none but process 0 calls it."""
    folder, value = f"first/{next(_meetings)}", None
    with together(what, wait):
        if global_state.process_id == 0:
            value = call()
            _tell(folder, json.dumps(value))
    return value if _count() == 1 else json.loads(_told(folder)[0])


def leave(code: int, wait: float | int = 300) -> int:
    """The exit code, when all others are here too; where they do not come, ends this process, and JAX then them."""
    if global_state.client is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            global_state.client.wait_at_barrier("xlstm_jax/leave", int(1000 * wait))
        except jax.errors.JaxRuntimeError:
            os._exit(code)
    return code


class Stop:
    """Whether this job was told to stop: SIGTERM to any of its processes, or a notice that its machine is taken away.

    Several processes agree on the question that is answered with yes, so all must ask equally often.
    """

    def __init__(self):
        self._told, self._alone, self._before = False, global_state.client is None, None

    def told(self) -> bool:
        """Asked between steps; what comes meanwhile waits for the next question."""
        if not self._told and not self._alone:
            self._told = multihost_utils.reached_preemption_sync_point(next(_questions))
        return self._told

    def _hear(self, *_) -> None:
        self._told = True

    def __enter__(self):
        if self._alone:  # else JAX listens
            self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *_):
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


class Watch:
    """Ends this process with exit code 75 where `beat` was not called for `limit` seconds; says who is how far.

    0 or one process: it watches nothing.
    """

    def __init__(self, limit: float | int = 600):
        self.limit, self._step, self._last, self._done = limit, 0, time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True) if limit and _count() > 1 else None

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
                behind = [rank for rank in range(_count()) if steps.get(rank, 0) == least]
                furthest = f"furthest behind, at step {least}: process {', '.join(map(str, behind))}"
                words = f"no step for {self.limit} s, the last was {self._step}; {furthest}"
                _end(f"process {global_state.process_id}", words)

    def __enter__(self):
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()


def _count() -> int:
    """Of the processes that `start` brought together; asks no device, as jax.process_count does."""
    return 1 if global_state.client is None else global_state.num_processes


def _tell(folder: str, text: str) -> None:
    if _count() > 1:
        global_state.client.key_value_set(f"xlstm_jax/{folder}/{global_state.process_id}", text, allow_overwrite=True)


def _told(folder: str) -> dict[int, str]:
    """What each process has told so far."""
    if _count() == 1:
        return {}
    return {
        int(key.rpartition("/")[2]): text for key, text in global_state.client.key_value_dir_get(f"xlstm_jax/{folder}/")
    }


def _all_told(folder: str, wait: float | int, what: str) -> dict[int, str]:
    deadline = time.monotonic() + wait
    while len(told := _told(folder)) < _count() > 1:
        if time.monotonic() > deadline:
            missing = [str(rank) for rank in range(_count()) if rank not in told]
            raise Missing(f"waited {wait} s {what}: process {', '.join(missing)} did not come")
        time.sleep(0.05)
    return told
