"""Several processes train, and are killed and told to stop at random: python -m tests.chaos_train --processes=2,4

Each kill hits one process or all, with SIGKILL or SIGTERM, while they start, restore, do steps or save; then the same
command goes on. Every finished run's metrics.jsonl must be that of an undisturbed run, byte for byte; SIGTERM repeats
no step, SIGKILL no more than two save intervals (the save under way is lost too). At last one run goes on with 2, then
4, then 1 processes. Prints a line a kill; ends with 1 at the first thing that is wrong.

--folder=DIR --out=FILE.jsonl: a row a kill, a comparison and a reshaping is added to FILE, and the same command goes on
after the rows of its commit that are there (in results/chaos/ those of one commit).
"""

import argparse
import atexit
import contextlib
import hashlib
import json
import multiprocessing
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

import jax
import scipy.linalg  # noqa: F401 (JAX loads it in the first program that needs it: here it is loaded once)

from experiments import train
from xlstm_jax.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[1]
SAVE_EVERY, STEPS, DISPATCH = 10, 120, 5
CONFIG = [
    "--config=tests/configs/tiny.py",
    *(f"--config.steps={STEPS}", f"--config.save_every={SAVE_EVERY}", "--config.eval_every=30"),
    *("--config.log_every=1", f"--config.steps_per_dispatch={DISPATCH}", "--config.task.num_eval=32"),
]
AGAIN = 75


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def variables(devices: int) -> dict[str, str]:
    """The environment of a process with so many CPU devices."""
    flags = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"  # as in conftest.py
    flags += " --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
    return {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {flags}",
    }


def start(count: int, words: list[str], logs: Path, devices: int = 2) -> list[subprocess.Popen]:
    """`count` processes of one job on this machine: python WORDS --processes=HOST:PORT,COUNT,INDEX > logs/INDEX.txt."""
    found, address, environment = [], free_address(), os.environ | variables(devices)
    for index in range(count):
        command = [sys.executable, *words, f"--processes={address},{count},{index}"]
        with open(logs / f"{index}.txt", "w") as out:
            found.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out))
    return found


class Forked(multiprocessing.get_context("fork").Process):
    """A process that begins with all modules loaded, which takes most of the time of a start; used as a Popen."""

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.name, timeout)
        return self.exitcode

    def send_signal(self, word: int) -> None:
        if self.exitcode is None:
            os.kill(self.pid, word)


