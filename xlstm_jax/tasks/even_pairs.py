"""Even pairs: is the number of ab and ba even? (xLSTM App. B.1.1; Deletang et al. 2207.02098)"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from xlstm_jax.tasks.formal import FormalLanguage, below


@dataclass(frozen=True)
class EvenPairs(FormalLanguage):
    """Tokens [PAD] 0, a 1, b 2; the answer is a (1) for an even number of changes, b (2) for an odd one.

    The number of changes is even where the first symbol equals the last.

    aabba -> a: one ab and one ba, answer 1.
    abab -> b: ab, ba, ab, answer 2.
    """

    name: ClassVar[str] = "even_pairs"
    vocab_size: ClassVar[int] = 3
    chance: ClassVar[float] = 1 / 2

    def sample(self, words: UInt32[Array, " T"], size: Int[Array, ""]) -> tuple[Int[Array, " T"], Int[Array, ""]]:
        symbols = below(words, 2) + 1
        return symbols, jnp.where(symbols[0] == symbols[size - 1], 1, 2).astype(jnp.int32)
