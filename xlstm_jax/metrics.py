"""What a run writes: metrics as JSON lines, the record of its environment, and a live progress line."""

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Lines:
    """Appends JSON objects to a file, one a line, each line whole on disk when `write` returns."""

    def __init__(self, path: str | os.PathLike):
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, **row: Any) -> None:
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def read(path: str | os.PathLike) -> list[dict]:
    """Rows of a JSON-lines file; none if it is missing; a last line cut short by a kill is left out."""
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # what stands after the last newline was cut short
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is no JSON object: {line[:60]!r}; restore or delete the line")
        rows.append(row)
    return rows


def truncate(path: str | os.PathLike, step: int) -> list[dict]:
    """Keep what a run had written when it saved at `step`: train rows up to it, others before it. Returns the rows."""
    rows = read(path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("step"), int):
            raise ValueError(f"{path}, line {number} names no step: {str(row)[:60]}")
    kept = [r for r in rows if r["step"] < step or (r["step"] == step and r.get("split", "train") == "train")]
    if Path(path).exists():
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept


class Work(NamedTuple):
    """What speed is told by beside steps and tokens a second."""

    flops: float | None = None  # of one token in training, by formula
    peak: float | None = None  # FLOP/s of all devices together, where it is known
    serial_layers: int = 0  # that go through time one step after another

    def speeds(self, steps_per_second: float, shape: tuple[int, int] | None) -> dict[str, float]:
        """Of steps of `shape` rows and steps in time; MFU is the share of the peak that model FLOPs take."""
        found = {"steps_per_second": round(steps_per_second, 3)}
        if shape is None:
            return found
        tokens = steps_per_second * shape[0] * shape[1]
        found["tokens_per_second"] = round(tokens, 1)
        if self.serial_layers:  # forward; the backward pass has as many
            found["serial_steps_per_second"] = round(steps_per_second * shape[1] * self.serial_layers, 1)
        if self.flops:
            found["flops_per_second"] = float(f"{tokens * self.flops:.5g}")
        if self.flops and self.peak:
            found["mfu"] = float(f"{tokens * self.flops / self.peak:.4g}")
        return found


class Clock:
    """Seconds of a run, and what they were spent on: `with clock("evaluation"): ...`; the rest is training."""

    def __init__(self):
        self._start, self._before, self._spent = time.monotonic(), 0.0, {}

    def resume(self, seconds: float, spent: dict[str, float]) -> None:
        """Go on from what a run's earlier calls took."""
        self._before = seconds
        for name, value in spent.items():
            self._spent[name] = self._spent.get(name, 0.0) + value

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            if name != "training":
                self._spent[name] = self._spent.get(name, 0.0) + time.monotonic() - start

    def lose(self, last: dict[str, Any], kept: dict[str, Any] | None) -> None:
        """What was training between two rows is done again: it is lost. kept: None is the beginning of the run."""
        lost = training(last) - (training(kept) if kept else 0.0)
        if lost > 0:
            self._spent["lost"] = self._spent.get("lost", 0.0) + lost

    def total(self) -> float:
        """Seconds so far, earlier calls included."""
        return self._before + time.monotonic() - self._start

    def row(self) -> dict[str, Any]:
        """Seconds, seconds by what is not training, and the share that is training (goodput)."""
        total, other = self.total(), sum(self._spent.values())
        spent = {name: round(value, 3) for name, value in self._spent.items()}
        return {"seconds": round(total, 3), "goodput": round(1 - other / max(total, other, 1e-9), 4), "spent": spent}


def training(row: dict[str, Any]) -> float:
    """Seconds of a clock's row that were training."""
    return row["seconds"] - sum(row["spent"].values())


def waited(row: dict[str, Any]) -> float | None:
    """The share of training that waited for data, from a clock's row; None where no host reads any."""
    seconds = row["spent"].get("data")
    return None if seconds is None else seconds / max(seconds + training(row), 1e-9)


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Replace the file as a whole: a reader, or a kill, sees the old text or the new."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:  # a full disk: no half file stays
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike, value: Any) -> None:
    """One indented JSON value, atomically."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def environment() -> dict[str, Any]:
    """Versions, git commit of the source tree, device and precision."""
    devices = jax.devices()
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "commit": commit(),
        "device": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
        "precision": {
            "x64": bool(jax.config.jax_enable_x64),
            "matmul": jax.config.jax_default_matmul_precision or "default",
        },
    }


def commit() -> str | None:
    """Commit of the source tree that this file lies in, "+dirty" with uncommitted changes; None outside git.

    Changes of results/ and docs/ do not count: what is written there ran nothing.

    In an archive of the tree (`git archive`, which is what a pod is sent) git has written it into the file COMMIT.
    """
    folder = Path(__file__).resolve().parent
    with contextlib.suppress(OSError):
        if re.fullmatch(r"[0-9a-f]{40}", written := (folder / "COMMIT").read_text().strip()):
            return written
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        code = [":/", ":(top,exclude)results", ":(top,exclude)docs"]
        status = [*git, "status", "--porcelain", "-uno", "--", *code]
        changes = subprocess.run(status, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode or changes.returncode:
        return None
    return head.stdout.strip() + ("+dirty" if changes.stdout.strip() else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Progress:
    """Live line with step, loss, steps/s and time left; where there is no terminal, a plain line every `interval` s."""

    def __init__(self, steps: int, step: int = 0, label: str = "train", interval: float = 10.0, enabled: bool = True):
        self._steps, self._label, self._interval = steps, label, interval
        self._marks = [
            (time.monotonic(), step)
        ]  # the last few updates: the speed is that of now, not of the compilation
        self._printed = time.monotonic()
        self._live = None
        if enabled and sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(self._line(step, None, 0.0), refresh_per_second=4, transient=True)
            self._live.start()
        self._plain = enabled and self._live is None

    def update(self, step: int, loss: float) -> float:
        """Show this step; returns steps a second over the last updates."""
        now = time.monotonic()
        self._marks = [*self._marks[-20:], (now, step)]
        (then, first), *_ = self._marks[1:] if len(self._marks) > 2 else self._marks
        speed = (step - first) / max(now - then, 1e-9)
        if self._live:
            self._live.update(self._line(step, loss, speed))
        elif self._plain and now - self._printed >= self._interval:
            self._printed = now
            print(self._line(step, loss, speed), flush=True)
        return speed

    def note(self, text: str) -> None:
        """A line that stays on the screen (an evaluation's numbers)."""
        if self._live:
            self._live.console.print(f"{self._label}: {text}", highlight=False)
        elif self._plain:
            print(f"{self._label}: {text}", flush=True)

    def close(self) -> None:
        if self._live:
            self._live.stop()

    def _line(self, step: int, loss: float | None, speed: float) -> str:
        if loss is None:
            return f"{self._label}: step {step}/{self._steps}, compiling"
        left = int((self._steps - step) / speed) if speed > 0 else 0
        clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        return f"{self._label}: step {step}/{self._steps}, loss {loss:.4f}, {speed:.1f} steps/s, {clock} left"
