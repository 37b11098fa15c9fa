"""Permutation groups: the product of all elements so far, at every step (word problems, Grazzi et al. 2411.12537).

S3 can be solved, A5 and S5 cannot: a word problem of a group that is not solvable is complete for NC1, so no model of
constant depth whose state is linear and diagonal can track it.
"""

import itertools
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

from xlstm_jax.tasks.formal import FormalLanguage, Row, below
from xlstm_jax.tasks.task import Batch


def is_even(permutation: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0


@cache
def multiplication_table(points: int, even: bool) -> np.ndarray:
    """[a, b] -> index of "first a, then b", over the (even) permutations of `points` points in lexicographic order."""
    group = [each for each in itertools.permutations(range(points)) if is_even(each) or not even]
    places = {each: place for place, each in enumerate(group)}
    return np.array([[places[tuple(b[point] for point in a)] for b in group] for a in group], np.int32)


@dataclass(frozen=True)
class Permutations(FormalLanguage):
    """Tokens [PAD] 0, then the elements from 1 on in lexicographic order, so that 1 is the identity.

    The target at a step is the product of all elements up to it, that step included; a length n shows n elements and
    asks n times, so T is the longest length: 40 in training and 256 in evaluation.
    """

    points: ClassVar[int]
    even: ClassVar[bool] = False
    spare: ClassVar[int] = 1

    @property
    def vocab_size(self) -> int:
        return 1 + len(multiplication_table(self.points, self.even))

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 1)

    def steps(self, longest: int) -> int:
        return longest

    def lengths(self, batch: Batch) -> Int[Array, " B"]:
        return jnp.sum(batch.mask, axis=1, dtype=jnp.int32)

    def row(self, words: UInt32[Array, " T"], length: Int[Array, ""]) -> Row:
        table = jnp.asarray(multiplication_table(self.points, self.even))
        elements = below(words, table.shape[0])
        start = jnp.zeros((), jnp.int32)
        _, products = jax.lax.scan(lambda product, element: (table[product, element],) * 2, start, elements)
        return Row(elements + 1, length, products + 1, length, start)


@dataclass(frozen=True)
class S3(Permutations):
    """The 6 permutations of 3 points: 012, 021, 102, 120, 201, 210 are the tokens 1 .. 6.

    2 3 2 -> 2 4 6: 021, then 102 is 120 (0 goes to 0 and on to 1, 1 to 2, 2 to 1 and on to 0), then 021 is 210.
    """

    name: ClassVar[str] = "s3"
    points: ClassVar[int] = 3


@dataclass(frozen=True)
class A5(Permutations):
    """The 60 even permutations of 5 points: the smallest group that is not solvable."""

    name: ClassVar[str] = "a5"
    points: ClassVar[int] = 5
    even: ClassVar[bool] = True


@dataclass(frozen=True)
class S5(Permutations):
    """The 120 permutations of 5 points."""

    name: ClassVar[str] = "s5"
    points: ClassVar[int] = 5
