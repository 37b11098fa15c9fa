"""Strings to strings: repetition, reversal, odds first, sorting, the set, the missing symbol.

xLSTM (arXiv 2405.04517), App. B.1.1 and Fig. 12; Deletang et al. (arXiv 2207.02098) in `chomsky`. The vocabularies are
those of the xLSTM paper's table, of which s_rand tells how many symbols a string is made of: 1 / (V - 2) where [ACT]
ends the string, 1 / (V - 1) where nothing does.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from xlstm_jax.tasks.formal import FormalLanguage, Row, below

ACT = MISSING = 1  # the token after [PAD]


def reverse(symbols: Int[Array, " T"], size: Int[Array, ""]) -> Int[Array, " T"]:
    """The first `size` symbols, last one first; what follows is arbitrary."""
    return jnp.roll(symbols[::-1], size - symbols.size)


def odds_first(symbols: Int[Array, " T"], size: Int[Array, ""]) -> Int[Array, " T"]:
    """The first, third, ... of the first `size` symbols, then the second, fourth, ..."""
    odds, position = (size + 1) // 2, jnp.arange(symbols.size, dtype=jnp.int32)
    source = jnp.where(position < odds, 2 * position, 2 * (position - odds) + 1)
    return symbols[jnp.clip(source, 0, symbols.size - 1)]


def sort(symbols: Int[Array, " T"], size: Int[Array, ""]) -> Int[Array, " T"]:
    """The first `size` symbols in increasing order, then the others."""
    shown = jnp.arange(symbols.size, dtype=jnp.int32) < size
    return jnp.sort(jnp.where(shown, symbols, jnp.iinfo(jnp.int32).max))


def unique(symbols: Int[Array, " T"], size: Int[Array, ""]) -> tuple[Int[Array, " T"], Int[Array, ""]]:
    """Every symbol once, in the order of first appearance among the first `size`; and how many these are."""
    position = jnp.arange(symbols.size, dtype=jnp.int32)
    same = symbols[:, None] == symbols[None]
    first = (jnp.argmax(same, axis=1) == position) & (position < size)
    order = jnp.argsort(~first, stable=True)
    return symbols[order], jnp.sum(first, dtype=jnp.int32)


def duplicate_with_gap(
    words: UInt32[Array, " T"], half: Int[Array, ""], bound: int, gap: Int[Array, ""]
) -> tuple[Int[Array, " T"], Int[Array, ""]]:
    """`half` symbols 2 .. bound + 1, the same again, with MISSING at position `gap`; and the symbol missing there."""
    position = jnp.arange(words.size, dtype=jnp.int32)
    symbols = below(words, bound) + 2
    twice = jnp.where(position < half, symbols, jnp.roll(symbols, half))
    return jnp.where(position == gap, MISSING, twice), twice[gap]


@dataclass(frozen=True)
class Transduction(FormalLanguage):
    """A string of k symbols from 2 on, [ACT], and k answers made of the same symbols: n = 2 k + 1."""

    def answers(self, symbols: Int[Array, " T"], size: Int[Array, ""]) -> tuple[Int[Array, " T"], Int[Array, ""]]:
        """What is asked for after the first `size` symbols, and how many answers these are."""
        raise NotImplementedError

    def row(self, words: UInt32[Array, " T"], length: Int[Array, ""]) -> Row:
        size = (length - 1) // 2
        symbols = below(words, self.vocab_size - 2) + 2
        answers, count = self.answers(symbols, size)
        position = jnp.arange(words.size, dtype=jnp.int32)
        return Row(jnp.where(position == size, ACT, symbols), size + 1, answers, count, size)


@dataclass(frozen=True)
class Repetition(Transduction):
    """Tokens [PAD] 0, [ACT] 1, symbols 2 .. 11: the string again.

    4 2 9 [ACT] -> 4 2 9: inputs 4 2 9 1 0 0, answers 4 2 9 asked at the last three.
    """

    name: ClassVar[str] = "repetition"
    vocab_size: ClassVar[int] = 12
    chance: ClassVar[float] = 1 / 10

    def answers(self, symbols, size):
        return symbols, size


@dataclass(frozen=True)
class ReverseString(Transduction):
    """Tokens as in repetition: the string, last symbol first. 4 2 9 [ACT] -> 9 2 4."""

    name: ClassVar[str] = "reverse_string"
    vocab_size: ClassVar[int] = 12
    chance: ClassVar[float] = 1 / 10

    def answers(self, symbols, size):
        return reverse(symbols, size), size


@dataclass(frozen=True)
class OddsFirst(Transduction):
    """Tokens as in repetition: first, third, ... symbol, then second, fourth, ... 2 7 3 5 9 [ACT] -> 2 3 9 7 5."""

    name: ClassVar[str] = "odds_first"
    vocab_size: ClassVar[int] = 12
    chance: ClassVar[float] = 1 / 10

    def answers(self, symbols, size):
        return odds_first(symbols, size), size


@dataclass(frozen=True)
class Set(Transduction):
    """Tokens [PAD] 0, [ACT] 1, symbols 2 .. 127: every symbol once, in the order of first appearance.

    4 2 4 9 2 [ACT] -> 4 2 9. A row of k symbols has at most k answers, so it may be shorter than the length drawn.
    """

    name: ClassVar[str] = "set"
    vocab_size: ClassVar[int] = 128
    chance: ClassVar[float] = 1 / 126

    def answers(self, symbols, size):
        return unique(symbols, size)


@dataclass(frozen=True)
class BucketSort(FormalLanguage):
    """Tokens [PAD] 0, numbers 1 .. 10: the numbers in increasing order.

    7 2 9 2 -> 2 2 7 9: inputs 7 2 9 2 0 0 0, answers 2 2 7 9 asked at the last four. There is no [ACT], as s_rand is
    1 / (V - 1): at the last number the smallest so far is asked for. n = 2 k for k numbers.
    """

    name: ClassVar[str] = "bucket_sort"
    vocab_size: ClassVar[int] = 11
    chance: ClassVar[float] = 1 / 10

    def row(self, words: UInt32[Array, " T"], length: Int[Array, ""]) -> Row:
        size = length // 2
        symbols = below(words, self.vocab_size - 1) + 1
        return Row(symbols, size, sort(symbols, size), size, size - 1)


@dataclass(frozen=True)
class MissingDuplicate(FormalLanguage):
    """Tokens [PAD] 0, [MIS] 1, symbols 2 .. 10: a string twice, one symbol of the second missing: which one?

    4 2 9 4 [MIS] 9 -> 2, asked at the last shown symbol: n = 2 k + 1 for k symbols.
    """

    name: ClassVar[str] = "missing_duplicate"
    vocab_size: ClassVar[int] = 11
    chance: ClassVar[float] = 1 / 9
    spare: ClassVar[int] = 1

    def row(self, words: UInt32[Array, " W"], length: Int[Array, ""]) -> Row:
        half = (length - 1) // 2
        shown, answer = duplicate_with_gap(words[:-1], half, self.vocab_size - 2, half + below(words[-1], half))
        return Row(shown, 2 * half, answer[None], jnp.ones((), jnp.int32), 2 * half - 1)
