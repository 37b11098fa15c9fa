"""The frame of generated tasks whose rows are all of one length; row r comes from (seed, split, step, r) alone."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Key, Num

from xlstm_jax.tasks.task import Batch, split_index


@dataclass(frozen=True)
class Synthetic:
    """Draws and counts the rows; a task adds what `tasks.task` lists, `row`, and `length` with a default of its own."""

    length: int = 0
    eval_length: int = 0  # of validation and test; 0: `length`
    num_eval: int = 1024  # samples in each of valid and test

    name: ClassVar[str]
    chance: ClassVar[float] = 0.0
    carries_state: ClassVar[bool] = False
    shortest: ClassVar[int] = 2  # legal length

    def __post_init__(self):
        for option in ("length", "eval_length"):
            value = getattr(self, option)
            if value < self.shortest and (option == "length" or value):
                raise ValueError(f"{self.name}: {option} must be at least {self.shortest}, not {value}")
        if self.num_eval < 1:
            raise ValueError(f"{self.name}: num_eval must be at least 1, not {self.num_eval}")

    def row(
        self, key: Key[Array, ""], length: int, train: bool
    ) -> tuple[Num[Array, "T ..."], Num[Array, "T ..."], Float[Array, " T"]]:
        """Inputs, targets and weights of one row."""
        raise NotImplementedError

    def length_of(self, split: str) -> int:
        """`length` or `eval_length`."""
        return self.length if split == "train" else self.eval_length or self.length

    def batch(self, split: str, seed: Int[ArrayLike, ""], step: Int[ArrayLike, ""], batch_size: int) -> Batch:
        """Batch number `step`; in evaluation the rows past sample `num_eval` weigh 0."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), split_index(split)), step)
        rows = jnp.arange(batch_size, dtype=jnp.int32)
        draw = jax.vmap(lambda r: self.row(jax.random.fold_in(key, r), self.length_of(split), split == "train"))
        inputs, targets, weights = draw(rows)
        if split != "train":
            counted = jnp.asarray(step, jnp.int32) * batch_size + rows < self.num_eval
            weights = weights * counted[:, None]
        return Batch(inputs, targets, weights, None, None)

    def num_batches(self, split: str, batch_size: int) -> int:
        """Batches of one evaluation."""
        if split_index(split) == 0:
            raise ValueError(f"{self.name}: training samples have no end: num_batches takes valid or test")
        return -(-self.num_eval // batch_size)

    def metrics(self, sums: dict[str, Any]) -> dict[str, float]:
        """Loss (nats or squared error) an answer, and accuracy where answers are classes."""
        loss = {"loss": float(sums["nll"]) / float(sums["weight"])}
        return loss if hasattr(self, "scores") else loss | {"accuracy": float(sums["correct"]) / float(sums["weight"])}


def distinct(key: Key[Array, ""], count: int, size: int) -> Int[Array, " count"]:
    """`count` different integers of 0 .. size - 1 in random order."""
    return jax.lax.top_k(jax.random.uniform(key, (size,), jnp.float32), count)[1].astype(jnp.int32)
