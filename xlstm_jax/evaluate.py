"""Evaluation: the whole of a split, without dropout, with the state carried along where the task asks for it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree


def token_scores(
    logits: Float[Array, "B T K"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Cross-entropy in nats, and 1.0 where the largest logit is the target's; float32 at least."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - picked
    return nll, (jnp.argmax(logits, axis=-1) == targets).astype(logits.dtype)


def split_task(task) -> tuple[list[Array], "TaskShell"]:
    """(arrays of the task, the hashable rest): arrays go into a compiled program as arguments, not as constants."""
    leaves, structure = jax.tree.flatten(task)
    if len(leaves) == 1 and leaves[0] is task:  # no pytree: the task itself is static
        return [], TaskShell(task, None)
    return leaves, TaskShell(None, structure)


class TaskShell:
    """A task without its arrays; hashable, so that equal tasks share one compiled program."""

    def __init__(self, task, structure):
        self._task, self._structure = task, structure
        try:
            self._key = (hash(task), task, hash(structure), structure)
        except TypeError:  # holds an array and is no pytree
            self._key = (id(task),)

    def join(self, arrays):
        return self._task if self._structure is None else jax.tree.unflatten(self._structure, arrays)

    def __hash__(self):
        return hash(self._key[0])

    def __eq__(self, other):
        return isinstance(other, TaskShell) and self._key == other._key


@functools.partial(jax.jit, static_argnames=("graphdef", "shell", "split", "batch_size"), donate_argnames="carry")
def _batch_sums(params, arrays, carry, seed, step, *, graphdef, shell, split, batch_size):
    task, model = shell.join(arrays), nnx.merge(graphdef, params)
    batch = task.batch(split, seed, step, batch_size)
    logits, state = model(batch.inputs, carry if task.carries_state else None, batch.mask, batch.reset)
    nll, correct = getattr(task, "scores", token_scores)(logits, batch.targets)
    weights = batch.weights.astype(nll.dtype)
    sums = {
        "nll": jnp.sum(jnp.where(weights != 0, nll, 0) * weights),
        "correct": jnp.sum(correct * weights),
        "weight": jnp.sum(weights),
    }
    if hasattr(task, "bucket"):
        member = task.bucket(batch)[:, None] == jnp.arange(len(task.buckets()))[None]
        for name, values in (("correct", correct * weights), ("weight", weights)):
            sums[f"{name}_by_length"] = jnp.sum(jnp.sum(values, axis=1)[:, None] * member, axis=0)
    return sums, state if task.carries_state else ()


def evaluate_params(graphdef, params: PyTree, task, split: str, batch_size: int, seed=0) -> dict[str, Any]:
    """Metrics of the split, by `task.metrics`; sums are float32 within a batch, float64 over batches."""
    arrays, shell = split_task(task)
    carry = nnx.merge(graphdef, params).initial_state(batch_size) if task.carries_state else ()
    sums = []
    for step in range(task.num_batches(split, batch_size)):
        one, carry = _batch_sums(
            params,
            arrays,
            carry,
            jnp.int32(seed),
            jnp.int32(step),
            graphdef=graphdef,
            shell=shell,
            split=split,
            batch_size=batch_size,
        )
        sums.append(one)  # read after the loop: the device never waits for the host
    if not sums:
        raise ValueError(
            f"task {task.name}: the {split} split has no batch of {batch_size} rows; use a smaller batch size"
        )
    sums = jax.device_get(sums)
    total = {name: np.sum([one[name] for one in sums], axis=0, dtype=np.float64) for name in sums[0]}
    return task.metrics(total)


def evaluate(model: nnx.Module, task, split: str, batch_size: int, seed=0) -> dict[str, Any]:
    """Metrics of a model on the "valid" or "test" split of a task."""
    graphdef, params = nnx.split(model)
    return evaluate_params(graphdef, params, task, split, batch_size, seed)
