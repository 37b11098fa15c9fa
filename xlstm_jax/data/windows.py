"""Batches of a token file, batch number `step` from nothing but (seed, step): any step, in any order, on any process.

    source = Windows(files["train"], seq_len=512, batch_size=64, seed=0, shard=(process_index, process_count))
    source[1000]                                    # the rows of this process of batch 1000
    for batch in iterate(source, step=1000): ...    # the same batches, read ahead by grain; resumes at any step

`Windows` are drawn without a carried state, `Streams` continue row by row (truncated back-propagation through time),
`PackedDocuments` fills rows with whole documents. A batch has `batch_size` rows over all processes; process p of P has
rows p * batch_size / P and on, so the batch is the same for any P. The state of a run is one integer, its step.
A pass over windows or rows is a permutation of them, computed index by index (grain's index shuffle) from (seed, pass).
"""

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

from ..names import unknown
from .packing import ALGORITHMS, place
from .tokens import TokenFile

STEPS = 2**31 - 1  # what a source has; passes follow one another


class Rows(NamedTuple):
    """What a model is given and asked, with the field names of `tasks.Batch`; then whose document each step is."""

    inputs: Int32[np.ndarray, "B T"]
    targets: Int32[np.ndarray, "B T"]
    weights: Float32[np.ndarray, "B T"]  # 1 where the target counts
    mask: Bool[np.ndarray, "B T"] | None  # False: padding
    reset: Bool[np.ndarray, "B T"] | None  # True: the state is emptied before this step
    segment_ids: Int32[np.ndarray, "B T"] | None = None  # 0: padding; 1, 2, ... along each row
    positions: Int32[np.ndarray, "B T"] | None = None  # from 0 in each document


class Source:
    """Which rows a process holds; `rows(numbers)` makes them, numbered through all batches from 0."""

    pads = False  # whether a file shorter than a window will do

    def __init__(self, file: TokenFile, seq_len: int, batch_size: int, seed: int = 0, shard: tuple[int, int] = (0, 1)):
        index, count = shard
        if seq_len < 1 or batch_size < 1:
            raise ValueError(f"seq_len and batch_size must be at least 1, not {seq_len} and {batch_size}")
        if not 0 <= index < count:
            raise ValueError(f"shard must be (process, number of processes), not {shard}")
        if batch_size % count:
            raise ValueError(f"batch_size {batch_size} cannot be shared by {count} processes: take a multiple")
        if not 0 <= seed < 2**31:
            raise ValueError(f"seed must be in 0 .. {2**31 - 1}, not {seed}")
        if len(file) <= seq_len and not self.pads:
            raise ValueError(f"{file.path} has {len(file)} tokens: one window of seq_len={seq_len} needs {seq_len + 1}")
        self.file, self.seq_len, self.batch_size, self.seed, self.shard = file, seq_len, batch_size, seed, shard

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, step: int) -> Rows:
        if not 0 <= step < STEPS:
            raise IndexError(step)
        index, count = self.shard
        share = self.batch_size // count
        return self.rows(step, index * share + np.arange(share))

    def rows(self, step: int, rows: Int[np.ndarray, " R"]) -> Rows:
        """The given rows of batch number `step`."""
        raise NotImplementedError

    def _at(self, positions: Int[np.ndarray, "R T"], reset: Bool[np.ndarray, "R T"] | None = None) -> Rows:
        """Inputs at positions of the file, their targets one further; an end among the inputs begins a document."""
        tokens = self.file.tokens
        inputs, targets = tokens[positions].astype(np.int32), tokens[positions + 1].astype(np.int32)
        if self.file.end is not None:
            begins = inputs == self.file.end
            reset = begins if reset is None else begins | reset
        return Rows(inputs, targets, np.ones(positions.shape, np.float32), None, reset)

    def _draw(self, turn: int, bound: int) -> int:
        """A number below `bound` that (seed, turn) decide."""
        return int(np.random.default_rng([self.seed, turn]).integers(bound))


class Permuted(Source):
    """A source whose rows are a permutation of `per_pass` items in each pass."""

    per_pass: int

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_order"}

    @cached_property
    def _order(self):
        import grain

        seed = np.random.SeedSequence(self.seed).generate_state(1)[0]  # grain adds the pass: seeds must lie apart
        return grain.MapDataset.range(self.per_pass).shuffle(seed=int(seed))

    def items(self, step: int, rows: Int[np.ndarray, " R"]) -> tuple[Int[np.ndarray, " R"], Int[np.ndarray, " R"]]:
        """(pass, item) of the rows of a batch."""
        numbers = step * self.batch_size + rows
        return numbers // self.per_pass, np.array([self._order[int(n)] for n in numbers]) % self.per_pass


