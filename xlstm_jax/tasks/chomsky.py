"""The tasks of Deletang et al. 2023, "Neural networks and the Chomsky hierarchy" (arXiv 2207.02098), Tab. 2.

Protocol, after the authors' code (github.com/google-deepmind/neural_networks_chomsky_hierarchy): a length counts the
input alone, is uniform in 1 .. 40 in training and in 41 .. 500 in evaluation; after an input of length l come as many
empty tokens as the answer y may be long, and y is read at these. The score is the accuracy per token within a row,
averaged over the rows, so every length counts the same: the weights of a row's answers sum to 1.

Here token 0 is the empty one and padding alike; other tokens are those of the xLSTM language of the same name, without
what that one adds ("=", [ACT]), and the answers stay tokens of the same vocabulary. Lengths vary within a batch, not
from batch to batch. An answer that ends with a termination token is asked for up to that, as the authors' accuracy is.
The binary tasks are in `chomsky_numbers`.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, UInt32

from xlstm_jax.tasks import brackets, strings
from xlstm_jax.tasks.cycle_navigation import CycleNavigation
from xlstm_jax.tasks.even_pairs import EvenPairs
from xlstm_jax.tasks.formal import FormalLanguage, Row, below
from xlstm_jax.tasks.modular_arithmetic import ModularArithmetic
from xlstm_jax.tasks.parity import Parity
from xlstm_jax.tasks.stack_manipulation import run_stack
from xlstm_jax.tasks.task import Batch


@dataclass(frozen=True)
class Chomsky(FormalLanguage):
    """Lengths of the input alone, the answer after it, every row of the same weight."""

    train_lengths: tuple[int, int] = (1, 40)
    eval_lengths: tuple[int, int] = (41, 500)

    shortest: ClassVar[int] = 1
    least: ClassVar[int] = 1
    spare: ClassVar[int] = 1

    def length(self, word: UInt32[Array, ""], shortest: int, longest: int) -> Int[Array, ""]:
        return shortest + below(word, longest - shortest + 1)

    def output_length(self, length: Int[ArrayLike, ""]) -> Int[ArrayLike, ""]:
        """The most answers after an input of this length."""
        return 1

    def steps(self, longest: int) -> int:
        return longest + self.output_length(longest)

    def lengths(self, batch: Batch) -> Int[Array, " B"]:
        return jnp.sum(batch.inputs > 0, axis=1, dtype=jnp.int32)

    def row(self, words: UInt32[Array, " W"], length: Int[Array, ""]) -> Row:
        symbols, answer = self.sample(words, length)
        return Row(symbols, length, answer[None], jnp.ones((), jnp.int32), length)

    def weigh(self, asked: Array) -> Float[Array, " T"]:
        return asked / jnp.sum(asked, dtype=jnp.float32)


@dataclass(frozen=True)
class ParityCheck(Chomsky, Parity):
    """Regular. Parity: tokens a 1, b 2; is the number of b even (1) or odd (2)? abba -> a."""

    name: ClassVar[str] = "chomsky_parity_check"


@dataclass(frozen=True)
class ChomskyEvenPairs(Chomsky, EvenPairs):
    """Regular. Even pairs: tokens a 1, b 2; is the number of ab and ba even (1) or odd (2)? aabba -> a."""

    name: ClassVar[str] = "chomsky_even_pairs"


@dataclass(frozen=True)
class ChomskyCycleNavigation(Chomsky, CycleNavigation):
    """Regular. Cycle navigation: tokens STAY 1, +1 2, -1 3, positions from 4 on. +1 +1 STAY -1 +1 -> 2."""

    name: ClassVar[str] = "chomsky_cycle_navigation"


@dataclass(frozen=True)
class ChomskyModularArithmetic(Chomsky, ModularArithmetic):
    """Regular, "simple": tokens + 1, - 2, * 3, numbers from 5 on; no "=". 2 + 3 * 4 -> 4.

    An expression has an odd length; an even one counts as the odd one below it.
    """

    name: ClassVar[str] = "chomsky_modular_arithmetic"
    spare: ClassVar[int] = 2

    def row(self, words: UInt32[Array, " W"], length: Int[Array, ""]) -> Row:
        length = length - (length + 1) % 2
        symbols, answer = self.sample(words, length + 1)  # the last one would be "="
        return Row(symbols, length, answer[None], jnp.ones((), jnp.int32), length)


@dataclass(frozen=True)
class ChomskyModularArithmeticBrackets(Chomsky, brackets.ModularArithmeticBrackets):
    """Deterministic context-free. Tokens as in modular_arithmetic_brackets; no "=". ((2+3)*-4) -> 0."""

    name: ClassVar[str] = "chomsky_modular_arithmetic_brackets"
    spare: ClassVar[int] = 2

    def sample(self, words: UInt32[Array, " W"], size: Int[Array, ""]) -> tuple[Int[Array, " W"], Int[Array, ""]]:
        return super().sample(words, size + 1)  # the last one would be "="


@dataclass(frozen=True)
class ChomskySolveEquation(Chomsky, brackets.SolveEquation):
    """Deterministic context-free. Tokens as in solve_equation; no [ACT]. (3-x)=4 -> 4. The shortest is x=d."""

    name: ClassVar[str] = "chomsky_solve_equation"
    least: ClassVar[int] = 3
    spare: ClassVar[int] = 2

    def row(self, words: UInt32[Array, " W"], length: Int[Array, ""]) -> Row:
        symbols, answer = brackets.equation(words[:-1], words[-1], length, 5, 9)
        return Row(symbols, length, answer[None], jnp.ones((), jnp.int32), length)


@dataclass(frozen=True)
class ChomskyStackManipulation(Chomsky):
    """Deterministic context-free. Symbols 1, 2, POP 3, PUSH 4, 5, END 6; the stack at the end, top first, then END.

    1 2 2 1 PUSH(2) POP POP -> 2 2 1 END: inputs 1 2 2 1 5 3 3, then empty tokens. A pop of an empty stack does nothing.
    Of l tokens the first 1 .. l - 1 (1 where l = 1) are the initial stack, bottom first; each other one is any action.
    """

    name: ClassVar[str] = "chomsky_stack_manipulation"
    vocab_size: ClassVar[int] = 7
    chance: ClassVar[float] = 1 / 2
    spare: ClassVar[int] = 2

    def output_length(self, length: Int[ArrayLike, ""]) -> Int[ArrayLike, ""]:
        return length + 1

    def row(self, words: UInt32[Array, " W"], length: Int[Array, ""]) -> Row:
        initial = 1 + below(words[-1], jnp.maximum(length - 1, 1))
        position = jnp.arange(words.size, dtype=jnp.int32)
        action = below(words, 3)
        symbols = jnp.where(position < initial, 1 + below(words // 3, 2), 3 + action)
        pops, pushed = symbols == 3, jnp.where(symbols > 3, symbols - 3, symbols)
        stack, height = run_stack(pushed, pops, length)
        answers = jnp.where(position == height, 6, strings.reverse(stack, height))
        return Row(symbols, length, answers, height + 1, length)


@dataclass(frozen=True)
class BinaryString(Chomsky):
    """Symbols 1 and 2 in, the same symbols out."""

    vocab_size: ClassVar[int] = 3
    chance: ClassVar[float] = 1 / 2

    def output_length(self, length: Int[ArrayLike, ""]) -> Int[ArrayLike, ""]:
        return length

    def answers(self, symbols: Int[Array, " W"], size: Int[Array, ""]) -> Int[Array, " A"]:
        """What is asked for after the first `size` symbols, `output_length` answers."""
        raise NotImplementedError

    def row(self, words: UInt32[Array, " W"], length: Int[Array, ""]) -> Row:
        symbols = 1 + below(words, 2)
        return Row(symbols, length, self.answers(symbols, length), self.output_length(length), length)


@dataclass(frozen=True)
class ChomskyReverseString(BinaryString):
    """Deterministic context-free. 1 1 2 -> 2 1 1."""

    name: ClassVar[str] = "chomsky_reverse_string"

    def answers(self, symbols, size):
        return strings.reverse(symbols, size)


@dataclass(frozen=True)
class DuplicateString(BinaryString):
    """Context-sensitive. 1 1 2 -> 1 1 2 1 1 2."""

    name: ClassVar[str] = "chomsky_duplicate_string"

    def output_length(self, length: Int[ArrayLike, ""]) -> Int[ArrayLike, ""]:
        return 2 * length

    def answers(self, symbols, size):
        position = jnp.arange(2 * symbols.size, dtype=jnp.int32)
        return symbols[jnp.minimum(position % size, symbols.size - 1)]


@dataclass(frozen=True)
class ChomskyOddsFirst(BinaryString):
    """Context-sensitive. First, third, ... symbol, then second, fourth, ...: 1 2 1 2 1 -> 1 1 1 2 2.

    This is the paper's definition; its released code puts the second, fourth, ... first.
    """

    name: ClassVar[str] = "chomsky_odds_first"

    def answers(self, symbols, size):
        return strings.odds_first(symbols, size)


@dataclass(frozen=True)
class ChomskyMissingDuplicate(Chomsky):
    """Context-sensitive. Tokens [MIS] 1, symbols 2, 3, filler 4: a string twice, one symbol of the two missing.

    2 3 [MIS] 2 3 3 -> 3. The gap may be in either copy. An input of odd length ends with the filler; the shortest is
    of length 2.
    """

    name: ClassVar[str] = "chomsky_missing_duplicate"
    vocab_size: ClassVar[int] = 5
    chance: ClassVar[float] = 1 / 2
    least: ClassVar[int] = 2
    spare: ClassVar[int] = 2

    def row(self, words: UInt32[Array, " W"], length: Int[Array, ""]) -> Row:
        half = length // 2
        symbols, answer = strings.duplicate_with_gap(words[:-1], half, 2, below(words[-1], 2 * half))
        filler = jnp.arange(symbols.size, dtype=jnp.int32) == 2 * half
        return Row(jnp.where(filler, 4, symbols), length, answer[None], jnp.ones((), jnp.int32), length)


@dataclass(frozen=True)
class ChomskyBucketSort(BinaryString):
    """Context-sensitive. Numbers 1 .. 5 in increasing order: 2 1 3 1 5 -> 1 1 2 3 5."""

    name: ClassVar[str] = "chomsky_bucket_sort"
    vocab_size: ClassVar[int] = 6
    chance: ClassVar[float] = 1 / 5

    def row(self, words: UInt32[Array, " W"], length: Int[Array, ""]) -> Row:
        symbols = 1 + below(words, 5)
        return Row(symbols, length, strings.sort(symbols, length), length, length)
