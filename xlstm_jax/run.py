"""The bookkeeping of one run: its files, its progress line, what it resumed from, and the way back after a bad step."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from xlstm_jax import distributed, metrics
from xlstm_jax.checkpoint import Checkpoints


class Diverged(RuntimeError):
    """Loss or gradient became infinite or NaN, or too many bad steps came; the state still is that before the last."""


class Stopped(RuntimeError):
    """The job was told to stop, and did so; the message says at which step the same command goes on."""


class Run:
    """State and step of a run, and all that it writes; one dispatch is `pending`, computed while the host goes on.

    Of several processes all save, each its part, and only process 0 writes anything else.
    """

    def __init__(
        self,
        workdir: Path | None,
        state: PyTree,
        steps: int,
        log_every: int,
        label: str,
        progress: bool,
        recheck: Callable[..., None],
        *,
        start: Callable[[], PyTree] | None = None,
        shape: tuple[int, int] | None = None,
        work: metrics.Work | None = None,
        max_bad_steps: int = 10,
        keep: tuple[int, int] = (2, 0),
        profile: int = 0,
        clock: metrics.Clock | None = None,
    ):
        """recheck(step=): ValueError where that batch is wrong; shape: rows and steps in time of a batch.

        start: makes the state of step 0 anew, where bad steps are rolled back from; keep: see `Checkpoints`.
        """
        self.state, self.step, self.pending = state, 0, None
        self._like = jax.tree.map(_abstract, state)
        self._workdir, self._start, self._steps, self._log_every = workdir, start, steps, log_every
        self._shape, self._work = shape, metrics.Work() if work is None else work
        self._max_bad_steps, self._recheck = max_bad_steps, recheck
        self._clock = metrics.Clock() if clock is None else clock
        self._window, self._rollbacks, self._compiled = [], 0, False
        self._profile, self._tracing = profile, None
        self._saved, self._first = 0, jax.process_index() == 0
        self.checkpoints = self._lines = self._timing = None
        if workdir is not None:
            workdir.mkdir(parents=True, exist_ok=True)
            self.checkpoints = Checkpoints(workdir / "checkpoints", *keep)
            try:
                with self._clock("start_up"):
                    self._restore()
                self._open_lines()
            except BaseException:
                self.checkpoints.close()
                raise
        self._progress = metrics.Progress(steps, self.step, label, enabled=progress and self._first)
        if self.step:
            self._progress.note(f"resumed at step {self.step}")
        for warning in self.checkpoints.warnings if self.checkpoints else ():
            self._progress.note(warning)

    def _restore(self) -> None:
        """State and step of the newest intact checkpoint, or of step 0."""
        self.checkpoints.wait()
        saved = distributed.of_first("find the newest checkpoint", self.checkpoints.newest_intact)
        self._saved = saved or 0
        if saved is None:
            self.state, self.step = self.state if self.step == 0 else self._start(), 0
            return
        if saved > self._steps:
            raise ValueError(
                f"{self._workdir} holds a checkpoint of step {saved}, but steps is {self._steps}: use another folder"
            )
        restored = self.checkpoints.restore(saved, self._like)
        seed, wanted = int(restored.seed), int(self.state.seed)
        if seed != wanted:
            raise ValueError(f"{self._workdir} holds a run with seed {seed}, not {wanted}: use another folder")
        self.state, self.step = restored, saved

    def _open_lines(self) -> None:
        """metrics.jsonl and timing.jsonl as they were when this step was saved, ready for what follows."""
        with distributed.together("open the files of the run"):
            if self._first:
                self._reopen_lines()

    def _reopen_lines(self) -> None:
        metrics.truncate(self._workdir / "metrics.jsonl", self.step)
        path = self._workdir / "timing.jsonl"
        written = metrics.read(path)
        for row in written:
            if not isinstance(row.get("seconds"), int | float) or not isinstance(row.get("spent"), dict):
                raise ValueError(
                    f"{path} names no seconds, or not what they were spent on, at step {row.get('step')}: restore or"
                    " delete the file"
                )
        kept = metrics.truncate(path, self.step)
        if written:
            last = written[-1] if self._timing is None else self._clock.row()
            if self._timing is None:
                self._clock.resume(last["seconds"], last["spent"])
            self._clock.lose(last, kept[-1] if kept else None)
        stops = [row for row in kept if row["step"] == self.step and "window" in row]
        self._window = stops[-1]["window"] if stops else []
        self._lines = metrics.Lines(self._workdir / "metrics.jsonl")
        self._timing = metrics.Lines(self._workdir / "timing.jsonl")

    def waiting(self, what: str = "data") -> contextlib.AbstractContextManager:
        """Its seconds count as lost to `what` unless the device still has a dispatch to work on."""
        return self._clock(what if self.state.step.is_ready() else "training")

    def advance(self, end: int, dispatch: Callable[[PyTree], tuple[PyTree, Any]]) -> None:
        """Start the steps up to `end`, and read those before them meanwhile."""
        self._trace(end)
        with self._clock("training" if self._compiled else "compile"):
            state, history = dispatch(self.state)
        self._compiled = True
        begin, self.state = self.step, state
        if self.read_pending():  # else they began at a bad step, and the rollback threw them away
            self.pending, self.step = (begin, end, history), end

    def read_pending(self, state: PyTree = None) -> bool:
        """Wait for the pending dispatch and write its metrics; False after a rollback; `Diverged` where all ends.

        state: what that dispatch left, if it is not the run's.
        """
        state = self.state if state is None else state
        if self.pending is None:
            return True
        start, end, history = self.pending
        self.pending = None
        history = {
            name: values.tolist() for name, values in jax.device_get(history)._asdict().items() if values is not None
        }
        for index, step in enumerate(range(start + 1, end + 1)):
            row = {name: values[index] for name, values in history.items()}
            in_a_row = row.pop("bad_in_a_row", 0)
            if row.pop("good"):
                self._window.append(row)
            elif self._start is not None:
                self._roll_back(step, row)
                return False
            elif not 0 < in_a_row <= self._max_bad_steps:
                self._recheck(step=step - 1)
                why = f" ({in_a_row} bad steps in a row)" if in_a_row else ""
                raise Diverged(self._diverged(step, row, state, why))
            else:
                self._progress.note(f"step {step} was bad and is skipped: {_words(row)}")
            if step % self._log_every == 0 or step == self._steps:
                self._write_window(step)
        speed = self._progress.update(end, history["loss"][end - start - 1])
        if self._timing and (end // self._log_every > start // self._log_every or end == self._steps):
            self._timing.write(step=end, **self._clock.row(), **self._work.speeds(speed, self._shape))
        return True

    def _roll_back(self, step: int, row: dict[str, float]) -> None:
        """To the newest checkpoint, the batches after the bad one next; what was written since then is written anew."""
        bad, moved_on, state = *(int(x) for x in (self.state.guard.bad, self.state.guard.moved_on)), self.state
        self._rollbacks += 1
        if self._rollbacks > self._max_bad_steps:
            self._recheck(step=step - 1 + moved_on)
            why = f" ({self._rollbacks} rollbacks to one checkpoint)"
            raise Diverged(self._diverged(step, row, self.state, why))
        with self._clock("checkpoint"):
            if self.checkpoints:
                self._restore()
            else:
                self.state, self.step = self._start(), 0
        moved_on += step - self.step
        place = {"bad": bad + 1, "moved_on": moved_on}
        put = {name: jax.device_put(jnp.int32(n), getattr(state.guard, name).sharding) for name, n in place.items()}
        self.state = self.state._replace(guard=self.state.guard._replace(**put))
        self._window = []
        if self._lines:
            self._lines.close()
            self._timing.close()
        if self.checkpoints:
            self._open_lines()
        self._progress.note(f"step {step} was bad: {_words(row)}; back at step {self.step}, {moved_on} batches on")

    def _write_window(self, step: int) -> None:
        if self._lines and self._window:
            means = {name: math.fsum(r[name] for r in self._window) / len(self._window) for name in self._window[0]}
            for last in ("learning_rate", "bad_steps"):
                if last in means:
                    means[last] = self._window[-1][last]
            self._lines.write(step=step, split="train", **means)
        self._window = []

    def _diverged(self, step: int, row: dict[str, float], state: PyTree, why: str) -> str:
        last = self.checkpoints and self.checkpoints.latest_path()
        return (
            f"diverged at step {step}{why}: {_words(row)}, parameter norm"
            f" {float(optax.tree.norm(state.params)):.4g} before it; last good checkpoint: {last or 'none'};"
            " a lower learning_rate, a longer warm-up or a smaller clip may help"
        )

    def save(self, step: int, state: PyTree) -> None:
        """A checkpoint, unless there is one; the next train line begins here, so that a resumed run writes the same."""
        if step == self._saved:
            return
        self._window, self._rollbacks, self._saved = [], 0, step
        if self.checkpoints:
            with self._clock("checkpoint"):
                self.checkpoints.save(step, state)
            if self._timing:
                self._timing.write(step=step, **self._clock.row())

    def stop(self) -> NoReturn:
        """Saves this step, with what the next train line is to be the mean of; ends in `Stopped`."""
        self.read_pending()
        if self.checkpoints is None:
            raise Stopped(f"told to stop at step {self.step}: nothing is kept, as there is no workdir")
        if self.step == 0:
            raise Stopped("told to stop before the first step was done: the same command starts again")
        if self.step != self._saved:
            if self._timing:
                self._timing.write(step=self.step, **self._clock.row(), window=self._window)
            self.save(self.step, self.state)
        self.checkpoints.wait()
        raise Stopped(f"told to stop: saved step {self.step}; the same command goes on")

    def write_evaluation(self, step: int, results: dict[str, dict[str, Any]]) -> None:
        for split, found in results.items():
            if self._lines:
                self._lines.write(step=step, split=split, **found)
            shown = ", ".join(f"{name} {value:.4f}" for name, value in found.items() if isinstance(value, float))
            self._progress.note(f"step {step}, {split}: {shown}")
        if self._timing:
            self._timing.write(step=step, **self._clock.row())

    def seconds(self) -> float:
        """Wall-clock of the run so far, earlier calls included."""
        return self._clock.total()

    def _trace(self, end: int) -> None:
        """Begin the trace when the second dispatch begins; end it once `profile` steps are in it."""
        if not self._profile or not self._compiled:
            return
        if self._tracing is None:
            jax.profiler.start_trace(str(self._workdir / "profile"))
            self._tracing = self.step
        elif self.step - self._tracing >= self._profile:
            self._end_trace()

    def _end_trace(self) -> None:
        jax.block_until_ready(self.state)
        jax.profiler.stop_trace()
        self._progress.note(f"trace of {self.step - self._tracing} steps in {self._workdir / 'profile'}")
        self._profile = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._profile and self._tracing is not None:
            with contextlib.suppress(RuntimeError):
                self._end_trace()
        self._progress.close()
        for opened in (self._lines, self._timing, self.checkpoints):
            if opened:
                opened.close()


def _words(row: dict[str, float]) -> str:
    return f"loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}"


def _abstract(x: Any) -> Any:
    """What is left of an array when a step has taken its memory; an array of the host has no sharding."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x
