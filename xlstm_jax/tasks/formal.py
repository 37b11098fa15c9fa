"""The frame that all formal languages share (xLSTM, arXiv 2405.04517, Fig. 4 and App. B.1.1).

Protocol, after the generators that the authors released (github.com/NX-AI/xlstm, experiments/data/formal_language):
token 0 is [PAD], and the answer is a token of the same vocabulary, so num_classes = vocab_size. A sequence of length
n is n - 1 shown symbols and its answer. The answer is asked for at the last shown symbol (the released loader hides
it and shifts the targets by one): there is no extra answer slot, and every later input is [PAD] with mask False.
Lengths are uniform in `train_lengths` for training and in `eval_lengths` for validation and test, both ends included;
rows are padded to the longest, so T is its length less one: 39 in training and 255 in evaluation.

Row r of a batch is drawn from the key (seed, split, step, r) alone.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int, UInt32

from xlstm_jax.tasks.task import Batch, split_index

SHORTEST = 3  # two symbols and the answer; in modular arithmetic a number, "=" and the answer


def below(word: UInt32[Array, "*shape"], bound: int) -> Int[Array, "*shape"]:
    """Random 32-bit words to integers 0 .. bound - 1, with a bias below bound / 2^32; compiles faster than randint."""
    return (word % jnp.uint32(bound)).astype(jnp.int32)


@dataclass(frozen=True)
class FormalLanguage:
    """Draws the lengths, pads the rows, scores the answers; a language adds `vocab_size`, `chance` and `sample`."""

    train_lengths: tuple[int, int] = (3, 40)
    eval_lengths: tuple[int, int] = (40, 256)
    num_eval: int = 1024  # samples in each of valid and test

    name: ClassVar[str]
    vocab_size: ClassVar[int]
    chance: ClassVar[float]
    carries_state: ClassVar[bool] = False

    def __post_init__(self):
        for option in ("train_lengths", "eval_lengths"):
            lengths = getattr(self, option)
            if not SHORTEST <= lengths[0] <= lengths[1]:
                raise ValueError(f"{self.name}: {option} must be {SHORTEST} <= shortest <= longest, not {lengths!r}")
        if self.num_eval < 1:
            raise ValueError(f"{self.name}: num_eval must be at least 1, not {self.num_eval}")

    @property
    def num_classes(self) -> int:
        return self.vocab_size

    def length(self, word: UInt32[Array, ""], shortest: int, longest: int) -> Int[Array, ""]:
        """A length, answer included, from one random word."""
        return shortest + below(word, longest - shortest + 1)

    def sample(self, words: UInt32[Array, " T"], size: Int[Array, ""]) -> tuple[Int[Array, " T"], Int[Array, ""]]:
        """Symbols from random words, one each, and the answer to the first `size`; what follows those is dropped."""
        raise NotImplementedError

    def batch(self, split: str, seed: Int[ArrayLike, ""], step: Int[ArrayLike, ""], batch_size: int) -> Batch:
        """Batch number `step`; in evaluation the rows past sample `num_eval` weigh 0."""
        shortest, longest = self.train_lengths if split == "train" else self.eval_lengths
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), split_index(split)), step)
        positions = jnp.arange(longest - 1, dtype=jnp.int32)

        def row(r):
            words = jax.random.bits(jax.random.fold_in(key, r), (longest,), jnp.uint32)
            size = self.length(words[0], shortest, longest) - 1
            symbols, answer = self.sample(words[1:], size)
            shown, asked = positions < size, positions == size - 1
            return jnp.where(shown, symbols, 0), jnp.where(asked, answer, 0), asked.astype(jnp.float32), shown

        rows = jnp.arange(batch_size, dtype=jnp.int32)
        inputs, targets, weights, mask = jax.vmap(row)(rows)
        if split != "train":
            counted = jnp.asarray(step, jnp.int32) * batch_size + rows < self.num_eval
            weights = weights * counted[:, None]
        return Batch(inputs, targets, weights, mask, None)

    def num_batches(self, split: str, batch_size: int) -> int:
        """Batches of one evaluation."""
        if split_index(split) == 0:
            raise ValueError(f"{self.name}: training samples have no end: num_batches takes valid or test")
        return math.ceil(self.num_eval / batch_size)

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Loss in nats an answer, accuracy, and (accuracy - s_rand) / (1 - s_rand), the paper's score."""
        accuracy = float(sums["correct"]) / float(sums["weight"])
        scaled = (accuracy - self.chance) / (1 - self.chance)
        return {"loss": float(sums["nll"]) / float(sums["weight"]), "accuracy": accuracy, "scaled_accuracy": scaled}
