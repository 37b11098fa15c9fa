"""Several processes train, and are killed and told to stop at random: python -m tests.chaos_train --processes=2,4

Each kill hits one process or all, with SIGKILL or SIGTERM, while they start, do steps, save or evaluate; then the same
command goes on. Every finished run's metrics.jsonl must be that of an undisturbed run, byte for byte; SIGTERM repeats
no step, SIGKILL no more than two save intervals (the save under way is lost too). At last one run goes on with 2, then
4, then 1 processes. Prints a line a kill; ends with 1 at the first thing that is wrong.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAVE_EVERY, STEPS, DISPATCH = 20, 240, 5
CONFIG = [
    "--config=tests/configs/tiny.py",
    *(f"--config.steps={STEPS}", f"--config.save_every={SAVE_EVERY}", "--config.eval_every=60"),
    *("--config.log_every=1", f"--config.steps_per_dispatch={DISPATCH}", "--config.task.num_eval=32"),
]
AGAIN = 75


def start(
    count: int, words: list[str], logs: Path, devices: int = 2, cache: Path | None = None
) -> list[subprocess.Popen]:
    """`count` processes of one job on this machine: python WORDS --processes=HOST:PORT,COUNT,INDEX > logs/INDEX.txt."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {flags}",
    }
    if cache:
        environment["XLSTM_JAX_CACHE"] = str(cache)
    found = []
    for index in range(count):
        command = [sys.executable, *words, f"--processes={address},{count},{index}"]
        with open(logs / f"{index}.txt", "w") as out:
            found.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out))
    return found


def codes(processes: list[subprocess.Popen], limit: float = 120) -> list[int]:
    """The exit codes, when all have ended; TimeoutError, and all killed, where one hangs."""
    deadline = time.monotonic() + limit
    try:
        return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in processes]
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"after {limit} s still at work: {[p.poll() is None for p in processes]}") from None
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_until(condition: Callable[[], bool], processes: list[subprocess.Popen], limit: float = 90) -> None:
    """Until it holds, or a process has ended, or the time is over."""
    deadline = time.monotonic() + limit
    while not condition() and all(p.poll() is None for p in processes) and time.monotonic() < deadline:
        time.sleep(0.005)


