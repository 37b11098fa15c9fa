"""Copy memory (TCN, arXiv 1803.01271, after Hochreiter and Schmidhuber) and selective copying (Mamba, 2312.00752)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from xlstm_jax.tasks.synthetic import Synthetic, distinct

SYMBOLS = 10  # to be copied, as in the paper


@dataclass(frozen=True)
class CopyMemory(Synthetic):
    """Ten symbols 1 .. 8, `length` - 1 blanks 0, eleven marks 9; the last ten steps are asked for the symbols.

    Two symbols, length 3: 5 2 0 0 9 9 9 -> 0 0 0 0 0 5 2.

    As in the TCN paper every step counts, the blank answers too, so that the loss of a model which knows all but the
    symbols is 10 ln 8 / (length + 20); `of_memoryless` is the loss over that one.
    """

    length: int = 500

    name: ClassVar[str] = "copy_memory"
    vocab_size: ClassVar[int] = 10
    num_classes: ClassVar[int] = 10

    def row(self, key, length, train):
        symbols = jax.random.randint(key, (SYMBOLS,), 1, 9, jnp.int32)
        blanks, marks = jnp.zeros(length - 1, jnp.int32), jnp.full(SYMBOLS + 1, 9, jnp.int32)
        inputs = jnp.concatenate([symbols, blanks, marks])
        targets = jnp.zeros_like(inputs).at[-SYMBOLS:].set(symbols)
        return inputs, targets, jnp.ones(inputs.shape, jnp.float32)

    def metrics(self, sums):
        found = super().metrics(sums)
        memoryless = SYMBOLS * math.log(8) / (self.length_of("test") + 2 * SYMBOLS)
        return found | {"of_memoryless": found["loss"] / memoryless}


@dataclass(frozen=True)
class SelectiveCopying(Synthetic):
    """`symbols` tokens 1 .. V - 2 at random places among `length` - symbols blanks 0, then as many marks V - 1.

    V = 6, 2 symbols, length 5: 0 4 0 0 2 5 5 -> asked at the marks: 4 2.
    """

    length: int = 4096
    symbols: int = 16
    vocab_size: int = 16

    name: ClassVar[str] = "selective_copying"

    def __post_init__(self):
        super().__post_init__()
        shortest = min(self.length, self.eval_length or self.length)
        if not 1 <= self.symbols <= shortest:
            raise ValueError(f"{self.name}: symbols must be 1 to length = {shortest}, not {self.symbols}")
        if self.vocab_size < 3:
            raise ValueError(f"{self.name}: vocab_size must be at least 3 (blank, symbol, mark), not {self.vocab_size}")

    @property
    def num_classes(self) -> int:
        return self.vocab_size

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 2)

    def row(self, key, length, train):
        of_symbols, of_places = jax.random.split(key)
        M = self.symbols
        symbols = jax.random.randint(of_symbols, (M,), 1, self.vocab_size - 1, jnp.int32)
        places = jnp.sort(distinct(of_places, M, length))
        inputs = jnp.zeros(length + M, jnp.int32).at[places].set(symbols).at[length:].set(self.vocab_size - 1)
        targets = jnp.zeros_like(inputs).at[length:].set(symbols)
        return inputs, targets, jnp.zeros(length + M, jnp.float32).at[length:].set(1.0)
