"""The frame that all formal languages share (xLSTM, arXiv 2405.04517, Fig. 4, Fig. 12 and App. B.1.1).

Protocol, after the generators that the authors released (github.com/NX-AI/xlstm, experiments/data/formal_language):
token 0 is [PAD], and the answers are tokens of the same vocabulary, so num_classes = vocab_size. A sequence of length
n is the shown symbols and then the answers. The first answer is asked for at the last shown symbol (the released loader
hides the answers and shifts the targets by one), each further one at a [PAD] after it, with mask True; every later
input is [PAD] with mask False. So a language with one answer shows n - 1 symbols and has no extra answer slot.
Lengths are uniform in `train_lengths` for training and in `eval_lengths` for validation and test, both ends included;
rows are padded to the longest, so T is its length less one: 39 in training and 255 in evaluation. Where a language has
no sequence of a length, the row takes the longest that there is below it (the shortest where there is none).

Row r of a batch is drawn from the key (seed, split, step, r) alone.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, UInt32

from xlstm_jax.tasks.task import Batch, split_index

SHORTEST = 3  # two symbols and the answer; in modular arithmetic a number, "=" and the answer
BUCKETS = 8  # of the lengths, in an evaluation


class Row(NamedTuple):
    """One sequence: symbols shown at the first `size` steps, answers asked at `count` steps from `first` on."""

    symbols: Int[Array, " S"]
    size: Int[Array, ""]
    answers: Int[Array, " A"]
    count: Int[Array, ""]
    first: Int[Array, ""]


def below(word: UInt32[Array, "*shape"], bound: Int[ArrayLike, ""]) -> Int[Array, "*shape"]:
    """Random 32-bit words to integers 0 .. bound - 1, with a bias below bound / 2^32; compiles faster than randint."""
    return (word % jnp.asarray(bound, jnp.uint32)).astype(jnp.int32)


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
    shortest: ClassVar[int] = SHORTEST  # that the lengths may be
    least: ClassVar[int] = 0  # length of the shortest sequence that there is: a shorter length counts as this one
    spare: ClassVar[int] = 0  # random words beside one for each symbol

    def __post_init__(self):
        for option in ("train_lengths", "eval_lengths"):
            lengths = getattr(self, option)
            if not self.shortest <= lengths[0] <= lengths[1]:
                raise ValueError(
                    f"{self.name}: {option} must be {self.shortest} <= shortest <= longest, not {lengths!r}"
                )
            if lengths[1] < self.least:
                raise ValueError(f"{self.name}: {option} must reach {self.least}, not {lengths!r}")
        if self.num_eval < 1:
            raise ValueError(f"{self.name}: num_eval must be at least 1, not {self.num_eval}")

    @property
    def num_classes(self) -> int:
        return self.vocab_size

    def length(self, word: UInt32[Array, ""], shortest: int, longest: int) -> Int[Array, ""]:
        """A length, answers included, from one random word."""
        return shortest + below(word, longest - shortest + 1)

    def steps(self, longest: int) -> int:
        """T where the longest row has this length."""
        return longest - 1

    def lengths(self, batch: Batch) -> Int[Array, " B"]:
        """Length of every row, answers included."""
        return jnp.sum(batch.mask, axis=1, dtype=jnp.int32) + 1

    def sample(self, words: UInt32[Array, " T"], size: Int[Array, ""]) -> tuple[Int[Array, " T"], Int[Array, ""]]:
        """Symbols from random words, one each, and the answer to the first `size`; what follows those is dropped."""
        raise NotImplementedError

    def row(self, words: UInt32[Array, " W"], length: Int[Array, ""]) -> Row:
        """A sequence of this length; a language of one answer only says what that is, in `sample`."""
        symbols, answer = self.sample(words, length - 1)
        return Row(symbols, length - 1, answer[None], jnp.ones((), jnp.int32), length - 2)

    def batch(self, split: str, seed: Int[ArrayLike, ""], step: Int[ArrayLike, ""], batch_size: int) -> Batch:
        """Batch number `step`; in evaluation the rows past sample `num_eval` weigh 0."""
        shortest, longest = self.train_lengths if split == "train" else self.eval_lengths
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), split_index(split)), step)
        positions = jnp.arange(self.steps(longest), dtype=jnp.int32)

        def fit(values):
            return jnp.pad(values[: positions.size], (0, max(positions.size - values.size, 0)))

        def draw(r):
            words = jax.random.bits(jax.random.fold_in(key, r), (longest + self.spare,), jnp.uint32)
            row = self.row(words[1:], jnp.maximum(self.length(words[0], shortest, longest), self.least))
            asked = (row.first <= positions) & (positions < row.first + row.count)
            mask = positions < jnp.maximum(row.size, row.first + row.count)
            inputs = jnp.where(positions < row.size, fit(row.symbols), 0)
            targets = jnp.where(asked, jnp.roll(fit(row.answers), row.first), 0)
            return inputs, targets, self.weigh(asked), mask

        rows = jnp.arange(batch_size, dtype=jnp.int32)
        inputs, targets, weights, mask = jax.vmap(draw)(rows)
        if split != "train":
            counted = jnp.asarray(step, jnp.int32) * batch_size + rows < self.num_eval
            weights = weights * counted[:, None]
        return Batch(inputs, targets, weights, mask, None)

    def weigh(self, asked: Array) -> Float[Array, " T"]:
        """Weights of one row's answers: the score is a mean over answers."""
        return asked.astype(jnp.float32)

    def num_batches(self, split: str, batch_size: int) -> int:
        """Batches of one evaluation."""
        if split_index(split) == 0:
            raise ValueError(f"{self.name}: training samples have no end: num_batches takes valid or test")
        return math.ceil(self.num_eval / batch_size)

    def buckets(self) -> list[str]:
        """The evaluation's lengths in equal parts, "40-67" and so on: what `bucket` counts."""
        low, high = self.eval_lengths
        number, span = min(BUCKETS, high - low + 1), high - low + 1
        starts = [low + -(-index * span // number) for index in range(number + 1)]
        return [f"{start}-{end - 1}" for start, end in zip(starts, starts[1:])]

    def bucket(self, batch: Batch) -> Int[Array, " B"]:
        """The place in `buckets` of every row of an evaluation; a length outside counts with the nearest."""
        low, high = self.eval_lengths
        number = min(BUCKETS, high - low + 1)
        return jnp.clip((self.lengths(batch) - low) * number // (high - low + 1), 0, number - 1)

    def metrics(self, sums: dict) -> dict:
        """Loss in nats an answer, accuracy, and (accuracy - s_rand) / (1 - s_rand), the paper's score.

        Where the sums have them, accuracy by length too: {"40-67": 0.98, ...}.
        """
        accuracy = float(sums["correct"]) / float(sums["weight"])
        scaled = (accuracy - self.chance) / (1 - self.chance)
        found = {"loss": float(sums["nll"]) / float(sums["weight"]), "accuracy": accuracy, "scaled_accuracy": scaled}
        if "weight_by_length" in sums:
            each = zip(self.buckets(), sums["correct_by_length"], sums["weight_by_length"], strict=True)
            found["accuracy_by_length"] = {name: float(correct / weight) for name, correct, weight in each if weight}
        return found
