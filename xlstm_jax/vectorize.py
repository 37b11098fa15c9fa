"""Many runs as one program: `train.train_step` under `vmap` over runs that differ in seed and numbers of the optimiser.

The leading axis of all that a run carries is the axis "runs", sharded over the devices; no run meets another. A run
that has diverged, or was resumed from a later step than the others, stands still while they go on: a masked update.
Batches and keys are those of the run alone; its numbers are too, to the rounding of batched products.
"""

import contextlib
import functools
import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from xlstm_jax import evaluate, metrics, optim, train
from xlstm_jax.checkpoint import FORMAT
from xlstm_jax.run import Run
from xlstm_jax.tasks.task import SPLITS

STATIC = ("graphdef", "shell", "settings", "batch_size", "mesh")


class Member(NamedTuple):
    """One run of a group: what is its own."""

    params: PyTree
    seed: int
    settings: optim.Settings
    workdir: Path
    record: dict[str, Any]
    pruned: Callable[[], bool] = bool  # see `train.fit`


def split_numbers(settings: list[optim.Settings]) -> tuple[optim.Settings, dict[str, list]]:
    """What all have in common (None in place of the rest), and the values of each number that differs.

    A number that is 0 or absent in one run and not in another makes another program: ValueError.
    """
    numbers = {}
    for name in optim.Settings._fields:
        values = [getattr(each, name) for each in settings]
        if any(value != values[0] for value in values):
            if name not in optim.NUMBERS or not all(values):
                raise ValueError(f"{name} is {values[0]} in one run and another in a second: these are two programs")
            numbers[name] = values
    return settings[0]._replace(**dict.fromkeys(numbers)), numbers


def fit(
    members: list[Member],
    graphdef: nnx.GraphDef,
    task: Any,
    *,
    steps: int,
    batch_size: int,
    eval_every: int = 0,
    save_every: int = 0,
    log_every: int = 100,
    eval_batch_size: int | None = None,
    steps_per_dispatch: int = 10,
    keep_last: int = 2,
    keep_every: int = 0,
    progress: bool = True,
    label: str = "group",
) -> list[dict[str, Any] | train.Diverged]:
    """Train all members as `train.fit` trains each: the same files in each folder, resumed each from its checkpoint.

    Returns each one's result, or how it diverged. A result's `seconds` are its share of the group's; `runs_together`
    says how many runs the group had.
    """
    eval_batch_size = eval_batch_size or batch_size
    for split in SPLITS:
        for seed in [m.seed for m in members] if split == "train" else [0]:
            train.check_data(task, split, batch_size if split == "train" else eval_batch_size, seed)
    parameters = sum(x.size for x in jax.tree.leaves(members[0].params))
    for member in members:
        member.workdir.mkdir(parents=True, exist_ok=True)
        if not (member.workdir / "config.json").exists():
            metrics.write_json(
                member.workdir / "config.json", member.record | {"parameters": parameters, "format": FORMAT}
            )
    settings, values = split_numbers([member.settings for member in members])
    arrays, shell = evaluate.split_task(task)
    mesh = Mesh(np.array(jax.devices()[: len(members)]), ("runs",))
    program = dict(graphdef=graphdef, shell=shell, settings=settings, batch_size=batch_size, mesh=mesh)
    params = _stack([member.params for member in members], mesh)
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
    numbers = _stack([{name: np.asarray(v[i], dtype) for name, v in values.items()} for i in range(len(members))], mesh)
    seeds = _stack([np.int32(member.seed) for member in members], mesh)
    first = jax.device_get(_init(params, seeds, numbers, arrays, **program))
    with contextlib.ExitStack() as stack:
        runs = []
        for index, member in enumerate(members):
            state = jax.tree.map(jnp.asarray, _take(first, index))
            check = functools.partial(train.check_data, task, "train", batch_size, member.seed)
            opened = Run(member.workdir, state, steps, log_every, label, False, check, keep=(keep_last, keep_every))
            runs.append(stack.enter_context(opened))
        group = _Group(runs, [member.workdir.name for member in members], steps, label, progress)
        stack.callback(group.progress.close)
        state, at = _stack([run.state for run in runs], mesh), 0
        del params, first, opened
        while left := [run.step for index, run in enumerate(runs) if index not in group.ended]:
            at = max(at, min(left))
            final = at == steps
            if final or (eval_every and at and at % eval_every == 0):
                group.read_pending(state)
                splits = ("valid", "test") if final else ("valid",)
                evaluations = [
                    _evaluate(state.params, task, split, eval_batch_size, graphdef, mesh, len(runs)) for split in splits
                ]
                for index in group.alive(at):
                    results = {split: each[index] for split, each in zip(splits, evaluations)}
                    runs[index].write_evaluation(at, results)
                    group.results[index] = results
                if not final:
                    group.ended |= {index: at for index in group.alive(at) if members[index].pruned()}
            if final:
                break
            end = min(
                steps, *(at - at % every + every for every in (steps_per_dispatch, save_every, eval_every) if every)
            )
            going = _stack([np.bool_(index in group.alive(at)) for index in range(len(runs))], mesh)
            state, history = _dispatch(
                state, numbers, going, arrays, jnp.int32(end - at), length=steps_per_dispatch, **program
            )
            group.read_pending(state)  # of the dispatch before: this one runs meanwhile
            group.pending = (at, end, history, group.alive(at))
            at = end
            if at == steps or (save_every and at % save_every == 0):
                group.read_pending(state)
                host = jax.device_get(state)
                for index in group.alive(at - 1):
                    runs[index].save(at, _take(host, index))
        return [group.finish(index, member, steps, parameters) for index, member in enumerate(members)]


