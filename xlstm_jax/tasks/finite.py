"""Tasks over a finite set of samples: which of them are in a batch, and labelled sequences of tokens or pixels."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Int

from xlstm_jax.tasks.task import SPLITS, Batch, split_index


def pick(
    split: str, seed: Int[ArrayLike, ""], step: Int[ArrayLike, ""], batch_size: int, count: int
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """The samples of batch number `step` and whether each counts.

    Training goes through all `count` in an order that (seed, pass) decide, in as many steps as there are full batches.
    Evaluation takes them in order; rows past the last show it again and do not count.
    """
    rows, step = jnp.arange(batch_size, dtype=jnp.int32), jnp.asarray(step, jnp.int32)
    if split != "train":
        sample = step * batch_size + rows
        return jnp.minimum(sample, count - 1), sample < count
    a_pass = count // batch_size
    if not a_pass:
        raise ValueError(f"{count} training samples are fewer than batch_size {batch_size}")
    key = jax.random.fold_in(jax.random.key(seed), split_index(split))
    order = jax.random.permutation(jax.random.fold_in(key, step // a_pass), count).astype(jnp.int32)
    return order[step % a_pass * batch_size + rows], jnp.ones(batch_size, bool)


def num_batches(name: str, split: str, batch_size: int, counts: tuple[int, ...]) -> int:
    """Batches that show every sample of an evaluation split once."""
    index = split_index(split)
    if index == 0:
        raise ValueError(f"{name}: training has no end: num_batches takes valid or test")
    return -(-counts[index] // batch_size)


@dataclass(frozen=True, eq=False)
class LabelledSequences:
    """Sequences with one class each, asked for at their last step; a task adds `_read` and its options.

    A pytree (`byte_lm.register`) whose leaves are those of `data`: for each split the sequences (N, T), padded on the
    right, their lengths (N,) and labels (N,).
    """

    data: dict[str, tuple[Any, Any, Any]] = field(init=False, repr=False)
    data_hash: str = field(init=False, repr=False)
    counts: tuple[int, ...] = field(init=False, repr=False)  # samples of each split
    vocab_size: int = field(init=False)
    num_classes: int = field(init=False)

    name: ClassVar[str]
    carries_state: ClassVar[bool] = False

    def __post_init__(self):
        data, digest, vocab_size, num_classes = self._read()
        counts = tuple(len(data[split][2]) for split in SPLITS)
        found = {"data": jax.tree.map(jnp.asarray, data), "data_hash": digest, "counts": counts}
        for name, value in (found | {"vocab_size": vocab_size, "num_classes": num_classes}).items():
            object.__setattr__(self, name, value)

    def _read(self) -> tuple[dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]], str, int, int]:
        """The data, its SHA-256, the vocabulary and the number of classes."""
        raise NotImplementedError

    @property
    def chance(self) -> float:
        return 1 / self.num_classes

    def shown(self, sequences: Array) -> Array:
        """What the model is shown of the stored rows."""
        return sequences.astype(jnp.int32)

    def batch(self, split: str, seed: Int[ArrayLike, ""], step: Int[ArrayLike, ""], batch_size: int) -> Batch:
        """Batch number `step`; see `pick`."""
        count = self.counts[split_index(split)]
        sample, counted = pick(split, seed, step, batch_size, count)
        sequences, lengths, labels = (array[sample] for array in self.data[split])
        positions, lengths = jnp.arange(sequences.shape[1], dtype=jnp.int32)[None], lengths[:, None].astype(jnp.int32)
        asked = positions == lengths - 1
        targets = jnp.where(asked, labels[:, None].astype(jnp.int32), 0)
        weights = (asked & counted[:, None]).astype(jnp.float32)
        return Batch(self.shown(sequences), targets, weights, positions < lengths, None)

    def num_batches(self, split: str, batch_size: int) -> int:
        """Batches of one evaluation."""
        return num_batches(self.name, split, batch_size, self.counts)

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Loss in nats a sequence, and accuracy."""
        return {
            name: float(sums[total]) / float(sums["weight"])
            for name, total in (("loss", "nll"), ("accuracy", "correct"))
        }
