"""Language modelling on a corpus that stays in its file: the host reads batches ahead of the device."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import jax
import numpy as np
from jaxtyping import ArrayLike, Int

from xlstm_jax.data import lookup, tokens, windows
from xlstm_jax.data.tokenizers import Tokenizer
from xlstm_jax.names import unknown
from xlstm_jax.tasks.task import SPLITS, Batch, split_index
from xlstm_jax.tasks.text_lm import TextLM

ROWS = {"windows": windows.Windows, "streams": windows.Streams, "packed": windows.PackedDocuments}


class Once(windows.Source):
    """A split read once in order, in batch_size streams side by side: the evaluation of `ByteLM`, from a file.

    The first input of running text is `before`, the last token of the split before.
    """

    pads = True

    def __init__(self, file, seq_len, batch_size, before=None, shard=(0, 1)):
        super().__init__(file, seq_len, batch_size, 0, shard)
        self._before = before
        self._first = 0 if file.end is None else 1  # a document split begins with an end that is no target
        self._length = math.ceil((len(file) - self._first) / batch_size)  # of a stream

    def __len__(self):
        return math.ceil(self._length / self.seq_len)

    def rows(self, step, rows):
        offset = (step * self.seq_len + np.arange(self.seq_len))[None, :]
        targets = self._first + rows[:, None] * self._length + offset
        asked = (offset < self._length) & (targets < len(self.file))
        targets, tokens = np.where(asked, targets, self._first), self.file.tokens
        inputs = tokens[np.maximum(targets - 1, 0)].astype(np.int32)
        if self.file.end is None:
            inputs = np.where(targets == 0, np.int32(self._before), inputs)
        reset = None if self.file.end is None else inputs == self.file.end
        return windows.Rows(inputs, tokens[targets].astype(np.int32), asked.astype(np.float32), None, reset)


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """As `TextLM`, of any length: `data.windows` makes the training batches of the memory-mapped token files.

    "In the beginning" by words -> inputs In _the, targets _the _beginning.

    rows="streams": each row reads on where it stopped, its state carried where carries_state says so; "windows":
    stretches of the file in a new order each pass; "packed": whole documents, each from the empty state. Evaluation is
    `TextLM`'s.
    """

    corpus: str = "bundled:kjv"
    seq_len: int = 256  # tokens
    rows: str = "streams"
    carries_state: bool = True
    tokenizer: str = "bytes"
    data_dir: str = ""  # of the look-up; "": its default
    ar: float = 0.0  # adds ar x activation_l2 of the last layer's outputs to the training loss (AR)
    tar: float = 0.0  # adds tar x temporal_l2 of them (TAR)
    files: dict[str, tokens.TokenFile] = field(init=False, repr=False)
    coder: Tokenizer = field(init=False, repr=False)
    data_hash: str = field(init=False, repr=False)  # SHA-256 of the corpus
    _sources: dict[tuple, windows.Source] = field(init=False, repr=False)  # packing takes its time: once

    name: ClassVar[str] = "token_windows"

    def __post_init__(self):
        if self.rows not in ROWS:
            raise ValueError(unknown(f"{self.name}: rows", self.rows, ROWS))
        if self.carries_state and self.rows != "streams":
            raise ValueError(f"{self.name}: rows={self.rows!r} do not go on, streams do: set carries_state=False")
        if self.seq_len < 1:
            raise ValueError(f"{self.name}: seq_len must be at least 1, not {self.seq_len}")
        for option in ("ar", "tar"):
            if not 0 <= getattr(self, option) < math.inf:
                raise ValueError(f"{self.name}: {option} must be finite and at least 0, not {getattr(self, option)}")
        corpus = lookup.load(self.corpus, self.data_dir or None)
        coder = tokens.tokenizer_for(corpus, self.tokenizer)
        found = {"files": tokens.tokenise(corpus, coder), "coder": coder, "data_hash": corpus.hash, "_sources": {}}
        for name, value in found.items():
            object.__setattr__(self, name, value)
        try:
            self._source("train", 0, 1, (0, 1))
        except ValueError as error:
            raise ValueError(f"{self.name}: {self.corpus}: {error}") from None

    vocab_size = num_classes = property(lambda self: self.coder.vocab_size)
    chance = TextLM.chance
    metrics = TextLM.metrics

    def batch(self, split: str, seed: Int[ArrayLike, ""], step: Int[ArrayLike, ""], batch_size: int) -> Batch:
        """Batch number `step`, read by the host: NumPy arrays."""
        if isinstance(seed, jax.core.Tracer) or isinstance(step, jax.core.Tracer):
            raise ValueError(
                f"{self.name}: the host reads its batches, a compiled program cannot: train it with train.fit, or take"
                " text_lm, whose corpus lies on the device"
            )
        return Batch(*self._source(split, int(seed), batch_size, (0, 1))[int(step)][: len(Batch._fields)])

    def host_batches(
        self, split: str, seed: int, step: int, batch_size: int, shard: tuple[int, int] = (0, 1), ahead: int = 4
    ) -> Iterator[Batch]:
        """Part shard[0] of shard[1] of the rows of batches step, step + 1, ..., `ahead` of them read in advance."""
        source = self._source(split, seed, batch_size, shard)
        return (Batch(*rows[: len(Batch._fields)]) for rows in windows.iterate(source, step=step, buffer=ahead))

    def num_batches(self, split: str, batch_size: int) -> int:
        """Batches that cover a split once."""
        if split_index(split) == 0:
            raise ValueError(f"{self.name}: training has no end: num_batches takes valid or test")
        return len(self._source(split, 0, batch_size, (0, 1)))

    def _source(self, split: str, seed: int, batch_size: int, shard: tuple[int, int]) -> windows.Source:
        index = split_index(split)
        key = (split, seed, batch_size, shard)
        if key not in self._sources:
            file = self.files[split]
            if index == 0:
                source = ROWS[self.rows](file, self.seq_len, batch_size, seed, shard)
            else:
                others = [self.files[s] for s in SPLITS[:index] if self.files[s].path != file.path]
                source = Once(file, self.seq_len, batch_size, int(others[-1].tokens[-1]), shard)
            self._sources[key] = source
        return self._sources[key]