class _Group:
    """What the runs of a group have written and what is still to be read, and who goes on."""

    def __init__(self, runs: list, names: list[str], steps: int, label: str, progress: bool):
        self.runs, self.names, self.pending = runs, names, None
        self.results: dict[int, dict] = {}
        self.ended: dict[int, train.Diverged | int] = {}  # before the last step: how, or where it was pruned
        self.progress = metrics.Progress(steps, min(run.step for run in runs), label, enabled=progress)
        if began := sorted({run.step for run in runs} - {0}):
            self.progress.note(f"resumed at step {', '.join(map(str, began))}")

    def alive(self, at: int) -> list[int]:
        """The runs that take part at this step: not ended, and not resumed from a later one."""
        return [i for i, run in enumerate(self.runs) if i not in self.ended and run.step <= at]

    def read_pending(self, state: train.TrainState) -> None:
        """Wait for the pending dispatch; write its metrics, each run's into its own folder; note who diverged."""
        if self.pending is None:
            return
        start, end, history, took_part = self.pending
        self.pending, history = None, jax.device_get(history)
        for index in (i for i in took_part if i not in self.ended):
            run, mine = self.runs[index], jax.tree.map(operator.itemgetter((slice(None), index)), history)
            run.pending = (start, end, mine)
            good = mine.good[: end - start].all()
            try:
                run.read_pending(state if good else _take(jax.device_get(state), index))
            except train.Diverged as error:
                self.ended[index] = error
                self.progress.note(f"{self.names[index]}: {error}")
        losses = [x for x in history.loss[end - start - 1, took_part].tolist() if math.isfinite(x)]
        self.progress.update(end, math.fsum(losses) / max(len(losses), 1))

    def finish(self, index: int, member: Member, steps: int, parameters: int) -> dict[str, Any] | train.Diverged:
        """Write and return a run's result; of a run that diverged, the error."""
        pruned = self.ended.get(index)
        if isinstance(pruned, train.Diverged):
            return pruned
        run, count = self.runs[index], len(self.runs)
        own = {"steps": steps if pruned is None else pruned, "seed": member.seed, "parameters": parameters}
        own |= {"runs_together": count} | ({} if pruned is None else {"pruned": pruned})
        own["seconds"] = round(run.seconds() / count, 3)
        scores = {f"{s}_{name}": value for s, found in self.results[index].items() for name, value in found.items()}
        run.checkpoints.latest()  # a result stands only beside a complete checkpoint
        metrics.write_json(member.workdir / "result.json", member.record | own | scores)
        return member.record | own | scores


