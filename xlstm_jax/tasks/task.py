"""What a task is: batches drawn by number, and what counts as right.

A task is a frozen dataclass with

    name, vocab_size, num_classes      what goes in and what comes out
    chance                             accuracy of guessing (s_rand), 0 where it has no use
    carries_state                      True: batch t + 1 continues batch t row by row
    batch(split, seed, step, batch_size) -> Batch        pure; `seed` and `step` may be traced
    num_batches(split, batch_size) -> int                an evaluation is steps 0 .. n - 1
    metrics(sums) -> dict                                from the sums {"nll", "correct", "weight"}
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

SPLITS = ("train", "valid", "test")


class Batch(NamedTuple):
    """Token sequences, what is asked of them, and where they begin and end."""

    inputs: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]  # 1 where an answer is asked, 0 elsewhere: loss and accuracy are weighted means
    mask: Bool[Array, "B T"] | None  # False = padding
    reset: Bool[Array, "B T"] | None  # True = a new document begins at this step


def split_index(split: str) -> int:
    """Position of a split's name in SPLITS; refuses any other name."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    return SPLITS.index(split)


def check(batch: Batch, task: Any) -> None:
    """Raises ValueError where a concrete batch does not fit the task's vocabulary, classes or shapes."""
    shape = np.shape(batch.inputs)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{task.name}: inputs must be (B, T) with B and T at least 1, not {shape}")
    for field, value in batch._asdict().items():
        if value is not None and np.shape(value) != shape:
            raise ValueError(f"{task.name}: {field} has shape {np.shape(value)} where inputs have {shape}")
    for field, limit in (("inputs", "vocab_size"), ("targets", "num_classes")):
        value, bound = np.asarray(getattr(batch, field)), getattr(task, limit)
        if not np.issubdtype(value.dtype, np.integer):
            raise ValueError(f"{task.name}: {field} must be integers, not {value.dtype}")
        if value.min() < 0 or value.max() >= bound:
            wrong = int(value.min() if value.min() < 0 else value.max())
            raise ValueError(f"{task.name}: {field} hold {wrong}, outside 0 .. {bound - 1} ({limit} = {bound})")
    weights = np.asarray(batch.weights)
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError(f"{task.name}: weights must be finite and not negative")
