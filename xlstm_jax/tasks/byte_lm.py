"""Byte-level language modelling on a corpus of `data.corpora`: which byte comes next?"""

import math
from dataclasses import dataclass, field, fields
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int, UInt8

from xlstm_jax.data import corpora
from xlstm_jax.tasks.task import Batch, split_index

LARGEST = 2**29  # bytes: sums of three positions must fit in int32


@dataclass(frozen=True, eq=False)
class ByteLM:
    """Inputs are bytes, the target at each step is the byte after it; all weigh 1. Splits are contiguous, 90/5/5.

    "In the beg" -> inputs I n _ t h e _ b e, targets n _ t h e _ b e g.

    Training, carries_state=True: row r reads the text in order from its own place, start + r * (N // batch_size),
    `seq_len` bytes a step, around the end to the beginning. After N // seq_len steps a new pass begins from a new
    start, which (seed, pass) decide. `reset` marks a pass's first step, and the text's first byte wherever it comes.
    Training, carries_state=False: windows at places that (seed, step, row) decide; `reset` is None.

    Evaluation, either way: the split is cut into batch_size contiguous streams, read in order and without overlap.
    Each byte is asked for exactly once; a stream's first input is the byte before it, for the first byte of the split
    the last one of the split before. With carries_state=True the state is carried from batch to batch, starting empty.
    Steps past the end of a stream weigh 0; nothing follows them, so they need no mask. The seed plays no part.

    A pytree whose one leaf is the corpus: pass it to a jitted function and the text is an argument, not a constant.
    """

    corpus: str = "bundled:kjv"
    seq_len: int = 256  # bytes
    carries_state: bool = True
    ar: float = 0.0  # adds ar x activation_l2 of the last layer's outputs to the training loss (AR)
    tar: float = 0.0  # adds tar x temporal_l2 of them (TAR)
    data: UInt8[Array, " N"] = field(init=False, repr=False)
    data_hash: str = field(init=False, repr=False)  # SHA-256 of the corpus

    name: ClassVar[str] = "byte_lm"
    vocab_size: ClassVar[int] = 256
    num_classes: ClassVar[int] = 256
    chance: ClassVar[float] = 1 / 256

    def __post_init__(self):
        if self.seq_len < 1:
            raise ValueError(f"{self.name}: seq_len must be at least 1, not {self.seq_len}")
        for option in ("ar", "tar"):
            if not 0 <= getattr(self, option) < math.inf:
                raise ValueError(f"{self.name}: {option} must be finite and at least 0, not {getattr(self, option)}")
        for name, value in self._read().items():
            object.__setattr__(self, name, value)

    def _read(self):
        """The fields that the corpus decides."""
        data = corpora.load(self.corpus)
        start, stop = corpora.bounds(data.size, "train")
        if data.size > LARGEST or stop - start <= self.seq_len or corpora.part(data, "valid").size == 0:
            least = max(math.ceil((self.seq_len + 1) / 0.9), 20)
            raise ValueError(f"{self.name}: {self.corpus} has {data.size} bytes: need {least} (seq_len) to {LARGEST}")
        return {"data": jnp.asarray(data), "data_hash": corpora.content_hash(data)}

    def batch(self, split: str, seed: Int[ArrayLike, ""], step: Int[ArrayLike, ""], batch_size: int) -> Batch:
        """Batch number `step`; in evaluation, steps 0 .. num_batches - 1."""
        step = jnp.asarray(step, jnp.int32)
        rows = jnp.arange(batch_size, dtype=jnp.int32)[:, None]
        columns = jnp.arange(self.seq_len, dtype=jnp.int32)[None, :]
        if split != "train":
            return self._stretch(split, step, rows, columns, batch_size)
        key = jax.random.fold_in(jax.random.key(seed), split_index(split))
        return (self._stream if self.carries_state else self._windows)(key, step, rows, columns, batch_size)

    def num_batches(self, split: str, batch_size: int) -> int:
        """Batches that cover a split once."""
        if split_index(split) == 0:
            raise ValueError(f"{self.name}: training has no end: num_batches takes valid or test")
        return math.ceil(self._stream_length(split, batch_size) / self.seq_len)

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Loss in nats a byte, and in bits."""
        loss = float(sums["nll"]) / float(sums["weight"])
        return {"loss": loss, "bits_per_byte": loss / math.log(2)}

    def bounds(self, split: str) -> tuple[int, int]:
        """First position of a split's targets in `data` and the one after their last."""
        return corpora.bounds(self.data.size, split)

    def _stream_length(self, split, batch_size):
        start, stop = self.bounds(split)
        return math.ceil((stop - start) / batch_size)

    def _pairs(self):
        """Number of (byte, next byte) pairs in the training split."""
        start, stop = self.bounds("train")
        return stop - start - 1

    def _at(self, positions, weights, reset=None):
        """The batch whose inputs stand at `positions` of the corpus."""
        inputs, targets = self.data[positions].astype(jnp.int32), self.data[positions + 1].astype(jnp.int32)
        return Batch(inputs, targets, weights, None, reset)

    def _windows(self, key, step, rows, columns, batch_size):
        key = jax.random.fold_in(key, step)
        last = self._pairs() - self.seq_len  # the last place where a window fits

        def place(row):
            return jax.random.randint(jax.random.fold_in(key, row), (), 0, last + 1, jnp.int32)

        positions = jax.vmap(place)(rows[:, 0])[:, None] + columns
        return self._at(positions, jnp.ones(positions.shape, jnp.float32))

    def _stream(self, key, step, rows, columns, batch_size):
        pairs = self._pairs()
        turn, window = jnp.divmod(step, pairs // self.seq_len)
        start = jax.random.randint(jax.random.fold_in(key, turn), (), 0, pairs, jnp.int32)
        positions = (start + rows * (pairs // batch_size) + window * self.seq_len + columns) % pairs
        reset = (positions == 0) | ((window == 0) & (columns == 0))
        return self._at(positions, jnp.ones(positions.shape, jnp.float32), reset)

    def _stretch(self, split, step, rows, columns, batch_size):
        start, stop = self.bounds(split)
        length = self._stream_length(split, batch_size)
        offset = step * self.seq_len + columns  # within the stream
        target = start + rows * length + offset
        asked = (offset < length) & (target < stop)
        return self._at(jnp.where(asked, target, start) - 1, asked.astype(jnp.float32))


def register(cls: type) -> None:
    """Make the class a pytree whose one leaf is `data`; a copy is made without __init__, which reads files."""
    settings = [each.name for each in fields(cls) if each.name != "data"]

    def flatten(task):
        return (task.data,), tuple(getattr(task, name) for name in settings)

    def unflatten(values, leaves):
        task = object.__new__(cls)
        for name, value in zip((*settings, "data"), (*values, *leaves), strict=True):
            object.__setattr__(task, name, value)
        return task

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)


register(ByteLM)
