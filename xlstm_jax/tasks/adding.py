"""The adding problem: the sum of the two marked numbers (Hochreiter and Schmidhuber 1997; TCN, arXiv 1803.01271)."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from xlstm_jax.tasks.synthetic import Synthetic
from xlstm_jax.tasks.task import squared_error


@dataclass(frozen=True)
class Adding(Synthetic):
    """Each step shows a number, uniform in [0, 1), and a mark, 1 at two places; the last step is asked for their sum.

    (0.3, 0) (0.5, 1) (0.9, 0) (0.2, 1) -> 0.7. Always answering 1 has the squared error 1/6.
    """

    length: int = 200

    name: ClassVar[str] = "adding"
    num_features: ClassVar[int] = 2
    num_classes: ClassVar[int] = 1
    scores = staticmethod(squared_error)

    def row(self, key, length, train):
        of_numbers, of_first, of_second = jax.random.split(key, 3)
        numbers = jax.random.uniform(of_numbers, (length,), jnp.float32)
        first = jax.random.randint(of_first, (), 0, length, jnp.int32)
        second = (first + 1 + jax.random.randint(of_second, (), 0, length - 1, jnp.int32)) % length
        positions = jnp.arange(length, dtype=jnp.int32)
        marks = ((positions == first) | (positions == second)).astype(jnp.float32)
        last = (positions == length - 1).astype(jnp.float32)
        return jnp.stack([numbers, marks], axis=-1), (last * jnp.sum(numbers * marks))[:, None], last