def member(words: list[str], *, log: Path, restoring: Path, cache: Path) -> None:
    """One process of a job: experiments.train, with a file in `restoring` while it restores."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    restore = Checkpoints.restore

    def announced(self, *arguments):
        mark = restoring / str(os.getpid())
        mark.touch()
        restored = restore(self, *arguments)
        mark.unlink()
        return restored

    Checkpoints.restore = announced
    code = train.main(words)
    atexit._run_exitfuncs()  # as at the end of a process that was not forked
    sys.stdout.flush()
    os._exit(code)


def codes(processes: list[subprocess.Popen], limit: float = 300) -> list[int]:
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


def environment() -> dict:
    """Commit, versions and device of a process of a job; asked in one of its own, as this one must start no backend."""
    ask = "import json; from xlstm_jax import metrics; print(json.dumps(metrics.environment()))"
    return json.loads(subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout)


def saved_step(folder: Path) -> int:
    return max((int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdecimal()), default=0)


class Chaos:
    """Jobs of one number of processes in one folder, and a folder in which nobody disturbed them."""

    def __init__(self, folder: Path, count: int, seed: int, out: Path | None = None):
        self.folder, self.count, self.seed, self.out = folder, count, seed, out
        self.whole, self.run, self.reshaped = (folder / name for name in ("whole", "run", "reshaped"))
        self.logs, self.restoring = folder / "logs", folder / "restoring"
        for each in (self.logs, self.restoring):
            each.mkdir(parents=True, exist_ok=True)
        self.about = {"processes": count, "seed": seed, "config": CONFIG} | environment()
        rows = [json.loads(line) for line in out.read_text().splitlines()] if out and out.exists() else []
        self.rows = [row for row in rows if self.about.items() <= row.items()]

    def told(self, what: str, **found) -> None:
        """A row, and a line."""
        row = {"what": what} | found
        self.rows.append(row)
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with open(self.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(row | self.about) + "\n")
        print(f"{self.count} processes, {what}: {', '.join(f'{k} {v}' for k, v in found.items())}", flush=True)

    def named(self, what: str) -> list[dict]:
        return [row for row in self.rows if row["what"] == what]

    def job(self, workdir: Path, count: int | None = None) -> list[subprocess.Popen]:
        for path in (*self.restoring.iterdir(), *self.logs.iterdir()):
            path.unlink()
        self.left, self.before = self.half_written(), last_step(self.run)
        count, address = count or self.count, free_address()
        words = [*CONFIG, f"--workdir={workdir}", "--heartbeat=10", "--start_limit=40"]
        found = []
        for index in range(count):
            own = [*words, f"--processes={address},{count},{index}"]
            files = dict(log=self.logs / f"{index}.txt", restoring=self.restoring, cache=self.folder / "cache")
            found.append(Forked(target=member, args=(own,), kwargs=files, daemon=True))
            found[-1].start()
        return found

    def finish(self, workdir: Path) -> None:
        """The job, undisturbed, to its end."""
        while not (workdir / "result.json").exists():
            found = codes(self.job(workdir))
            if any(found):
                raise RuntimeError(f"undisturbed, the job in {workdir} ended with {found}: see {self.logs}")

    def compare(self) -> None:
        """Byte for byte."""
        one, other = ((path / "metrics.jsonl").read_bytes() for path in (self.run, self.whole))
        if one != other:
            raise RuntimeError(f"{self.run}/metrics.jsonl differs from {self.whole}/metrics.jsonl")
        kills = len(self.named("kill")) - sum(row["kills"] for row in self.named("finished"))
        digest = hashlib.sha256(one).hexdigest()
        self.told("finished", kills=kills, as_undisturbed=True, lines=one.count(b"\n"), sha256=digest)

    def disturb(self) -> None:
        """One job until its end by a signal, or by itself, if it was done before: that is no kill."""
        if (self.run / "result.json").exists():
            self.compare()
            shutil.rmtree(self.run)
        draw = random.Random(f"{self.seed} {self.count} {len(self.rows)}")
        word, aimed = draw.choice([signal.SIGKILL, signal.SIGTERM]), draw.choice(["start", "restore", "step", "save"])
        began, processes, clock = saved_step(self.run), self.job(self.run), time.monotonic()
        if aimed == "start" or (aimed == "restore" and not began):
            pause = draw.uniform(0, 12)
            wait_until(lambda: time.monotonic() - clock > pause, processes)
        elif aimed == "restore":
            wait_until(lambda: any(self.restoring.iterdir()), processes)
            time.sleep(draw.uniform(0, 0.1))
        else:
            aim = began + draw.randrange(1, STEPS // 2)
            last = STEPS if aimed == "step" else STEPS - SAVE_EVERY
            wait_until(lambda: last_step(self.run) >= min(aim, last), processes)
            if aimed == "save":
                wait_until(lambda: self.at_work() == "save", processes)
        met, hit = self.at_work(), draw.choice([*range(self.count), "all"])
        for index, process in enumerate(processes):
            if hit in (index, "all"):
                process.send_signal(word)
        found = codes(processes)
        reached, saved = last_step(self.run), saved_step(self.run)
        repeated = max(reached - saved, 0)
        if not any(found):
            return self.told("too late", began=began, reached=reached)
        self.told(
            "kill",
            **dict(number=len(self.named("kill")) + 1, signal=word.name, to=hit, during=met, began=began),
            **dict(reached=reached, saved=saved, repeated=repeated, save_every=SAVE_EVERY, exit_codes=found),
            seconds=round(time.monotonic() - clock, 1),
        )
        if set(found) == {AGAIN} and word == signal.SIGTERM and repeated:
            raise RuntimeError(f"SIGTERM: {repeated} steps are repeated (reached {reached}, saved {saved})")
        if repeated > 2 * SAVE_EVERY:
            raise RuntimeError(f"{word.name}: {repeated} steps are repeated, saves are every {SAVE_EVERY}")
        for path in self.logs.glob("*.txt"):
            if "Traceback" in path.read_text():
                raise RuntimeError(f"{word.name} to {hit} during {met} ended in a traceback: {path}")

    def half_written(self) -> set[Path]:
        return set(self.run.glob("checkpoints/*.orbax-checkpoint-tmp*"))

    def at_work(self) -> str:
        """What the job is doing now."""
        if any(self.restoring.iterdir()):
            return "restore"
        if self.half_written() - self.left:
            return "save"
        said = ""
        with contextlib.suppress(FileNotFoundError):  # of a process that has just begun
            said = (self.logs / "0.txt").read_text()
        return "steps" if "resumed at step" in said or last_step(self.run) != self.before else "start"


def reshape(chaos: Chaos) -> None:
    """One run by 2, 4 and 1 processes, each told to stop but the last; its losses are those of 2 alone, nearly."""
    run, parts = chaos.reshaped, []
    shutil.rmtree(run, ignore_errors=True)
    for count, aim in ((2, STEPS // 4), (4, STEPS // 2), (1, STEPS + 1)):
        processes = chaos.job(run, count)
        wait_until(lambda: last_step(run) >= aim, processes)  # noqa: B023 (called at once)
        processes[0].send_signal(signal.SIGTERM) if aim < STEPS else None
        parts.append({"processes": count, "exit_codes": codes(processes), "saved": saved_step(run)})
    one, other = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (run, chaos.whole)
    )
    if [(row["step"], row["split"]) for row in one] != [(row["step"], row["split"]) for row in other]:
        raise RuntimeError(f"the run of 2, 4 and 1 processes has other lines: {parts}")
    worst = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(one, other, strict=True))
    chaos.told("2, 4, then 1", parts=parts, lines=len(one), largest_relative_difference_of_a_loss=worst)
    if worst > 1e-2:
        raise RuntimeError("that is more than rounding")


def main(words: list[str]) -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--processes", default="2,4")
    arguments.add_argument("--kills", type=int, default=30, help="of each number of processes")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--folder", type=Path)
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args(words)
    os.environ.update(variables(devices=2))
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        try:
            for count in map(int, options.processes.split(",")):
                chaos = Chaos(folder.absolute() / str(count), count, options.seed, options.out)
                chaos.finish(chaos.whole)
                while len(chaos.named("kill")) < options.kills:
                    chaos.disturb()
                if sum(row["kills"] for row in chaos.named("finished")) < options.kills:
                    chaos.finish(chaos.run)
                    chaos.compare()
                if count == 2 and not chaos.named("2, 4, then 1"):
                    reshape(chaos)
        except (RuntimeError, TimeoutError) as error:
            print(f"error: {error}", file=sys.stderr)
            for path in sorted(chaos.logs.glob("*.txt")):
                print(f"--- {path.name}\n{path.read_text()[-3000:]}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
