"""What a task is: batches drawn by number, and what counts as right.

A task is a frozen dataclass with

    name, vocab_size, num_classes      what goes in and what comes out
    chance                             accuracy of guessing (s_rand), 0 where it has no use
    carries_state                      True: batch t + 1 continues batch t row by row
    batch(split, seed, step, batch_size) -> Batch        pure; `seed` and `step` may be traced
    num_batches(split, batch_size) -> int                an evaluation is steps 0 .. n - 1
    metrics(sums) -> dict                                from the sums {"nll", "correct", "weight"}

and where inputs are no tokens or targets no classes

    num_features                       width of real inputs (B, T, F), in place of vocab_size
    scores(outputs, targets)           (loss, correct), (B, T) each, in place of cross-entropy and argmax;
                                       targets are real, (B, T, num_classes)

and, where rows have lengths that a score depends on,

    buckets() -> list, bucket(batch) -> (B,)             names of the parts of the lengths, and every row's part:
                                                         the sums have "correct_by_length" and "weight_by_length" too

and, where the host reads the batches (`feed` then puts them on the device; `batch` takes plain integers alone)

    host_batches(split, seed, step, batch_size, shard, ahead)    iterator over batches step, step + 1, ... in NumPy;
                                                         of each only part shard[0] of shard[1] of its rows
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

SPLITS = ("train", "valid", "test")


class Batch(NamedTuple):
    """Sequences of tokens or real vectors, what is asked of them, and where they begin and end."""

    inputs: Int[Array, "B T"] | Float[Array, "B T F"]
    targets: Int[Array, "B T"] | Float[Array, "B T C"]
    weights: Float[Array, "B T"]  # 1 where an answer is asked, 0 elsewhere: loss and accuracy are weighted means
    mask: Bool[Array, "B T"] | None  # False = padding
    reset: Bool[Array, "B T"] | None  # True = a new document begins at this step


def split_index(split: str) -> int:
    """Position of a split's name in SPLITS; refuses any other name."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    return SPLITS.index(split)


def squared_error(
    outputs: Float[Array, "B T C"], targets: Float[Array, "B T C"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Mean of (output - target)^2 over the outputs of a step, as a task's `scores`; nothing is ever "correct"."""
    loss = jnp.mean(jnp.square(outputs - targets.astype(outputs.dtype)), axis=-1)
    return loss, jnp.zeros_like(loss)


def widths(task: Any) -> dict[str, int | None]:
    """The last axis of real inputs and targets, None where they are tokens and classes."""
    outputs = task.num_classes if hasattr(task, "scores") else None
    return {"inputs": getattr(task, "num_features", None), "targets": outputs}


def check(batch: Batch, task: Any) -> None:
    """Raises ValueError where a concrete batch does not fit the task's vocabulary, classes, widths or shapes."""
    real = {field: width for field, width in widths(task).items() if width is not None}
    shape = np.shape(batch.inputs)
    if len(shape) != 2 + ("inputs" in real) or 0 in shape:
        axes = "(B, T, F)" if "inputs" in real else "(B, T)"
        raise ValueError(f"{task.name}: inputs must be {axes} with B and T at least 1, not {shape}")
    for field, value in batch._asdict().items():
        wanted = (*shape[:2], real[field]) if field in real else shape[:2]
        if value is not None and np.shape(value) != wanted:
            raise ValueError(f"{task.name}: {field} has shape {np.shape(value)} where {wanted} is needed")
        if field in real and not np.isfinite(np.asarray(value)).all():
            raise ValueError(f"{task.name}: {field} hold a value that is not finite")
    for field, limit in (("inputs", "vocab_size"), ("targets", "num_classes")):
        if field in real:
            continue
        value, bound = np.asarray(getattr(batch, field)), getattr(task, limit)
        if not np.issubdtype(value.dtype, np.integer):
            raise ValueError(f"{task.name}: {field} must be integers, not {value.dtype}")
        if value.min() < 0 or value.max() >= bound:
            wrong = int(value.min() if value.min() < 0 else value.max())
            raise ValueError(f"{task.name}: {field} hold {wrong}, outside 0 .. {bound - 1} ({limit} = {bound})")
    weights = np.asarray(batch.weights)
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError(f"{task.name}: weights must be finite and not negative")
