"""Polyphonic music: which of the 88 keys sound next? (Boulanger-Lewandowski et al. 2012; TCN, arXiv 1803.01271)"""

from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, UInt8

from xlstm_jax.data import lookup
from xlstm_jax.tasks.byte_lm import register
from xlstm_jax.tasks.finite import num_batches, pick
from xlstm_jax.tasks.task import SPLITS, Batch, split_index


@dataclass(frozen=True, eq=False)
class Music:
    """Inputs are the frames of a piece, one bit a key; the target at each step is the frame after it.

    Frames C+E, C+E+G, G -> inputs C+E, C+E+G, targets C+E+G, G.

    The loss of a step is the negative log-likelihood of its 88 independent keys in nats, their sum; that of a split is
    the mean over all its frames but the first of each piece, long pieces counting for more (as the TCN paper's code).
    Training goes through the pieces in an order that (seed, pass) decide; a pass has as many steps as there are full
    batches. Rows are padded to the longest piece, or cut to `max_frames` at a place that (seed, step, row) decide.

    A pytree whose one leaf is `data`, the frames of all pieces.
    """

    corpus: str = "local:jsb"
    data_dir: str = ""  # of the look-up; "": its default
    max_frames: int = 0  # of a training row; 0: whole pieces
    data: UInt8[Array, "N D"] = field(init=False, repr=False)
    data_hash: str = field(init=False, repr=False)
    starts: tuple[tuple[int, ...], ...] = field(init=False, repr=False)  # of each piece in `data`, split by split
    pairs: tuple[tuple[int, ...], ...] = field(init=False, repr=False)  # (frame, next frame) of each piece

    name: ClassVar[str] = "music"
    chance: ClassVar[float] = 0.0
    carries_state: ClassVar[bool] = False

    def __post_init__(self):
        if self.max_frames < 0:
            raise ValueError(
                f"{self.name}: max_frames must be at least 1, or 0 for whole pieces, not {self.max_frames}"
            )
        corpus = lookup.load(self.corpus, self.data_dir or None)
        pieces = [list(corpus.splits[split]) for split in SPLITS]
        for split, each in zip(SPLITS, pieces):
            for number, piece in enumerate(each):
                if np.ndim(piece) != 2 or len(piece) < 2 or np.shape(piece)[1] != np.shape(pieces[0][0])[-1]:
                    what = f"of shape {np.shape(piece)}" if isinstance(piece, np.ndarray) else "of text"
                    raise ValueError(
                        f"{self.name}: {self.corpus} has a {split} document (number {number}) {what}: piano rolls"
                        " (frames, keys) of two frames or more and one width are needed"
                    )
        flat = np.concatenate([piece for each in pieces for piece in each])
        if flat.max() > 1:
            raise ValueError(f"{self.name}: {self.corpus} has a frame with the value {flat.max()}: 0 and 1 are needed")
        lengths = [np.array([len(piece) for piece in each]) for each in pieces]
        ends = np.split(np.cumsum(np.concatenate(lengths)), np.cumsum([len(each) for each in lengths])[:-1])
        starts = tuple(tuple((end - length).tolist()) for end, length in zip(ends, lengths))
        pairs = tuple(tuple((length - 1).tolist()) for length in lengths)
        found = {"data": jnp.asarray(flat), "data_hash": corpus.hash, "starts": starts, "pairs": pairs}
        for name, value in found.items():
            object.__setattr__(self, name, value)

    @property
    def num_features(self) -> int:
        return self.data.shape[1]

    @property
    def num_classes(self) -> int:
        return self.data.shape[1]

    def scores(
        self, outputs: Float[Array, "B T D"], targets: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        """Negative log-likelihood of a frame, and its accuracy: keys right of those that sound or are said to."""
        nll = jnp.sum(jax.nn.softplus(outputs) - targets.astype(outputs.dtype) * outputs, axis=-1)
        said, sounds = outputs > 0, targets > 0
        either = jnp.sum(said | sounds, axis=-1)
        both = jnp.sum(said & sounds, axis=-1)
        return nll, jnp.where(either > 0, both / jnp.maximum(either, 1), 1).astype(nll.dtype)

    def batch(self, split: str, seed: Int[ArrayLike, ""], step: Int[ArrayLike, ""], batch_size: int) -> Batch:
        """Batch number `step`; in evaluation the rows past the last piece weigh 0."""
        index = split_index(split)
        starts, pairs = (jnp.asarray(np.array(each[index], np.int32)) for each in (self.starts, self.pairs))
        piece, counted = pick(split, seed, step, batch_size, starts.size)
        longest, first = max(self.pairs[index]), jnp.zeros(batch_size, jnp.int32)
        if split == "train" and 0 < self.max_frames < longest:
            longest = self.max_frames
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), len(SPLITS)), step)
            first = jax.vmap(lambda row, last: jax.random.randint(jax.random.fold_in(key, row), (), 0, last + 1))(
                jnp.arange(batch_size), jnp.maximum(pairs[piece] - longest, 0)
            ).astype(jnp.int32)
        columns = jnp.arange(longest, dtype=jnp.int32)[None]
        mask = columns < (pairs[piece] - first)[:, None]
        places = jnp.where(mask, (starts[piece] + first)[:, None] + columns, 0)
        shown = jnp.where(mask[..., None], self.data[places], 0).astype(jnp.float32)
        targets = jnp.where(mask[..., None], self.data[places + 1], 0).astype(jnp.float32)
        return Batch(shown, targets, (mask & counted[:, None]).astype(jnp.float32), mask, None)

    def num_batches(self, split: str, batch_size: int) -> int:
        """Batches that show every piece of a split once."""
        return num_batches(self.name, split, batch_size, tuple(map(len, self.starts)))

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Negative log-likelihood and accuracy, a frame."""
        return {
            name: float(sums[total]) / float(sums["weight"])
            for name, total in (("nll", "nll"), ("accuracy", "correct"))
        }


register(Music)
