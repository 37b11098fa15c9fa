"""Training: one pytree of state, one pure step that draws its own batch, and `fit`, which resumes by itself."""

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from xlstm_jax import metrics, optim, sharding
from xlstm_jax.checkpoint import Checkpoints
from xlstm_jax.evaluate import TaskShell, evaluate_params, split_task, token_scores
from xlstm_jax.kernels import local
from xlstm_jax.regularizers import activation_l2, temporal_l2
from xlstm_jax.tasks.task import SPLITS, check


class TrainState(NamedTuple):
    """All that training carries from step to step; also what a checkpoint holds."""

    params: PyTree
    opt_state: PyTree
    step: Int[Array, ""]  # updates done; the next batch is batch number `step`
    carry: PyTree  # the model's recurrent state for tasks that carry it (truncated BPTT), else ()
    seed: Int[Array, ""]  # of the batches and of dropout; traced, so all seeds share one program


class StepMetrics(NamedTuple):
    """What one step reports; stacked over the steps of a dispatch."""

    loss: Float[Array, "..."]  # nats
    accuracy: Float[Array, "..."]
    grad_norm: Float[Array, "..."]  # before the clip
    learning_rate: Float[Array, "..."] | None
    finite: Bool[Array, "..."]


class Diverged(RuntimeError):
    """Loss or gradient became infinite or NaN; the state still is that before the bad step."""


def init_state(
    model: nnx.Module, task, tx: optax.GradientTransformation, batch_size: int, seed: Int[ArrayLike, ""]
) -> TrainState:
    """Step 0. Every leaf comes out of one program, so that all live on the devices of the parameters."""
    graphdef, params = nnx.split(model)
    carry = model.initial_state(batch_size) if task.carries_state else ()

    def build(params, carry):
        counters = jnp.zeros((), jnp.int32), jnp.full((), seed, jnp.int32)
        return sharding.keep(TrainState(params, tx.init(params), counters[0], carry, counters[1]), graphdef)

    return jax.tree.map(
        jnp.copy, jax.jit(build)(params, carry)
    )  # copies: the step donates its state, the model keeps its own


def loss_and_accuracy(
    model, batch, carry, key, ar: float = 0.0, tar: float = 0.0, scores: Callable = token_scores
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], PyTree]]:
    """Weighted means of the loss (cross-entropy in nats) and of correct answers, and the model's state after the batch.

    `ar` and `tar` add that many times `activation_l2` and `temporal_l2` of what the backbone gives.
    """
    penalty = 0.0
    if ar or tar:
        ys, carry = model.hidden(batch.inputs, carry, batch.mask, batch.reset, key=key)
        logits = model.answers(ys, batch.mask, key=key)
        penalty = ar * activation_l2(ys, batch.mask) + tar * temporal_l2(ys, batch.mask, batch.reset)
    else:
        logits, carry = model(batch.inputs, carry, batch.mask, batch.reset, key=key)
    nll, correct = scores(logits, batch.targets)
    weights = batch.weights.astype(nll.dtype)
    total = jnp.sum(weights)
    weights = weights / jnp.where(total > 0, total, 1)
    loss = jnp.sum(jnp.where(weights != 0, nll, 0) * weights) + penalty
    return loss, (jnp.sum(correct * weights), carry)


def train_step(
    state: TrainState, *, graphdef: nnx.GraphDef, task, tx: optax.GradientTransformation, batch_size: int
) -> tuple[TrainState, StepMetrics]:
    """One update on batch number `state.step`; if loss or gradient is not finite, the state is returned as it came."""
    batch = jax.tree.map(local.activations, task.batch("train", state.seed, state.step, batch_size))
    key = jax.random.fold_in(jax.random.key(state.seed), state.step)

    def loss_of(params):  # the carry is a constant here: this cuts the gradient between batches
        carry = state.carry if task.carries_state else None
        penalties = {name: getattr(task, name, 0.0) for name in ("ar", "tar")}
        scores = getattr(task, "scores", token_scores)
        return loss_and_accuracy(nnx.merge(graphdef, params), batch, carry, key, scores=scores, **penalties)

    (loss, (accuracy, carry)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(updates))
    new = TrainState(
        optax.apply_updates(state.params, updates),
        opt_state,
        state.step + 1,
        carry if task.carries_state else (),
        state.seed,
    )
    row = StepMetrics(loss, accuracy, grad_norm, optim.learning_rate(opt_state), finite)
    return sharding.keep(jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state), graphdef), row


