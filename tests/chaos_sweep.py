"""A sweep killed again and again: python tests/chaos_sweep.py [--runs=200] [--kills=10] [--folder=DIR] [--seed=0]

Runs a sweep of two-step runs with the local launcher undisturbed, then another that is killed (-9: the launcher, one
worker, or all at once) at random moments and restarted, and compares: every run there exactly once, every value equal.
--stand_in: nothing is trained and the processes are forked, seconds in all (the version in the test suite).
"""

import argparse
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console  # noqa: E402

from experiments import rows, runner  # noqa: E402
from experiments.launchers import local  # noqa: E402
from experiments.planning import load  # noqa: E402

CONFIG = str(Path(__file__).parent / "configs" / "many.py")
CLOCKS = ("seconds", "wall_seconds")


def compare(sweep, calm: Path, disturbed: Path) -> str:
    """One line; AssertionError where a run is absent, twice there, or differs in anything but its clock."""
    left, right = (
        [json.loads(line) for line in (folder / rows.RESULTS).read_text().splitlines()] for folder in (calm, disturbed)
    )
    names = sorted(run.id for run in sweep.runs)
    for found in (left, right):
        assert sorted(row["id"] for row in found) == names, "a run is absent or there twice"
    left, right = ({row["id"]: {k: v for k, v in row.items() if k not in CLOCKS} for row in f} for f in (left, right))
    assert left == right, [name for name in names if left[name] != right[name]][:3]
    return f"{len(names)} rows, each once, all equal but for {' and '.join(CLOCKS)}"


def children(process: int) -> list[int]:
    try:
        return list(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))
    except OSError:
        return []


def real(sweep, source: str, folder: Path, kills: int, chance: random.Random) -> None:
    """The real commands."""

    def start(name: str) -> subprocess.Popen:
        command = [*local.worker_command(source, folder / name), "--launcher=local"]
        with open(folder / f"{name}.txt", "ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=local.environment(), start_new_session=True)

    began = time.monotonic()
    assert start("calm").wait() == 0, (folder / "calm.txt").read_text()[-2000:]
    whole = time.monotonic() - began
    print(f"undisturbed: {len(sweep.runs)} runs in {whole:.0f} s", flush=True)
    process = start("disturbed")
    for kill in range(kills):
        time.sleep(chance.uniform(0.2, 1.5) * max(whole / kills, 6.0))
        workers, how = children(process.pid), chance.choice(("launcher", "worker", "all"))
        victims = {"launcher": [process.pid], "worker": workers[:1], "all": [process.pid, *workers]}[how]
        for victim in victims:
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                pass
        print(f"kill {kill + 1}: {how}, {len(rows.read(folder / 'disturbed'))} runs done", flush=True)
        if how != "worker" or process.poll() is not None:
            process.wait()
            process = start("disturbed")
    process.wait()
    assert start("disturbed").wait() == 0, (folder / "disturbed.txt").read_text()[-2000:]


def pretend(config, folder: Path, progress: bool = True) -> dict:
    """Stands in for training: notes each step, goes on from the noted ones, and lets nobody else in meanwhile."""
    with open(folder / "steps", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error here: two processes at one run
        for step in range(file.seek(0, os.SEEK_END), 20):
            time.sleep(0.002)
            file.write(str(step % 10))
            file.flush()
    return {"steps": config.steps, "seconds": 0.0, "valid_loss": config.seed + len((folder / "steps").read_text())}


def forked(sweep, folder: Path, kills: int, chance: random.Random) -> None:
    """Two launchers in forked processes, killed at random moments."""
    quiet = Console(file=open(os.devnull, "w"))  # noqa: SIM115

    def start(name: str, index: int) -> int:
        process = os.fork()
        if process == 0:
            runner.inline(sweep, folder / name, pretend, console=quiet, worker=(index, 2), progress=False)
            os._exit(0)
        return process

    for name, left in (("calm", 0), ("disturbed", kills)):
        rows.prepare(folder / name, sweep)
        while len(rows.read(folder / name)) < len(sweep.runs):
            processes = [start(name, index) for index in (0, 1)]
            if left:
                left -= 1
                time.sleep(chance.uniform(0.02, 0.1))
                for process in processes:
                    os.kill(process, signal.SIGKILL)
            for process in processes:
                os.waitpid(process, 0)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--stand_in", action="store_true")
    options = parser.parse_args(argv)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    source, chance = f"{CONFIG}:{options.runs}", random.Random(options.seed)
    sweep = load(source)
    if options.stand_in:
        forked(sweep, folder, options.kills, chance)
    else:
        real(sweep, source, folder, options.kills, chance)
    print(compare(sweep, folder / "calm", folder / "disturbed"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
