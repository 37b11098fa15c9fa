"""Modular arithmetic without brackets: a sum of products (xLSTM App. B.1.1; Deletang et al. 2207.02098)."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from xlstm_jax.tasks.formal import FormalLanguage, below

PLUS, MINUS, TIMES, EQUALS, ZERO = 1, 2, 3, 4, 5


@dataclass(frozen=True)
class ModularArithmetic(FormalLanguage):
    """Tokens [PAD] 0, + 1, - 2, * 3, = 4, then the numbers 0 .. modulus - 1 from 5 on; * binds tighter than + and -.

    2 + 3 * 4 =  -> 14 mod 5 = 4: inputs 7 1 8 3 9 4, answer 9.
    1 - 3 =      -> -2 mod 5 = 3: inputs 6 2 8 4, answer 8.

    Numbers and operators alternate and "=" is the last shown symbol, so a length n (answer included) is odd. As in the
    released generator an even bound counts as the odd one below it: (3, 40) draws from 3 .. 39, (40, 256) from
    39 .. 255.
    """

    modulus: int = 5  # V - 5 with the paper's V = 10

    name: ClassVar[str] = "modular_arithmetic"

    def __post_init__(self):
        super().__post_init__()
        if self.modulus < 2:
            raise ValueError(f"{self.name}: modulus must be at least 2, not {self.modulus}")

    @property
    def vocab_size(self) -> int:
        return self.modulus + 5

    @property
    def chance(self) -> float:
        return 1 / self.modulus

    def length(self, word: UInt32[Array, ""], shortest: int, longest: int) -> Int[Array, ""]:
        low, high = (shortest + 1) // 2, (longest + 1) // 2
        return 2 * (low + below(word, high - low + 1)) - 1

    def sample(self, words: UInt32[Array, " T"], size: Int[Array, ""]) -> tuple[Int[Array, " T"], Int[Array, ""]]:
        numbers, operators = below(words, self.modulus), below(words, 3) + PLUS
        position = jnp.arange(words.size, dtype=jnp.int32)
        symbols = jnp.where(position % 2 == 0, numbers + ZERO, operators)
        symbols = jnp.where(position == size - 1, EQUALS, symbols)

        def apply(carry, pair):
            """One operator and its number: `total` of the closed terms, the open term `product` with its sign."""
            total, product = carry
            operator, number, shown = pair
            closed = (total + product, jnp.where(operator == MINUS, -number, number))
            opened = (total, product * number)
            new = jax.tree.map(lambda a, b: jnp.where(operator == TIMES, a, b) % self.modulus, opened, closed)
            return jax.tree.map(lambda a, b: jnp.where(shown, a, b), new, carry), None

        pairs = (operators[1:-1:2], numbers[2::2], position[2::2] < size - 1)
        (total, product), _ = jax.lax.scan(apply, (jnp.zeros((), jnp.int32), numbers[0]), pairs)
        return symbols, (total + product) % self.modulus + ZERO
