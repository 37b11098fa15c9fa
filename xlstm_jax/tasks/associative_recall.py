"""Multi-query associative recall: which value came with this key? (Zoology, arXiv 2312.04927; xLSTM, Fig. 5)"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from xlstm_jax.tasks.synthetic import Synthetic, distinct


@dataclass(frozen=True)
class AssociativeRecall(Synthetic):
    """Tokens 0 filler, keys 1 .. V/2 - 1, values V/2 .. V - 1; `pairs` different keys, each with a value of its own.

    V = 8: 1 5 3 6 | 3 0 0 0 1 0 -> asked at the 3: 6, at the second 1: 5.

    The pairs come first, then every key once more among filler, at the even places after them. A key's place is drawn
    without replacement with probability proportional to (1, 2, ...)^(power - 1): most of them soon after the pairs.
    """

    length: int = 64
    pairs: int = 4
    vocab_size: int = 8192
    power: float = 0.01

    name: ClassVar[str] = "associative_recall"

    def __post_init__(self):
        super().__post_init__()
        shortest = min(self.length, self.eval_length or self.length)
        if self.pairs < 1 or 4 * self.pairs > shortest:
            raise ValueError(f"{self.name}: pairs must be 1 to length / 4 = {shortest // 4}, not {self.pairs}")
        if self.vocab_size < 2 * self.pairs + 2 or self.vocab_size % 2:
            raise ValueError(
                f"{self.name}: vocab_size must be even and at least 2 pairs + 2 = {2 * self.pairs + 2},"
                f" not {self.vocab_size}"
            )
        if not self.power > 0:
            raise ValueError(f"{self.name}: power must be above 0, not {self.power}")

    @property
    def num_classes(self) -> int:
        return self.vocab_size

    def row(self, key, length, train):
        P, half = self.pairs, self.vocab_size // 2
        of_keys, of_values, of_places = jax.random.split(key, 3)
        keys, values = 1 + distinct(of_keys, P, half - 1), half + distinct(of_values, P, half)
        places = jnp.arange(1, (length - 2 * P) // 2 + 1, dtype=jnp.float32)
        # the largest of log p + Gumbel noise are a sample without replacement
        noisy = (self.power - 1) * jnp.log(places) + jax.random.gumbel(of_places, places.shape, jnp.float32)
        asked = 2 * P + 2 * jax.lax.top_k(noisy, P)[1]
        shown = jnp.stack([keys, values], axis=1).reshape(-1)
        inputs = jnp.zeros(length, jnp.int32).at[: 2 * P].set(shown).at[asked].set(keys)
        targets = jnp.zeros(length, jnp.int32).at[asked].set(values)
        return inputs, targets, jnp.zeros(length, jnp.float32).at[asked].set(1.0)