def _stack(trees: list[PyTree], mesh: Mesh) -> PyTree:
    """One tree with a leading axis of runs over the devices; the last run again until they divide it."""
    trees = [*trees, *trees[-1:] * (-len(trees) % mesh.size)]
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *jax.device_get(trees))
    return jax.device_put(stacked, NamedSharding(mesh, P("runs")))


def _take(tree: PyTree, index: int) -> PyTree:
    return jax.tree.map(lambda x: np.asarray(x[index]), tree)


def _shard(function, mesh: Mesh, in_specs: tuple, out_specs: Any):
    """Each device does its own runs and nothing is exchanged."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


@functools.partial(jax.jit, static_argnames=STATIC)
def _init(params, seeds, numbers, arrays, *, graphdef, shell, settings, batch_size, mesh):
    def one(params, seed, numbers):
        tx = optim.build(settings._replace(**numbers))
        return train.init_state(nnx.merge(graphdef, params), shell.join(arrays), tx, batch_size, seed)

    return _shard(jax.vmap(one), mesh, (P("runs"),) * 3, P("runs"))(params, seeds, numbers)


@functools.partial(jax.jit, static_argnames=(*STATIC, "length"), donate_argnames="state")
def _dispatch(
    state: train.TrainState, numbers, going, arrays, count, *, graphdef, shell, settings, batch_size, mesh, length
) -> tuple[train.TrainState, train.StepMetrics]:
    """`count` <= `length` steps of all runs in one program; metrics (length, runs)."""

    def many(state, numbers, going, arrays, count):
        def one(state, numbers, going):
            task, tx = shell.join(arrays), optim.build(settings._replace(**numbers))
            new, row = train.train_step(state, graphdef=graphdef, task=task, tx=tx, batch_size=batch_size)
            return jax.tree.map(lambda new, old: jnp.where(going, new, old), new, state), row

        step = jax.vmap(one)
        row = jax.eval_shape(step, state, numbers, going)[1]
        history = jax.tree.map(lambda x: jnp.zeros((length, *x.shape), x.dtype), row)

        def body(i, loop):
            state, history = loop
            state, row = step(state, numbers, going)
            return state, jax.tree.map(lambda h, x: h.at[i].set(x), history, row)

        return jax.lax.fori_loop(0, count, body, (state, history))

    specs = (P("runs"), P("runs"), P("runs"), P(), P())
    return _shard(many, mesh, specs, (P("runs"), P(None, "runs")))(state, numbers, going, arrays, count)


@functools.partial(jax.jit, static_argnames=("graphdef", "shell", "split", "batch_size", "mesh"))
def _batch_sums(params, arrays, carry, step, *, graphdef, shell, split, batch_size, mesh):
    def many(params, arrays, carry, step):
        def one(params, carry):
            return evaluate._batch_sums(
                params, arrays, carry, jnp.int32(0), step, graphdef=graphdef, shell=shell, split=split,
                batch_size=batch_size,
            )  # fmt: skip

        return jax.vmap(one)(params, carry)

    return _shard(many, mesh, (P("runs"), P(), P("runs"), P()), P("runs"))(params, arrays, carry, step)


def _evaluate(
    params: PyTree, task: Any, split: str, batch_size: int, graphdef: nnx.GraphDef, mesh: Mesh, count: int
) -> list[dict[str, Any]]:
    """`evaluate.evaluate_params` of every run."""
    arrays, shell = evaluate.split_task(task)
    model = nnx.merge(graphdef, _take(jax.device_get(params), 0)) if task.carries_state else None
    carry: Array | tuple = _stack([model.initial_state(batch_size)] * count, mesh) if model else ()
    sums = []
    for step in range(task.num_batches(split, batch_size)):
        one, carry = _batch_sums(
            params, arrays, carry, jnp.int32(step), graphdef=graphdef, shell=shell, split=split,
            batch_size=batch_size, mesh=mesh,
        )  # fmt: skip
        sums.append(one)
    if not sums:
        raise ValueError(
            f"task {task.name}: the {split} split has no batch of {batch_size} rows; use a smaller batch size"
        )
    sums = jax.device_get(sums)
    return [
        task.metrics({name: np.sum([one[name][index] for one in sums], axis=0, dtype=np.float64) for name in sums[0]})
        for index in range(count)
    ]
