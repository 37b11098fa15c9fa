"""ListOps: the value of nested lists of digits (Nangia and Bowman 2018; Long Range Arena, arXiv 2011.04006)."""

import functools
import hashlib
import random
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from xlstm_jax.tasks.byte_lm import register
from xlstm_jax.tasks.finite import LabelledSequences
from xlstm_jax.tasks.task import SPLITS

OPERATORS = ("MIN", "MAX", "MED", "SM")
TOKENS = ("[PAD]", *map(str, range(10)), *(f"[{name}" for name in OPERATORS), "]")
VALUES = {
    "MIN": min,
    "MAX": max,
    "MED": lambda digits: int(np.median(digits)),  # of an even number the mean of the middle two, rounded down
    "SM": lambda digits: sum(digits) % 10,
}
TRIES = 1_000  # draws for one expression of the right length, at most
IS_LIST = 0.25  # probability that an argument is a list, where the depth allows one


@dataclass(frozen=True, eq=False)
class ListOps(LabelledSequences):
    """Tokens [PAD] 0, digits 1 .. 10, [MIN [MAX [MED [SM 11 .. 14, ] 15; the class is the value, 0 to 9.

    [MAX 2 9 [MIN 4 7 ] 0 ] -> 9: inputs 12 3 10 11 5 8 15 1 15, class 9 asked at the last "]".

    Lists have 2 to `max_arguments` arguments, each a list with probability 1/4 down to `max_depth`; expressions outside
    of `lengths` (tokens) are thrown away, as are repeated ones, so that no split shares one with another. All of them
    follow from `data_seed`; the Long Range Arena has 96,000 training samples of 500 to 2,000 tokens and depth 10.
    """

    lengths: tuple[int, int] = (500, 2000)
    max_depth: int = 10
    max_arguments: int = 10
    num_train: int = 96_000
    num_eval: int = 2_000
    data_seed: int = 0

    name: ClassVar[str] = "listops"

    def __post_init__(self):
        if not 4 <= self.lengths[0] <= self.lengths[1]:
            raise ValueError(f"{self.name}: lengths must be 4 <= shortest <= longest, not {self.lengths}")
        for option, least in (("max_depth", 1), ("max_arguments", 2), ("num_train", 1), ("num_eval", 1)):
            if getattr(self, option) < least:
                raise ValueError(f"{self.name}: {option} must be at least {least}, not {getattr(self, option)}")
        super().__post_init__()

    def _read(self):
        options = (self.lengths, self.max_depth, self.max_arguments, self.num_train, self.num_eval, self.data_seed)
        data = generate(*options)
        return data, hashlib.sha256(repr((self.name, options)).encode()).hexdigest(), len(TOKENS), 10


@functools.cache
def generate(
    lengths: tuple[int, int], max_depth: int, max_arguments: int, num_train: int, num_eval: int, seed: int
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Every split's expressions (N, T) uint8, lengths (N,) and values (N,)."""
    draw, found, tries = random.Random(seed), {}, 0
    count = num_train + 2 * num_eval
    while len(found) < count:
        tokens: list[int] = []
        value = expression(draw, 1, max_depth, max_arguments, lengths[1], tokens)
        if value is not None and lengths[0] <= len(tokens) <= lengths[1]:
            found[bytes(tokens)] = value
        tries += 1
        if tries > TRIES * (count + 100):
            raise ValueError(
                f"listops: {len(found)} of {count} expressions after {tries} draws: widen lengths {lengths}"
            )
    samples, splits, start = list(found.items()), {}, 0
    for split, size in zip(SPLITS, (num_train, num_eval, num_eval)):
        part, start = samples[start : start + size], start + size
        sizes = np.array([len(tokens) for tokens, _ in part], np.int32)
        rows = np.zeros((size, lengths[1]), np.uint8)
        for row, (tokens, _) in zip(rows, part):
            row[: len(tokens)] = np.frombuffer(tokens, np.uint8)
        splits[split] = (rows, sizes, np.array([value for _, value in part], np.int32))
    return splits


def expression(
    draw: random.Random, depth: int, max_depth: int, max_arguments: int, longest: int, tokens: list[int]
) -> int | None:
    """Appends one expression and returns its value; None as soon as it is longer than `longest`."""
    if len(tokens) >= longest:
        return None
    if depth > 1 and (depth > max_depth or draw.random() > IS_LIST):
        digit = draw.randrange(10)
        tokens.append(TOKENS.index(str(digit)))
        return digit
    operator = draw.choice(OPERATORS)
    tokens.append(TOKENS.index(f"[{operator}"))
    digits = []
    for _ in range(draw.randint(2, max_arguments)):
        digits.append(expression(draw, depth + 1, max_depth, max_arguments, longest, tokens))
        if digits[-1] is None:
            return None
    tokens.append(TOKENS.index("]"))
    return VALUES[operator](digits)


register(ListOps)
