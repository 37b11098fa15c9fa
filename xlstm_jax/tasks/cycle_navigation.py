"""Cycle navigation: where on the cycle do the steps end? (xLSTM App. B.1.1; Deletang et al. 2207.02098)"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from xlstm_jax.tasks.formal import FormalLanguage, below


@dataclass(frozen=True)
class CycleNavigation(FormalLanguage):
    """Tokens [PAD] 0, STAY 1, +1 2, -1 3, then the positions of the cycle from 4 on; the start is position 0.

    +1 +1 STAY -1 +1 -> position 2: inputs 2 2 1 3 2, answer 6.
    -1 -1 -> position 3 of 5: inputs 3 3, answer 7.
    """

    cycle_length: int = 5  # V - 4 with the paper's V = 9

    name: ClassVar[str] = "cycle_navigation"

    def __post_init__(self):
        super().__post_init__()
        if self.cycle_length < 2:
            raise ValueError(f"{self.name}: cycle_length must be at least 2, not {self.cycle_length}")

    @property
    def vocab_size(self) -> int:
        return self.cycle_length + 4

    @property
    def chance(self) -> float:
        return 1 / self.cycle_length

    def sample(self, words: UInt32[Array, " T"], size: Int[Array, ""]) -> tuple[Int[Array, " T"], Int[Array, ""]]:
        symbols = below(words, 3) + 1
        steps = jnp.where(symbols == 3, -1, symbols - 1)
        shown = jnp.arange(words.size, dtype=jnp.int32) < size
        return symbols, jnp.sum(jnp.where(shown, steps, 0), dtype=jnp.int32) % self.cycle_length + 4