@functools.partial(
    jax.jit, static_argnames=("graphdef", "shell", "tx", "batch_size", "length"), donate_argnames="state"
)
def _dispatch(
    state: TrainState, arrays: list[Array], count: Int[Array, ""], *, graphdef, shell: TaskShell, tx, batch_size, length
) -> tuple[TrainState, StepMetrics]:
    """`count` <= `length` steps in one program, their metrics stacked. A bad step repeats, the state standing still."""
    step = functools.partial(train_step, graphdef=graphdef, task=shell.join(arrays), tx=tx, batch_size=batch_size)
    row = jax.eval_shape(step, state)[1]
    history = jax.tree.map(lambda x: jnp.zeros((length, *x.shape), x.dtype), row)

    def body(i, loop):
        state, history = loop
        state, row = step(state)
        return state, jax.tree.map(lambda h, x: h.at[i].set(x), history, row)

    return jax.lax.fori_loop(0, count, body, (state, history))


@functools.partial(jax.jit, static_argnames=("shell", "split", "batch_size"))
def _draw(arrays, seed, step, *, shell, split, batch_size):
    return shell.join(arrays).batch(split, seed, step, batch_size)


def check_data(task, split: str, batch_size: int, seed: int, step: int = 0) -> None:
    """ValueError where batch number `step` of a split has labels or tokens that do not exist, or wrong shapes."""
    arrays, shell = split_task(task)
    batch = _draw(arrays, jnp.int32(seed), jnp.int32(step), shell=shell, split=split, batch_size=batch_size)
    try:
        check(jax.device_get(batch), task)
    except ValueError as error:
        raise ValueError(f"{error} (batch {step} of the {split} split): mend the data or the task") from None


