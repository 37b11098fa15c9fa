"""A sweep killed again and again: python tests/chaos_sweep.py [--runs=200] [--kills=10] [--folder=DIR] [--out=FILE]

Runs a sweep of two-step runs with the local launcher undisturbed, then another that is killed (-9: the launcher, one
worker, or all at once) at random moments and restarted, and compares: every run there exactly once, every value equal.
Told to stop (SIGTERM), it ends what it has started; with a --folder the same command goes on, and no kill counts twice.
--seed=0 chooses the moments; --out: a row with all of it is added to this file.
--stand_in: nothing is trained and the processes are forked, seconds in all (the version in the test suite).
"""

import argparse
import contextlib
import fcntl
import json
import os
import random
import shutil
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
from xlstm_jax import metrics  # noqa: E402

CONFIG = str(Path(__file__).parent / "configs" / "many.py")
CLOCKS = ("seconds", "wall_seconds")
VICTIMS = ("launcher", "worker", "all")


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


def real(sweep, source: str, folder: Path, kills: int, chance: random.Random) -> list[dict]:
    """The real commands; returns the kills: whom, and how many of the runs were done."""
    started: list[subprocess.Popen] = []

    def start(name: str) -> subprocess.Popen:
        command = [*local.worker_command(source, folder / name), "--launcher=local"]
        with open(folder / f"{name}.txt", "ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=local.environment(), start_new_session=True)
        started.append(process)
        return process

    def log(name: str) -> str:
        return (folder / f"{name}.txt").read_text()[-2000:]

    moments = sorted(chance.sample(range(len(sweep.runs) * 19 // 20), kills))  # numbers of finished runs
    plan = [(moment, chance.uniform(0.0, 4.0), chance.choice(VICTIMS)) for moment in moments]
    lines = metrics.Lines(folder / "kills.jsonl")
    try:
        if len(rows.read(folder / "calm")) < len(sweep.runs):
            shutil.rmtree(folder / "calm", ignore_errors=True)  # undisturbed means in one piece
            assert start("calm").wait() == 0, log("calm")
            print(f"undisturbed: {len(sweep.runs)} runs", flush=True)
        process = start("disturbed")
        for moment, pause, victim in plan[len(metrics.read(folder / "kills.jsonl")) :]:
            while len(rows.read(folder / "disturbed")) < moment:
                assert process.poll() is None, log("disturbed")
                time.sleep(0.05)
            time.sleep(pause)
            workers, done = children(process.pid), len(rows.read(folder / "disturbed"))
            for each in {"launcher": [process.pid], "worker": workers[:1], "all": [process.pid, *workers]}[victim]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
            lines.write(victim=victim, workers=len(workers), done=done)
            print(f"kill -9: {victim}, {done} runs done", flush=True)
            if victim != "worker":
                process.wait()
                process = start("disturbed")
        process.wait()
        assert start("disturbed").wait() == 0, log("disturbed")
    finally:
        lines.close()
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return metrics.read(folder / "kills.jsonl")


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
    parser.add_argument("--out", type=Path)
    parser.add_argument("--stand_in", action="store_true")
    options = parser.parse_args(argv)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    source, chance = f"{CONFIG}:{options.runs}", random.Random(options.seed)
    sweep = load(source)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    if options.stand_in:
        forked(sweep, folder, options.kills, chance)
        kills = []
    else:
        kills = real(sweep, source, folder, options.kills, chance)
    found = compare(sweep, folder / "calm", folder / "disturbed")
    print(found)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        row = {"config": f"tests/configs/many.py:{options.runs}", "seed": options.seed, "found": found, "kills": kills}
        with metrics.Lines(options.out) as lines:
            lines.write(**row, **metrics.environment())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
