"""Training: one pytree of state, one pure step that draws its own batch, and `fit`, which resumes by itself."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from xlstm_jax import distributed, guard, metrics, optim, sharding
from xlstm_jax.checkpoint import FORMAT
from xlstm_jax.evaluate import TaskShell, evaluate_params, split_task, token_scores
from xlstm_jax.feed import Feed, is_fed
from xlstm_jax.kernels import local
from xlstm_jax.names import unknown
from xlstm_jax.regularizers import activation_l2, neighbours, temporal_l2
from xlstm_jax.run import Diverged as Diverged
from xlstm_jax.run import Run
from xlstm_jax.run import Stopped as Stopped
from xlstm_jax.tasks.task import SPLITS, check


class StepOptions(NamedTuple):
    """What a step does beside a plain update."""

    accumulate: int = 1  # micro-batches that the rows are divided into, to need less memory; one update of their sum
    z_loss: float = 0.0  # times the mean of log Z^2 (arXiv:2204.02311): in the loss trained, not in the one reported
    ema: float = 0.0  # decay of the average of the weights, which then is what is evaluated and kept; 0: none
    on_bad_step: str = "stop"  # or "skip", "rollback" (to the newest checkpoint, with the batches after the bad one)
    spike: float = 0.0  # a loss above this many times its running mean is a bad step too; 0: only one not finite
    keep_best: str = ""  # metric of the valid split: the weights best by it are those tested and kept; "": the last


PLAIN = StepOptions()


class Best(NamedTuple):
    """The weights with the best evaluation so far."""

    score: Float[Array, ""]  # of their evaluation; less is better
    step: Int[Array, ""]
    params: PyTree


class TrainState(NamedTuple):
    """All that training carries from step to step; also what a checkpoint holds."""

    params: PyTree
    opt_state: PyTree
    step: Int[Array, ""]  # steps done; the next batch is batch number `step`, unless `guard` moved on
    carry: PyTree  # the model's recurrent state for tasks that carry it (truncated BPTT), else ()
    seed: Int[Array, ""]  # of the batches and of dropout; traced, so all seeds share one program
    average: PyTree = ()  # of the parameters, where it is kept
    guard: Any = ()  # `guard.Guard`, where bad steps do not simply end the run
    best: Any = ()  # `Best`, where `keep_best` asks for it


class StepMetrics(NamedTuple):
    """What one step reports; stacked over the steps of a dispatch."""

    loss: Float[Array, "..."]  # nats
    accuracy: Float[Array, "..."]
    grad_norm: Float[Array, "..."]  # before the clip
    learning_rate: Float[Array, "..."] | None
    good: Bool[Array, "..."]
    bad_steps: Int[Array, "..."] | None  # so far
    bad_in_a_row: Int[Array, "..."] | None


def check_options(options: StepOptions, batch_size: int) -> None:
    """ValueError where one cannot be meant."""
    if options.accumulate < 1 or batch_size % options.accumulate:
        raise ValueError(
            f"accumulate is {options.accumulate}: it must divide the rows of a batch (batch_size is {batch_size})"
        )
    if not 0 <= options.z_loss < math.inf:
        raise ValueError(f"z_loss is {options.z_loss}: it must be finite and 0 or more")
    if not 0 <= options.ema < 1:
        raise ValueError(f"ema is {options.ema}: it must lie in [0, 1), 0 for none")
    if options.on_bad_step not in guard.ON_BAD_STEP:
        raise ValueError(unknown("on_bad_step", options.on_bad_step, guard.ON_BAD_STEP))
    if options.spike and not 1 < options.spike < math.inf:
        raise ValueError(f"spike is {options.spike}: it must be finite and more than 1, or 0 for none")


def init_state(
    model: nnx.Module,
    task,
    tx: optax.GradientTransformation,
    batch_size: int,
    seed: Int[ArrayLike, ""],
    options: StepOptions = PLAIN,
) -> TrainState:
    """Step 0. Every leaf comes out of one program, so that all live on the devices of the parameters."""
    graphdef, params = nnx.split(model)
    carry = model.initial_state(batch_size) if task.carries_state else ()

    def build(params, carry):
        zero, seeds = jnp.zeros((), jnp.int32), jnp.full((), seed, jnp.int32)
        average = params if options.ema else ()
        guarded = guard.initial(options.on_bad_step, options.spike)
        best = Best(jnp.full((), jnp.inf, jnp.float32), zero, params) if options.keep_best else ()
        state = TrainState(params, tx.init(params), zero, carry, seeds, average, guarded, best)
        return sharding.keep(state, graphdef)

    return jax.tree.map(
        jnp.copy, jax.jit(build)(params, carry)
    )  # copies: the step donates its state, the model keeps its own


class Totals(NamedTuple):
    """What the means over a batch divide by."""

    weight: Float[Array, ""]  # of all tokens
    steps: Int[Array, ""] | int  # that are valid
    pairs: Int[Array, ""]  # of `neighbours`


def totals_of(batch) -> Totals:
    """Of a whole batch."""
    shape = batch.inputs.shape[:2]
    steps = shape[0] * shape[1] if batch.mask is None else batch.mask.sum()
    return Totals(jnp.sum(batch.weights, dtype=float), steps, neighbours(shape, batch.mask, batch.reset).sum())


def loss_and_accuracy(
    model,
    batch,
    carry,
    key,
    ar: float = 0.0,
    tar: float = 0.0,
    scores: Callable = token_scores,
    z_loss: float = 0.0,
    totals: Totals | None = None,
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], Float[Array, ""], PyTree]]:
    """The loss to be trained; then the loss to be reported (nats), the accuracy, and the model's state after the batch.

    Loss and accuracy are weighted means. `ar` and `tar` add that many times `activation_l2` and `temporal_l2` of what
    the backbone gives, and `z_loss`, to the trained loss alone, the mean of log Z^2. `totals`: those of the batch that
    this one is a part of; all means are over that, so that its parts add up to it.
    """
    totals = totals_of(batch) if totals is None else totals
    penalty = 0.0
    if ar or tar:
        ys, carry = model.hidden(batch.inputs, carry, batch.mask, batch.reset, key=key)
        logits = model.answers(ys, batch.mask, key=key)
        penalty = ar * activation_l2(ys, batch.mask, totals.steps)
        penalty += tar * temporal_l2(ys, batch.mask, batch.reset, totals.pairs)
    else:
        logits, carry = model(batch.inputs, carry, batch.mask, batch.reset, key=key)
    nll, correct = scores(logits, batch.targets)
    total = totals.weight.astype(nll.dtype)
    weights = batch.weights.astype(nll.dtype) / jnp.where(total > 0, total, 1)
    loss = jnp.sum(jnp.where(weights != 0, nll, 0) * weights) + penalty
    trained = loss
    if z_loss:
        log_z = jax.nn.logsumexp(logits.astype(nll.dtype), axis=-1)
        trained = loss + z_loss * jnp.sum(jnp.where(weights != 0, jnp.square(log_z), 0) * weights)
    return trained, (loss, jnp.sum(correct * weights), carry)


def terms_of(task, options: StepOptions) -> dict[str, Any]:
    """How `loss_and_accuracy` scores a task's answers, and what it adds."""
    penalties = {name: getattr(task, name, 0.0) for name in ("ar", "tar")}
    return penalties | {"z_loss": options.z_loss, "scores": getattr(task, "scores", token_scores)}


