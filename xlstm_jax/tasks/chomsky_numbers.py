"""Binary addition, multiplication and square root of numbers as long as the input (Deletang et al., arXiv 2207.02098).

Numbers are arrays of bits, so that a number of 500 bits needs no integers of 500 bits. Bits 0 and 1 are the tokens 1
and 2; addition and multiplication write the lowest bit first, the square root the highest.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Int, UInt32

from xlstm_jax.tasks.chomsky import Chomsky
from xlstm_jax.tasks.formal import Row, below

SEPARATOR = 3  # between two numbers in the input, and at the end of the answer


def add(a: Int[Array, " T"], b: Int[Array, " T"]) -> Int[Array, " T"]:
    """Bits of the sum, lowest first; carries past the last bit are dropped."""

    def place(carry, bits):
        total = carry + bits[0] + bits[1]
        return total // 2, total % 2

    return jax.lax.scan(place, jnp.zeros((), jnp.int32), (a, b))[1]


def multiply(a: Int[Array, " T"], b: Int[Array, " T"]) -> Int[Array, " T"]:
    """The lowest bits of the product, lowest first: place k holds the sum of a_i b_(k-i) and the carry."""

    def place(state, bit):
        carry, window = state  # b_k, b_(k-1), ... beside a_0, a_1, ...
        window = jnp.concatenate([bit[None], window[:-1]])
        total = carry + jnp.sum(a * window, dtype=jnp.int32)
        return (total // 2, window), total % 2

    return jax.lax.scan(place, (jnp.zeros((), jnp.int32), jnp.zeros_like(a)), b)[1]


def subtract(a: Int[Array, " N"], b: Int[Array, " N"]) -> tuple[Int[Array, " N"], Bool[Array, ""]]:
    """Bits of a - b, lowest first, and whether a < b: a place borrows where, at the nearest difference below, b is 1.

    All places at once: of the differences below, the running maximum of 2 i + b_i is that of the nearest.
    """
    place = jnp.arange(a.size, dtype=jnp.int32)
    borrows = jax.lax.cummax(jnp.where(a != b, 2 * place + b, 0)) % 2
    incoming = jnp.concatenate([jnp.zeros_like(borrows[:1]), borrows[:-1]])
    return a ^ b ^ incoming, borrows[-1] == 1


def square_root(pairs: Int[Array, "N 2"]) -> Int[Array, " N"]:
    """Bits of the floor of the root, highest first, of a number given as pairs of bits, highest first.

    By hand, as on paper: bring down a pair, try 4 root + 1, subtract where it fits. (0, 0) may stand before the number.
    """

    def bring_down(state, pair):
        remainder, root = state  # lowest bit first
        remainder = jnp.concatenate([pair[::-1], remainder[:-2]])
        trial = jnp.concatenate([jnp.array([1, 0], jnp.int32), root[:-2]])
        left, too_small = subtract(remainder, trial)
        bit = 1 - too_small.astype(jnp.int32)
        root = jnp.concatenate([bit[None], root[:-1]])
        return (jnp.where(too_small, remainder, left), root), bit

    zeros = jnp.zeros(pairs.shape[0] + 2, jnp.int32)
    return jax.lax.scan(bring_down, (zeros, zeros), pairs)[1]


@dataclass(frozen=True)
class BinaryPair(Chomsky):
    """Tokens 0 1, 1 2, separator and END 3; two numbers, lowest bit first, and the result without high zeros, END.

    The first number has 1 .. l - 2 bits, the second the rest; neither is 0, a number drawn as 0 is made 1. The shortest
    input has length 3.
    """

    vocab_size: ClassVar[int] = 4
    chance: ClassVar[float] = 1 / 2
    least: ClassVar[int] = 3
    spare: ClassVar[int] = 2

    def output_length(self, length: Int[ArrayLike, ""]) -> Int[ArrayLike, ""]:
        return length + 1

    def result(self, a: Int[Array, " T"], b: Int[Array, " T"]) -> Int[Array, " T"]:
        """Of two numbers, bits lowest first."""
        raise NotImplementedError

    def row(self, words: UInt32[Array, " W"], length: Int[Array, ""]) -> Row:
        position = jnp.arange(words.size, dtype=jnp.int32)
        middle = 1 + below(words[-1], length - 2)  # of the separator
        bits = below(words, 2)
        first, second = position < middle, (position > middle) & (position < length)
        for number, start in ((first, 0), (second, middle + 1)):
            empty = ~jnp.any(number & (bits == 1))
            bits = jnp.where(empty & (position == start), 1, bits)
        a, b = jnp.where(first, bits, 0), jnp.roll(jnp.where(second, bits, 0), -(middle + 1))
        result = self.result(a, b)
        size = jnp.max(jnp.where(result == 1, position + 1, 0))
        answers = jnp.where(position == size, SEPARATOR, result + 1)
        return Row(jnp.where(position == middle, SEPARATOR, bits + 1), length, answers, size + 1, length)


@dataclass(frozen=True)
class BinaryAddition(BinaryPair):
    """Context-sensitive. 001 + 01101 = 01011 (4 + 22 = 26): inputs 1 1 2 3 1 2 2 1 2, answers 1 2 1 2 2 3."""

    name: ClassVar[str] = "chomsky_binary_addition"

    def result(self, a, b):
        return add(a, b)


@dataclass(frozen=True)
class BinaryMultiplication(BinaryPair):
    """Context-sensitive. 001 * 01101 = 0001101 (4 * 22 = 88): inputs as for the sum, answers 1 1 1 2 2 1 2 3."""

    name: ClassVar[str] = "chomsky_binary_multiplication"

    def result(self, a, b):
        return multiply(a, b)


@dataclass(frozen=True)
class ComputeSqrt(Chomsky):
    """Context-sensitive. The floor of the root of a number, highest bit first, in half as many bits, rounded up.

    100101 -> 110 (37, 6): inputs 2 1 1 2 1 2, answers 2 2 1. The number is not 0: one drawn as 0 is made 1.
    """

    name: ClassVar[str] = "chomsky_compute_sqrt"
    vocab_size: ClassVar[int] = 3
    chance: ClassVar[float] = 1 / 2

    def output_length(self, length: Int[ArrayLike, ""]) -> Int[ArrayLike, ""]:
        return (length + 1) // 2

    def row(self, words: UInt32[Array, " W"], length: Int[Array, ""]) -> Row:
        position = jnp.arange(words.size, dtype=jnp.int32)
        bits = jnp.where(position < length, below(words, 2), 0)
        bits = jnp.where(jnp.any(bits == 1) | (position != length - 1), bits, 1)
        count, steps = (length + 1) // 2, (words.size + 1) // 2
        number = jnp.roll(jnp.pad(bits, (0, 2 * steps - bits.size)), 2 * steps - length)  # the last bit at the end
        root = square_root(number.reshape(steps, 2))
        return Row(bits + 1, length, jnp.roll(root, count - steps) + 1, count, length)
