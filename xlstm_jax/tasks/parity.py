"""Parity: is the number of b even? (xLSTM App. B.1.1; Deletang et al. 2207.02098)"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from xlstm_jax.tasks.formal import FormalLanguage, below


@dataclass(frozen=True)
class Parity(FormalLanguage):
    """Tokens [PAD] 0, a 1, b 2; the answer is a (1) for an even number of b, b (2) for an odd one.

    abba -> a: inputs 1 2 2 1, answer 1 asked at the last symbol.
    babb -> b: three b, answer 2.
    """

    name: ClassVar[str] = "parity"
    vocab_size: ClassVar[int] = 3
    chance: ClassVar[float] = 1 / 2

    def sample(self, words: UInt32[Array, " T"], size: Int[Array, ""]) -> tuple[Int[Array, " T"], Int[Array, ""]]:
        is_b = below(words, 2)
        shown = jnp.arange(words.size, dtype=jnp.int32) < size
        return is_b + 1, jnp.sum(jnp.where(shown, is_b, 0), dtype=jnp.int32) % 2 + 1
