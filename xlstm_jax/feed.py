"""Batches that the host reads, on their way to the device: read ahead, stacked, and put there before they are needed.

    feed = Feed(task, "train", seed, batch_size, length=10)
    fed = feed.take(step, 7)                # a task whose batches step .. step + 6 lie on the device
    fed.batch("train", seed, step + 3, batch_size)

`Fed` is a pytree of arrays, so that a compiled program takes it as an argument, as it takes a task whose corpus lies on
the device. Every process reads the rows that its own devices hold.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, Int, Shaped

from . import guard
from .kernels import local
from .tasks.task import Batch


@dataclass(frozen=True, eq=False)
class Fed:
    """A host-fed task beside some of its batches, from number `first` on; in all else it is that task."""

    task: Any
    batches: Any  # `Batch`, stacked: (steps, B, T)
    first: Any  # an integer, traced in a compiled program

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def batch(self, split: str, seed: Int[ArrayLike, ""], step: Int[ArrayLike, ""], batch_size: int) -> Batch:
        """Batch number `step`, one of those that are here."""
        return jax.tree.map(lambda x: x[step - self.first], self.batches)


jax.tree_util.register_dataclass(Fed, data_fields=["batches", "first"], meta_fields=["task"])


def is_fed(task: Any) -> bool:
    """True for a task whose batches the host reads."""
    return hasattr(task, "host_batches")


class Feed:
    """The batches of a split in order, `length` at a time; a jump in the order begins the reading anew."""

    def __init__(self, task: Any, split: str, seed: int, batch_size: int, length: int = 1):
        self._task, self._arguments, self._batch_size, self._length = task, (split, seed), batch_size, length
        self._next, self._moved_on, self._batches = None, 0, iter(())

    def take(
        self,
        step: int,
        count: int,
        guarded: Any = (),
        waiting: Callable[[], AbstractContextManager] = nullcontext,
    ) -> Fed:
        """The batches of steps step .. step + count - 1, on the device; `waiting()` holds while each is fetched.

        guarded: the train state's guard, whose batches may be further on; read at the start and after a rollback alone.
        """
        if step != self._next:
            self._moved_on = int(guard.batch_number(guarded, step)) - step
            self._batches = self._read(step + self._moved_on)
        found = []
        for _ in range(count):
            with waiting():
                found.append(next(self._batches))
        self._next = step + count
        with waiting():
            found += [found[-1]] * (self._length - count)  # one shape, one program; these are never asked for
            batches = jax.tree.map(lambda *rows: put(np.stack(rows), self._batch_size), *found)
        return Fed(self._task, batches, np.int32(step + self._moved_on))

    def _read(self, step: int) -> Iterator[Batch]:
        shard = own_rows(self._batch_size)
        return self._task.host_batches(*self._arguments, step, self._batch_size, shard, ahead=max(4, self._length))


def _sharding() -> NamedSharding | None:
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else NamedSharding(mesh, PartitionSpec(None, local.ROWS))


def own_rows(batch_size: int) -> tuple[int, int]:
    """(index, count): the rows of a batch that this process's devices hold are part `index` of `count` equal ones.

    (0, 1), all rows, where they are no such part.
    """
    sharding = _sharding()
    if sharding is None:
        return 0, 1
    parts = sharding.addressable_devices_indices_map((1, batch_size)).values()
    spans = {rows.indices(batch_size)[:2] for _, rows in parts}
    start, stop = min(spans)[0], max(spans)[1]
    size = sum(high - low for low, high in spans)
    whole = size == stop - start and start % size == 0 and batch_size % size == 0
    return (start // size, batch_size // size) if whole else (0, 1)


def put(rows: Shaped[np.ndarray, "steps rows ..."], batch_size: int) -> Shaped[Array, "steps B ..."]:
    """(steps, this process's rows, ...) as the array of all processes' rows, divided as the mesh divides rows."""
    sharding = _sharding()
    if sharding is None:
        return jax.device_put(rows)
    return jax.make_array_from_process_local_data(sharding, rows, (rows.shape[0], batch_size, *rows.shape[2:]))
