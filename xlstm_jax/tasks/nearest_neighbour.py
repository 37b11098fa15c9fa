"""Nearest-neighbour search: the value of the vector nearest to the first one (xLSTM, arXiv 2405.04517, Fig. 2)."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from xlstm_jax.tasks.synthetic import Synthetic
from xlstm_jax.tasks.task import squared_error


@dataclass(frozen=True)
class NearestNeighbour(Synthetic):
    """Unit vectors of the plane, each with a value in [0, 1); the first is the reference, its value shown as 0.

    (1, 0; 0) (0, 1; 0.3) (0.8, 0.6; 0.9) (-1, 0; 0.5) -> 0.9, as 0.8 is the largest product with the reference.

    The last step is asked for the value of the nearest vector; in training every step after the first is, for the
    nearest so far, so that all shorter contexts are trained too. Answering 1/2 has the squared error 1/12.
    """

    length: int = 64

    name: ClassVar[str] = "nearest_neighbour"
    num_features: ClassVar[int] = 3
    num_classes: ClassVar[int] = 1
    scores = staticmethod(squared_error)

    def row(self, key, length, train):
        of_angles, of_values = jax.random.split(key)
        angles = jax.random.uniform(of_angles, (length,), jnp.float32, 0, 2 * jnp.pi)
        vectors = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        positions = jnp.arange(length, dtype=jnp.int32)
        values = jnp.where(positions > 0, jax.random.uniform(of_values, (length,), jnp.float32), 0)
        likeness = jnp.where(positions > 0, jnp.sum(vectors * vectors[:1], axis=-1), -2)
        is_nearest = likeness >= jax.lax.cummax(likeness)
        nearest = jax.lax.cummax(jnp.where(is_nearest, positions, 0))  # so far
        asked = positions > 0 if train else positions == length - 1
        inputs = jnp.concatenate([vectors, values[:, None]], axis=-1)
        return inputs, values[nearest][:, None] * asked[:, None], asked.astype(jnp.float32)