def gradients(params: PyTree, graphdef: nnx.GraphDef, batch, carry, key, parts: int, **terms) -> tuple[PyTree, tuple]:
    """The gradient, and (loss, accuracy, carry), of a batch; `parts` micro-batches of its rows, one after another.

    Row r goes to micro-batch r mod `parts`, so that rows which are sharded over devices stay where they are. The sum
    is over parts of the whole batch's mean: it is the undivided batch's gradient, and dropout alone is drawn otherwise.
    Over a mesh each device adds up the micro-batches of its own rows, with weights gathered once before; what the
    devices have is summed once after.
    """

    def loss_of(params, part, carry, key, totals):  # the carry is a constant: this cuts the gradient between batches
        return loss_and_accuracy(nnx.merge(graphdef, params), part, carry, key, totals=totals, **terms)

    grad = jax.grad(loss_of, has_aux=True)
    totals = totals_of(batch)
    if parts == 1:
        return grad(params, batch, carry, key, totals)
    axes = sharding.row_axes(nnx.merge(graphdef, params)) if carry is not None else None

    def accumulated(params, totals, batch, carry, keys):
        carries = None if carry is None else jax.tree.map(partial(_divide, parts), carry, axes)
        micro = (jax.tree.map(partial(_divide, parts), batch), carries, keys)
        first = jax.tree.map(lambda x: x[0], micro)
        grads, (loss, accuracy, _) = jax.eval_shape(grad, params, *first, totals)
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, loss, accuracy))

        def body(sums, now):
            grads, (loss, accuracy, carry) = grad(params, *now, totals)
            return jax.tree.map(jnp.add, sums, (grads, loss, accuracy)), None if carries is None else carry

        sums, carries = jax.lax.scan(body, empty, micro)
        return sums, None if carries is None else jax.tree.map(_unite, carries, axes)

    keys = jax.random.split(key, parts * local.row_devices())
    places = (jax.tree.map(lambda _: 0, batch), axes, 0)
    (grads, loss, accuracy), carry = local.summed_over_rows(
        accumulated, (params, totals), (batch, carry, keys), places, axes
    )
    return grads, (loss, accuracy, carry)