def last_step(folder: Path) -> int:
    """Of the train lines that are whole."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return max((row["step"] for row in map(json.loads, lines) if row["split"] == "train"), default=0)


def saved_step(folder: Path) -> int:
    return max((int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdecimal()), default=0)


class Chaos:
    """Jobs of one number of processes in one folder, and a folder in which nobody disturbed them."""

    def __init__(self, folder: Path, count: int, draw: random.Random):
        self.folder, self.count, self.draw = folder, count, draw
        self.whole, self.run = folder / f"whole-{count}", folder / f"run-{count}"
        self.logs = folder / f"logs-{count}"
        self.logs.mkdir(parents=True)
        self.worst = {signal.SIGKILL: 0, signal.SIGTERM: 0}

    def job(self, workdir: Path, count: int | None = None) -> list[subprocess.Popen]:
        words = ["-m", "experiments.train", *CONFIG, f"--workdir={workdir}", "--heartbeat=10", "--start_limit=40"]
        return start(count or self.count, words, logs=self.logs, cache=self.folder / "cache")

    def finish(self, workdir: Path) -> None:
        found = codes(self.job(workdir))
        if any(found):
            raise RuntimeError(f"undisturbed, the job in {workdir} ended with {found}: see {self.logs}")

    def compare(self) -> None:
        """Byte for byte."""
        one, other = ((path / "metrics.jsonl").read_bytes() for path in (self.run, self.whole))
        if one != other:
            raise RuntimeError(f"{self.run}/metrics.jsonl differs from {self.whole}/metrics.jsonl")

    def disturb(self) -> str:
        """One job until its end by a signal; what was done to it."""
        if (self.run / "result.json").exists():
            self.compare()
            shutil.rmtree(self.run)
        word, moment = self.draw.choice([signal.SIGKILL, signal.SIGTERM]), self.draw.choice(["start", "step", "save"])
        began, processes, clock = saved_step(self.run), self.job(self.run), time.monotonic()
        if moment == "start":
            pause = self.draw.uniform(0, 12)
            wait_until(lambda: time.monotonic() - clock > pause, processes)
        elif moment == "step":
            aim = began + self.draw.randrange(1, STEPS // 2)
            wait_until(lambda: last_step(self.run) >= min(aim, STEPS), processes)
        else:
            aim = began + self.draw.randrange(1, STEPS // 2)
            wait_until(lambda: last_step(self.run) >= min(aim, STEPS - SAVE_EVERY), processes)
            wait_until(lambda: any(self.run.glob("checkpoints/*.orbax-checkpoint-tmp*")), processes)
        hit = self.draw.choice([*range(self.count), "all"])
        for index, process in enumerate(processes):
            if hit in (index, "all"):
                process.send_signal(word)
        found = codes(processes)
        reached, saved = last_step(self.run), saved_step(self.run)
        repeated = max(reached - saved, 0)
        told = AGAIN in found and word == signal.SIGTERM and set(found) == {AGAIN}
        self.worst[word] = max(self.worst[word], repeated if told or word == signal.SIGKILL else 0)
        if told and repeated:
            raise RuntimeError(f"SIGTERM: {repeated} steps are repeated (reached {reached}, saved {saved})")
        if repeated > 2 * SAVE_EVERY + 2 * DISPATCH:
            raise RuntimeError(f"{word.name}: {repeated} steps are repeated, saves are every {SAVE_EVERY}")
        for path in self.logs.glob("*.txt"):
            if "Traceback" in path.read_text():
                raise RuntimeError(f"{word.name} to {hit} during {moment} ended in a traceback: {path}")
        at = f"{began} to {reached}, saved {saved}"
        return f"{word.name} to {hit} during {moment}: steps {at}, exit codes {found}, {time.monotonic() - clock:.0f} s"


def reshape(chaos: Chaos) -> None:
    """One run by 2, 4 and 1 processes, each told to stop but the last; its losses are those of 2 alone, nearly."""
    for count, aim in ((2, STEPS // 4), (4, STEPS // 2), (1, STEPS + 1)):
        processes = chaos.job(chaos.run, count)
        wait_until(lambda: last_step(chaos.run) >= aim, processes)  # noqa: B023 (called at once)
        processes[0].send_signal(signal.SIGTERM) if aim < STEPS else None
        print(f"{count} processes: exit codes {codes(processes)}, saved {saved_step(chaos.run)}", flush=True)
    one, other = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (chaos.run, chaos.whole)
    )
    if [(row["step"], row["split"]) for row in one] != [(row["step"], row["split"]) for row in other]:
        raise RuntimeError("the run of 2, 4 and 1 processes has other lines")
    worst = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(one, other, strict=True))
    print(f"2, 4, then 1 processes: losses differ by {worst:.1e} at most (relative)")
    if worst > 1e-2:
        raise RuntimeError("that is more than rounding")


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--processes", default="2,4")
    arguments.add_argument("--kills", type=int, default=30, help="of each number of processes")
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        draw = random.Random(options.seed)
        try:
            for count in map(int, options.processes.split(",")):
                chaos = Chaos(Path(folder) / str(count), count, draw)
                chaos.finish(chaos.whole)
                for number in range(1, options.kills + 1):
                    print(f"{count} processes, kill {number}: {chaos.disturb()}", flush=True)
                chaos.finish(chaos.run)
                chaos.compare()
                kill, term = chaos.worst.values()
                print(f"{count} processes: as undisturbed; repeated at most {kill} steps (SIGKILL), {term} (SIGTERM)")
                if count == 2:
                    shutil.rmtree(chaos.run)
                    reshape(chaos)
        except (RuntimeError, TimeoutError) as error:
            print(f"error: {error}", file=sys.stderr)
            for path in sorted(chaos.logs.glob("*.txt")):
                print(f"--- {path.name}\n{path.read_text()[-3000:]}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
