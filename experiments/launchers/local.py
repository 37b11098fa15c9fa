"""Several processes on this machine: one a core, or as many as the memory holds; a killed one is replaced."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from experiments import launchers, rows, status
from experiments.planning import ROOT, Run, Sweep

OPTIONS = {
    "workers": (int, "the largest number of processes"),
    "memory": (float, "the GB that one run may need"),
}
MEMORY = 1.0  # GB for one run, where nothing is said
FULL = 1e6  # bytes; with less left on the disk a worker that fails has failed for it
KILLS = 2  # a run during which its worker was killed that often has failed


def check(action: str, options: dict) -> None:
    """It can always be used."""


def run(
    sweep: Sweep,
    workdir: Path,
    command: list[str],
    options: dict,
    console: Console,
    *,
    title: str = "sweep",
    later: float = 0.0,
) -> None:
    """Workers on their share of the cores, until none has anything to do; this process only watches.

    `later` is added to the time left: what the caller still does afterwards, in seconds.
    """
    done = rows.read(workdir)
    missing = [each for each in sweep.runs if rows.state(workdir, each, done) == "missing"]
    if missing:
        pool = Pool(sweep, workdir, command, min(count(options), len(missing)), console)
        try:
            status.watch(sweep, workdir, pool.alive, pool.size, console, title, later)
        finally:
            pool.close()


def submit(sweep: Sweep, workdir: Path, command: list[str], options: dict, console: Console) -> None:
    """The same in a process of its own, which survives this one."""
    if not launchers.to_submit(sweep, workdir, console):
        return
    flags = [f"--launcher_option={name}={value}" for name, value in options.items()]
    log = workdir / "logs" / "launcher.txt"
    with open(log, "ab") as file:
        process = subprocess.Popen(
            [*command, "--launcher=local", *flags],
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            env=environment(),
            start_new_session=True,
        )
    console.print(f"process {process.pid} goes on by itself: {log}", highlight=False, markup=False, soft_wrap=True)


def count(options: dict) -> int:
    """Number of workers: one a core, fewer where the memory does not hold them, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = free_memory()
    fitting = cores if free is None else int(free / (options.get("memory", MEMORY) * 1e9))
    return max(min(cores, fitting, options.get("workers", cores)), 1)


def free_memory(root: Path = Path("/")) -> float | None:
    """Bytes that processes may still take: the machine's, or this container's where that is less (Linux)."""
    found = []
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(float(line.split()[1]) * 1024)
        group = root / "sys/fs/cgroup"
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            found.append(float(limit) - float((group / "memory.current").read_text()))
    except OSError:
        pass  # another system, or no limit
    return min(found, default=None)


def environment() -> dict[str, str]:
    """This process's, with the source tree on the path."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def share_cores(index: int, workers: int) -> None:
    """Keep a worker to its share of the cores, so that the workers do not wait for each other (Linux)."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, set(cores[index::workers]) or {cores[index % len(cores)]})


class Pool:
    """The worker processes."""

    def __init__(self, sweep: Sweep, workdir: Path, command: list[str], size: int, console: Console):
        self._sweep, self._workdir, self._command, self._console = sweep, workdir, command, console
        self.size = size
        self._kills: dict[str, int] = {}
        self._processes: dict[int, subprocess.Popen] = {}
        for index in range(size):
            self._start(index)

    def _start(self, index: int) -> None:
        with open(self._log(index), "ab") as log:
            self._processes[index] = subprocess.Popen(
                [*self._command, f"--worker={index}/{self.size}"],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment(),
            )

    def alive(self) -> bool:
        """Whether any worker is at work; replaces those that were killed."""
        for index, process in list(self._processes.items()):
            code = process.poll()
            if code is None:
                continue
            del self._processes[index]
            if code < 0:
                self._killed(index, process.pid, code)
            elif code > 0 and shutil.disk_usage(self._workdir).free < FULL:  # nor has its log a word of it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            elif code > 0:
                log = self._log(index)
                last = log.read_text(errors="replace").strip().splitlines()[-1:] or [f"exit code {code}"]
                self._say(f"worker {index} has ended: {last[0]} ({log})")
        return bool(self._processes)

    def _killed(self, index: int, number: int, code: int) -> None:
        """Another worker in its place; the run that it was at fails where this happens again and again."""
        word = f"killed ({signal.Signals(-code).name})"
        done = rows.read(self._workdir)
        waiting = [run for run in self._sweep.runs if rows.state(self._workdir, run, done) == "missing"]
        for run in waiting:
            if (rows.holder(self._workdir, run) or (None,))[0] == number:
                self._kills[run.id] = self._kills.get(run.id, 0) + 1
                if self._kills[run.id] >= KILLS:
                    self._give_up(run, index, word)
        if any(rows.state(self._workdir, run, done) == "missing" for run in waiting):
            self._say(f"worker {index} was {word}: another takes its place")
            self._start(index)

    def _give_up(self, run: Run, index: int, word: str) -> None:
        with rows.claim(self._workdir, run) as mine:
            if mine and run.id not in rows.read(self._workdir):
                folder = self._workdir / "runs" / run.id
                folder.mkdir(parents=True, exist_ok=True)
                text = f"its process was {word} {KILLS} times: out of memory? (--launcher_option=memory=GB)"
                rows.error_file(self._workdir, run).write_text(f"{text}; its log: {self._log(index)}\n")

    def _log(self, index: int) -> Path:
        """What worker `index` prints."""
        return self._workdir / "logs" / f"worker-{index}.txt"

    def _say(self, line: str) -> None:
        self._console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """End what is still alive."""
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            process.wait()


def worker_command(source: str, workdir: Path, overrides: list[str] | tuple[str, ...] = ()) -> list[str]:
    """What a launcher starts."""
    path, colon, arg = source.partition(":")
    source = f"{Path(path).absolute()}{colon}{arg}"
    changed = [f"--config.{word}" for word in overrides]
    folder = f"--workdir={workdir.absolute()}"
    return [sys.executable, "-m", "experiments.sweep", "run", f"--config={source}", folder, *changed]