def _divide(parts: int, x: Array, axis: int = 0) -> Array:
    """Every `parts`-th of the B rows on an axis, as (parts, ..., B / parts, ...)."""
    rows = x.shape[axis]
    return jnp.moveaxis(x.reshape(*x.shape[:axis], rows // parts, parts, *x.shape[axis + 1 :]), axis + 1, 0)


def _unite(x: Array, axis: int = 0) -> Array:
    """What `_divide` divided."""
    x = jnp.moveaxis(x, 0, axis + 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def train_step(
    state: TrainState,
    *,
    graphdef: nnx.GraphDef,
    task,
    tx: optax.GradientTransformation,
    batch_size: int,
    options: StepOptions = PLAIN,
) -> tuple[TrainState, StepMetrics]:
    """One update; after a bad step the state is as it came, but that a skipped one counts as done."""
    number = guard.batch_number(state.guard, state.step)
    batch = jax.tree.map(local.activations, task.batch("train", state.seed, number, batch_size))
    key = jax.random.fold_in(jax.random.key(state.seed), number)
    carry = state.carry if task.carries_state else None
    terms = terms_of(task, options)
    grads, (loss, accuracy, carry) = gradients(state.params, graphdef, batch, carry, key, options.accumulate, **terms)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(updates))
    good, guard_if_good, guard_if_bad = guard.judge(state.guard, loss, finite, options.spike)
    params = optax.apply_updates(state.params, updates)
    new = state._replace(
        params=params,
        opt_state=opt_state,
        step=state.step + 1,
        carry=carry if task.carries_state else (),
        average=averaged(state.average, params, state.step, options.ema),
        guard=guard_if_good,
    )
    kept = state._replace(step=new.step, guard=guard_if_bad) if options.on_bad_step == "skip" else state
    new = sharding.keep(jax.tree.map(lambda new, old: jnp.where(good, new, old), new, kept), graphdef)
    counted = (new.guard.bad, new.guard.in_a_row) if new.guard else (None, None)
    return new, StepMetrics(loss, accuracy, grad_norm, optim.learning_rate(opt_state), good, *counted)


def averaged(average: PyTree, params: PyTree, step: Int[Array, ""], decay: float) -> PyTree:
    """The running mean of the parameters; its decay grows to `decay`, so that the first ones are soon forgotten."""
    if not decay:
        return ()
    weight = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, p: a + weight.astype(a.dtype) * (p - a), average, params)


@partial(jax.jit, static_argnames=("graphdef", "ema"), donate_argnames="state")
def _with_best(state: TrainState, score: Float[Array, ""], *, graphdef, ema: bool) -> TrainState:
    """The state with its weights as the best ones, if their score is less."""
    now = Best(score, state.step, state.average if ema else state.params)
    best = jax.tree.map(lambda new, old: jnp.where(score < state.best.score, new, old), now, state.best)
    return sharding.keep(state._replace(best=best), graphdef)


@partial(
    jax.jit, static_argnames=("graphdef", "shell", "tx", "batch_size", "options", "length"), donate_argnames="state"
)
def _dispatch(
    state: TrainState,
    arrays: list[Array],
    count: Int[Array, ""],
    *,
    graphdef,
    shell: TaskShell,
    tx,
    batch_size,
    options,
    length,
) -> tuple[TrainState, StepMetrics]:
    """`count` <= `length` steps in one program, their metrics stacked. A bad step repeats, the state standing still."""
    task = shell.join(arrays)
    step = partial(train_step, graphdef=graphdef, task=task, tx=tx, batch_size=batch_size, options=options)
    row = jax.eval_shape(step, state)[1]
    history = jax.tree.map(lambda x: jnp.zeros((length, *x.shape), x.dtype), row)

    def body(i, loop):
        state, history = loop
        state, row = step(state)
        return state, jax.tree.map(lambda h, x: h.at[i].set(x), history, row)

    state, history = jax.lax.fori_loop(0, count, body, (state, history))
    return state, sharding.whole(history)


@partial(jax.jit, static_argnames=("shell", "split", "batch_size"))
def _draw(arrays, seed, step, *, shell, split, batch_size):
    return sharding.whole(shell.join(arrays).batch(split, seed, step, batch_size))


def check_data(task, split: str, batch_size: int, seed: int, step: int = 0) -> None:
    """ValueError where batch number `step` of a split has labels or tokens that do not exist, or wrong shapes."""
    if is_fed(task):
        batch = task.batch(split, seed, step, batch_size)
    else:
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
    options: StepOptions = PLAIN,
    max_bad_steps: int = 10,
    keep_last: int = 2,
    keep_every: int = 0,
    profile: int = 0,
    progress: bool = True,
    label: str = "train",
    record: dict[str, Any] | None = None,
    told: Callable[[], bool] = lambda: False,
    stall_limit: int = 1800,
    work: metrics.Work | None = None,
    pruned: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train, resuming from the newest intact checkpoint in `workdir`; leaves the final parameters in `model`.

    Writes config.json (`record` and the number of parameters), checkpoints/, metrics.jsonl (no clock in it: a resumed
    run repeats it to the last digit), timing.jsonl and result.json, which is what is returned: `record`, steps, seed,
    parameters, seconds, valid_* and test_* metrics (with `keep_best` of those weights, and best_step). The first batch
    of every split is checked before anything else.
    `eval_every`, `save_every` = 0: only at the end. A train line is the mean since the line or checkpoint before it.
    `options`: what a step does beside a plain update. `max_bad_steps`: so many bad steps in a row, or rollbacks to one
    checkpoint, that one more ends the run. `keep_last` checkpoints are kept, and those of every `keep_every` steps (0:
    no others). `profile`: trace so many steps, once all is compiled, into `workdir`/profile. `told`: asked between
    dispatches and between batches of an evaluation; where it says yes (`distributed.Stop`), the step is saved, and
    `Stopped` raised. Several processes need a mesh over all their devices, and one `workdir` that all see; where one
    of them waits for `stall_limit` seconds (0: for ever), it says for whom, and ends. `work`: what timing.jsonl is to
    tell speed by, beside steps and tokens a second. `pruned`: asked after each evaluation but the last; where it says
    yes the run ends there, and the result has that step as `pruned` and no test_* metrics.
    """
    counts = {
        "steps": steps,
        "batch_size": batch_size,
        "log_every": log_every,
        "steps_per_dispatch": steps_per_dispatch,
        "max_bad_steps": max_bad_steps,
        "keep_last": keep_last,
    }
    eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
    for name, value in (counts | {"eval_batch_size": eval_batch_size}).items():
        if value < 1:
            raise ValueError(f"{name} is {value}: at least 1 is needed")
    for name, value in {"eval_every": eval_every, "save_every": save_every}.items():
        if value < 0:
            raise ValueError(f"{name} is {value}: it must be positive, or 0 for the end only")
    for name, value in {"keep_every": keep_every, "profile": profile, "stall_limit": stall_limit}.items():
        if value < 0:
            raise ValueError(f"{name} is {value}: it must be positive, or 0 for none")
    if profile and workdir is None:
        raise ValueError(f"profile is {profile}: the trace needs a workdir to be written into")
    check_options(options, batch_size)
    if options.keep_best:
        sign = -1 if "accuracy" in options.keep_best else 1
        measured = task.metrics(dict.fromkeys(("nll", "correct", "weight"), 1.0))
        if options.keep_best not in measured:
            raise ValueError(unknown("keep_best", options.keep_best, measured))
        if not eval_every:
            raise ValueError(f"keep_best is {options.keep_best!r}, but eval_every is 0: no weights are compared")
    processes, mesh = jax.process_count(), jax.sharding.get_mesh()
    if processes > 1 and mesh.size != jax.device_count():
        raise ValueError(
            f"{processes} processes need a mesh over all {jax.device_count()} devices: use sharding.use(mesh)"
        )
    clock = metrics.Clock()
    with clock("start_up"):
        for split in SPLITS:
            check_data(task, split, *((batch_size, seed) if split == "train" else (eval_batch_size, 0)))
        workdir = None if workdir is None else Path(workdir)
        graphdef, params = nnx.split(model)
        parameters = sum(x.size for x in jax.tree.leaves(params))
        first = jax.process_index() == 0
        if first and record and workdir is not None and not (workdir / "config.json").exists():
            workdir.mkdir(parents=True, exist_ok=True)
            metrics.write_json(workdir / "config.json", record | {"parameters": parameters, "format": FORMAT})
        task = sharding.everywhere(task) if split_task(task)[0] else task
        arrays, shell = split_task(task)
        start = partial(init_state, model, task, tx, batch_size, seed, options)
        dispatch = partial(
            _dispatch,
            graphdef=graphdef,
            tx=tx,
            batch_size=batch_size,
            options=options,
            length=steps_per_dispatch,
        )
        feed = Feed(task, "train", seed, batch_size, steps_per_dispatch) if is_fed(task) else None
        batch = jax.eval_shape(partial(task.batch, "train", seed, 0, batch_size))
        rollback = options.on_bad_step == "rollback"
        recheck = partial(check_data, task, "train", batch_size, seed)
        state = start()

    def look(weights, split, between):
        found = evaluate_params(graphdef, weights, task, split, eval_batch_size, 0, between)
        if not all(math.isfinite(v) for v in found.values() if isinstance(v, float)):  # is it the data?
            for step in range(task.num_batches(split, eval_batch_size)):
                check_data(task, split, eval_batch_size, 0, step)
        return found

    run = Run(
        *(workdir, state, steps, log_every, label, progress, recheck),
        start=start if rollback else None,
        shape=batch.inputs.shape[:2],
        work=work,
        max_bad_steps=max_bad_steps,
        keep=(keep_last, keep_every),
        profile=profile,
        clock=clock,
    )
    del state
    every = tuple(each for each in (save_every, eval_every) if each)
    with run, distributed.Watch(stall_limit) as watch:

        def pause() -> None:
            watch.beat(run.step)
            if told():
                run.stop()

        while True:
            if run.step < steps:
                pause()
            at, final, given_up = run.step, run.step == steps, False
            if final or (eval_every and at and at % eval_every == 0):
                with clock("evaluation"):
                    weights = run.state.average if options.ema else run.state.params
                    unsaved = final and options.keep_best  # the last checkpoint is to hold the best weights of all
                    results = {"valid": look(weights, "valid", partial(watch.beat, at) if unsaved else pause)}
                    if options.keep_best:
                        score = np.float32(sign * results["valid"][options.keep_best])
                        run.state = _with_best(run.state, score, graphdef=graphdef, ema=bool(options.ema))
                        weights = run.state.best.params
                if unsaved:
                    run.save(at, run.state)
                with clock("evaluation"):
                    if final:
                        results["test"] = look(weights, "test", pause)
                run.write_evaluation(at, results)
                given_up = not final and distributed.of_first("compare the run with others", pruned)
            if final or given_up:
                break
            end = min(steps, *(at - at % each + each for each in (steps_per_dispatch, *every)))
            if feed:  # while the dispatch before still runs
                arrays, shell = split_task(feed.take(at, end - at, run.state.guard, run.waiting))
            run.advance(end, partial(dispatch, arrays=arrays, count=jnp.int32(end - at), shell=shell))
            if end == steps or any(end % each == 0 for each in every):
                run.read_pending()  # after a rollback `run.step` is no longer `end`
                due = not options.keep_best if end == steps else save_every and end % save_every == 0
                if run.step == end and due:
                    run.save(end, run.state)
        nnx.update(model, weights)
        own = {}
        if options.keep_best:
            own["best_step"] = int(run.state.best.step)
            results["valid"] = look(weights, "valid", partial(watch.beat, steps))
        result = (
            (record or {})
            | {
                "steps": at,
                "seed": seed,
                "parameters": parameters,
                "seconds": round(run.seconds(), 3),
            }
            | own
            | ({"pruned": at} if given_up else {})
            | {f"{split}_{name}": value for split, found in results.items() for name, value in found.items()}
        )
        if workdir is not None:
            run.checkpoints.wait()  # a result stands only beside a complete checkpoint
            if first:
                metrics.write_json(workdir / "result.json", result)
    return result
