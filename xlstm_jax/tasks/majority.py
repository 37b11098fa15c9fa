"""Majority: which token is the most frequent, and how often does it come? (xLSTM, arXiv 2405.04517, App. B.1.1)"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from xlstm_jax.tasks.formal import FormalLanguage, below


def counts(symbols: Int[Array, " T"], size: Int[Array, ""], vocab_size: int) -> Int[Array, " V"]:
    """How often each token is among the first `size`."""
    shown = jnp.arange(symbols.size, dtype=jnp.int32) < size
    same = symbols[:, None] == jnp.arange(vocab_size, dtype=jnp.int32)[None]
    return jnp.sum(same & shown[:, None], axis=0, dtype=jnp.int32)


@dataclass(frozen=True)
class Majority(FormalLanguage):
    """Tokens [PAD] 0, symbols 1 .. 63; the answer is the most frequent one, the smallest of them where several are.

    5 9 5 2 -> 5. 9 2 -> 2. The paper does not say what counts at a tie.
    """

    name: ClassVar[str] = "majority"
    vocab_size: ClassVar[int] = 64
    chance: ClassVar[float] = 1 / 63

    def sample(self, words: UInt32[Array, " T"], size: Int[Array, ""]) -> tuple[Int[Array, " T"], Int[Array, ""]]:
        symbols = below(words, self.vocab_size - 1) + 1
        return symbols, jnp.argmax(counts(symbols, size, self.vocab_size)).astype(jnp.int32)


@dataclass(frozen=True)
class MajorityCount(FormalLanguage):
    """Tokens [PAD] 0, symbols 1 .. 63; the answer is the token c where the most frequent symbol comes c times.

    5 9 5 2 -> 2. A count above 63 is answered with 63, the top token.
    """

    name: ClassVar[str] = "majority_count"
    vocab_size: ClassVar[int] = 64
    chance: ClassVar[float] = 1 / 63

    def sample(self, words: UInt32[Array, " T"], size: Int[Array, ""]) -> tuple[Int[Array, " T"], Int[Array, ""]]:
        symbols = below(words, self.vocab_size - 1) + 1
        return symbols, jnp.minimum(jnp.max(counts(symbols, size, self.vocab_size)), self.vocab_size - 1)