def fit(
    model: nnx.Module,
    task,
    tx: optax.GradientTransformation,
    *,
    steps: int,
    batch_size: int,
    seed: int = 0,
    eval_every: int = 0,
    save_every: int = 0,
    log_every: int = 100,
    eval_batch_size: int | None = None,
    workdir: str | Path | None = None,
    steps_per_dispatch: int = 10,
    progress: bool = True,
    label: str = "train",
    record: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train, resuming from the newest checkpoint in `workdir`; leaves the final parameters in `model`.

    Writes config.json (`record` and the number of parameters), checkpoints/, metrics.jsonl (no clock in it: a resumed
    run repeats it to the last digit), timing.jsonl and result.json, which is what is returned: `record`, steps, seed,
    parameters, seconds, valid_* and test_* metrics. The first batch of every split is checked before anything else.
    `eval_every`, `save_every` = 0: only at the end. A train line is the mean since the line or checkpoint before it.
    """
    counts = {
        "steps": steps,
        "batch_size": batch_size,
        "log_every": log_every,
        "steps_per_dispatch": steps_per_dispatch,
    }
    eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
    for name, value in (counts | {"eval_batch_size": eval_batch_size}).items():
        if value < 1:
            raise ValueError(f"{name} is {value}: at least 1 is needed")
    for name, value in {"eval_every": eval_every, "save_every": save_every}.items():
        if value < 0:
            raise ValueError(f"{name} is {value}: it must be positive, or 0 for the end only")
    for split in SPLITS:
        check_data(task, split, *((batch_size, seed) if split == "train" else (eval_batch_size, 0)))
    workdir = None if workdir is None else Path(workdir)
    graphdef, params = nnx.split(model)
    parameters = sum(x.size for x in jax.tree.leaves(params))
    if record and workdir is not None and not (workdir / "config.json").exists():
        workdir.mkdir(parents=True, exist_ok=True)
        metrics.write_json(workdir / "config.json", record | {"parameters": parameters})
    arrays, shell = split_task(task)
    state = init_state(model, task, tx, batch_size, seed)
    dispatch = functools.partial(
        _dispatch, graphdef=graphdef, shell=shell, tx=tx, batch_size=batch_size, length=steps_per_dispatch
    )
    recheck = functools.partial(check_data, task, "train", batch_size, seed)
    with _Run(workdir, state, steps, log_every, label, progress, recheck) as run:
        state, at = run.state, run.step
        while True:
            final = at == steps
            if final or (eval_every and at and at % eval_every == 0):
                run.read_pending(state)
                results = {
                    split: evaluate_params(graphdef, state.params, task, split, eval_batch_size)
                    for split in (("valid", "test") if final else ("valid",))
                }
                for split, found in results.items():
                    if not all(math.isfinite(v) for v in found.values() if isinstance(v, float)):  # is it the data?
                        for step in range(task.num_batches(split, eval_batch_size)):
                            check_data(task, split, eval_batch_size, 0, step)
                run.write_evaluation(at, results)
            if final:
                break
            end = min(
                steps, *(at - at % every + every for every in (steps_per_dispatch, save_every, eval_every) if every)
            )
            state, history = dispatch(state, arrays, jnp.int32(end - at))
            run.read_pending(state)  # of the dispatch before: this one runs meanwhile
            run.pending = (at, end, history)
            at = end
            if at == steps or (save_every and at % save_every == 0):
                run.read_pending(state)
                run.save(at, state)
        nnx.update(model, state.params)
        result = (
            (record or {})
            | {
                "steps": steps,
                "seed": seed,
                "parameters": parameters,
                "seconds": round(run.seconds(), 3),
            }
            | {f"{split}_{name}": value for split, found in results.items() for name, value in found.items()}
        )
        if workdir is not None:
            run.checkpoints.latest()  # a result stands only beside a complete checkpoint
            metrics.write_json(workdir / "result.json", result)
    return result


class _Run:
    """The files and the progress line of one call of `fit`, and what it resumed from."""

    def __init__(
        self,
        workdir: Path | None,
        state: TrainState,
        steps: int,
        log_every: int,
        label: str,
        progress: bool,
        recheck: Callable[..., None],
    ):
        self.state, self.step, self.pending, self._recheck = state, 0, None, recheck
        self._steps, self._log_every, self._window = steps, log_every, []
        self._before, self._start = 0.0, time.monotonic()
        self.checkpoints = self._lines = self._timing = None
        if workdir is not None:
            workdir.mkdir(parents=True, exist_ok=True)
            self.checkpoints = Checkpoints(workdir / "checkpoints")
            try:
                self._resume(workdir)
                metrics.truncate(workdir / "metrics.jsonl", self.step)
                spent = metrics.truncate(workdir / "timing.jsonl", self.step)
                if spent and not isinstance(spent[-1].get("seconds"), int | float):
                    raise ValueError(f"{workdir / 'timing.jsonl'} names no seconds at step {spent[-1]['step']}")
                self._before = spent[-1]["seconds"] if spent else 0.0
            except BaseException:
                self.checkpoints.close()
                raise
            self._lines = metrics.Lines(workdir / "metrics.jsonl")
            self._timing = metrics.Lines(workdir / "timing.jsonl")
        self._progress = metrics.Progress(steps, self.step, label, enabled=progress)
        if self.step:
            self._progress.note(f"resumed at step {self.step}")

    def _resume(self, workdir: Path) -> None:
        saved = self.checkpoints.latest()
        if saved is None:
            return
        if saved > self._steps:
            raise ValueError(
                f"{workdir} holds a checkpoint of step {saved}, but steps is {self._steps}: use another folder"
            )
        restored = self.checkpoints.restore(saved, self.state)
        if int(restored.seed) != int(self.state.seed):
            raise ValueError(
                f"{workdir} holds a run with seed {int(restored.seed)}, not {int(self.state.seed)}: use another folder"
            )
        self.state, self.step = restored, saved

    def seconds(self) -> float:
        """Wall-clock of the run so far, earlier calls included."""
        return self._before + time.monotonic() - self._start

    def read_pending(self, state: TrainState) -> None:
        """Wait for the pending dispatch; write its metrics; raise `Diverged` where it went wrong."""
        if self.pending is None:
            return
        start, end, history = self.pending
        self.pending = None
        history = {
            name: values.tolist() for name, values in jax.device_get(history)._asdict().items() if values is not None
        }
        for index, step in enumerate(range(start + 1, end + 1)):
            row = {name: values[index] for name, values in history.items()}
            if not row.pop("finite"):
                self._recheck(step=step - 1)
                raise Diverged(self._diverged(step, row, state))
            self._window.append(row)
            if step % self._log_every == 0 or step == self._steps:
                self._write_window(step)
        speed = self._progress.update(end, history["loss"][end - start - 1])
        if self._timing and (end // self._log_every > start // self._log_every or end == self._steps):
            self._timing.write(step=end, seconds=round(self.seconds(), 3), steps_per_second=round(speed, 3))

    def _write_window(self, step: int) -> None:
        if self._lines:
            means = {name: math.fsum(r[name] for r in self._window) / len(self._window) for name in self._window[0]}
            if "learning_rate" in means:
                means["learning_rate"] = self._window[-1]["learning_rate"]
            self._lines.write(step=step, split="train", **means)
        self._window = []

    def _diverged(self, step: int, row: dict[str, float], state: TrainState) -> str:
        last = self.checkpoints and self.checkpoints.latest_path()
        return (
            f"diverged at step {step}: loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}, parameter norm"
            f" {float(optax.tree.norm(state.params)):.4g} before it; last good checkpoint: {last or 'none'};"
            " a lower learning_rate, a longer warm-up or a smaller clip may help"
        )

    def save(self, step: int, state: TrainState) -> None:
        """A checkpoint; the next train line begins here, so that a resumed run writes the same one."""
        self._window = []
        if self.checkpoints:
            self.checkpoints.save(step, state)

    def write_evaluation(self, step: int, results: dict[str, dict[str, Any]]) -> None:
        for split, found in results.items():
            if self._lines:
                self._lines.write(step=step, split=split, **found)
            shown = ", ".join(f"{name} {value:.4f}" for name, value in found.items() if isinstance(value, float))
            self._progress.note(f"step {step}, {split}: {shown}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._progress.close()
        for opened in (self._lines, self._timing, self.checkpoints):
            if opened:
                opened.close()