class Windows(Permuted):
    """Stretches of seq_len tokens that tile the file, in a new order each pass; what is left over is so at either end.

    Between documents `reset` is True at each `end` among the inputs; a window's first step begins anew anyway.
    """

    @cached_property
    def per_pass(self) -> int:
        return (len(self.file) - 1) // self.seq_len

    def rows(self, step, rows):
        turns, items = self.items(step, rows)
        left = (len(self.file) - 1) % self.seq_len
        offsets = {turn: self._draw(turn, left + 1) for turn in set(turns.tolist())}
        starts = np.array([offsets[turn] for turn in turns.tolist()]) + items * self.seq_len
        return self._at(starts[:, None] + np.arange(self.seq_len)[None, :])


class Streams(Source):
    """Row r reads the file in order from start + r * (N - 1) // batch_size, around its end, seq_len tokens a step.

    A new pass begins after (N - 1) // seq_len steps from a new start, drawn by (seed, pass). `reset` marks a pass's
    first step, the file's first token wherever it comes, and each document's beginning; else the state is carried on.
    """

    def rows(self, step, rows):
        pairs, columns = len(self.file) - 1, np.arange(self.seq_len)[None, :]
        turn, window = divmod(step, pairs // self.seq_len)
        start = self._draw(turn, pairs) + rows[:, None] * (pairs // self.batch_size)
        positions = (start + window * self.seq_len + columns) % pairs
        return self._at(positions, (positions == 0) | ((window == 0) & (columns == 0)))


class PackedDocuments(Permuted):
    """Rows of whole documents, placed once by first or best fit in the file's order, in a new order of rows each pass.

    A document of D tokens takes D + 1 steps, from its leading end to the target that ends it. One longer than seq_len
    is cut into pieces, each of which begins anew.
    """

    pads = True

    def __init__(
        self,
        file: TokenFile,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        shard: tuple[int, int] = (0, 1),
        algorithm: str = "best_fit",
    ):
        if algorithm not in ALGORITHMS:
            raise ValueError(unknown("packing algorithm", algorithm, ALGORITHMS))
        if file.end is None:
            raise ValueError(f"{file.path} is running text: only documents can be packed, take Windows or Streams")
        super().__init__(file, seq_len, batch_size, seed, shard)
        (ends,) = np.nonzero(file.tokens == file.end)
        pieces = -(-np.diff(ends) // seq_len)  # of each document
        first = np.cumsum(pieces) - pieces
        number = np.arange(pieces.sum()) - np.repeat(first, pieces)  # of each piece within its document
        starts = np.repeat(ends[:-1], pieces) + number * seq_len
        lengths = np.minimum(np.repeat(ends[1:], pieces) - starts, seq_len)
        self.per_pass, places, _ = place(lengths, ALGORITHMS[algorithm], seq_len)
        order = np.argsort(places, kind="stable")
        self._starts, self._lengths, self._places = starts[order], lengths[order], places[order]

    def rows(self, step, rows):
        _, items = self.items(step, rows)
        shape = (len(rows), self.seq_len)
        inputs, targets, segment_ids, positions = (np.zeros(shape, np.int32) for _ in range(4))
        reset, tokens = np.zeros(shape, bool), self.file.tokens
        bounds = [np.searchsorted(self._places, (items + shift) * self.seq_len) for shift in (0, 1)]
        for row, (low, high) in enumerate(zip(*bounds)):
            for segment, piece in enumerate(range(low, high), start=1):
                start, length = self._starts[piece], self._lengths[piece]
                at = self._places[piece] % self.seq_len
                own = (row, slice(at, at + length))
                inputs[own], targets[own] = tokens[start : start + length], tokens[start + 1 : start + length + 1]
                segment_ids[own], positions[own], reset[row, at] = segment, np.arange(length), True
        mask = segment_ids > 0
        return Rows(inputs, targets, mask.astype(np.float32), mask, reset, segment_ids, positions)


def iterate(source: Source, *, step: int = 0, threads: int = 2, buffer: int = 4, workers: int = 0) -> Iterator[Rows]:
    """grain's iterator over source[step], source[step + 1], ..., read ahead by threads, or by worker processes.

    The order is the same whatever the number of either, so the step is all there is to save (grain's own state counts
    from `step`). Workers start slowly, and their script needs an importable main.
    """
    import grain

    if not 0 <= step < STEPS or min(threads, buffer) < 1 or workers < 0:
        raise ValueError(
            f"step and workers must be at least 0, threads and buffer 1, not {(step, workers, threads, buffer)}"
        )
    data = grain.MapDataset.source(source)[step:].to_iter_dataset(grain.ReadOptions(threads, buffer))
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's workers read flags, and there is no absl main
        data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=buffer))
    return iter(data)
