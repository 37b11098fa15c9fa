"""The chunk length of the forms "fused" and "chunkwise", and remat, from a budget in bytes.

What the fused form's forward and backward together set aside beside their arguments and results, for T steps in
chunks of L:

    bytes(L) = T step + ceil(T / L) chunk + L work

with the bytes of what is kept of each step and of each chunk for the gradient, and of what is worked on for a step of
the one chunk at hand. They are counted from the traced shapes, with no compilation; `mlstm.Bytes` are the other form's.
A kernel has nothing to choose: "auto" takes it where what it sets aside is within the budget too.
"""

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from ..names import unknown

AUTOMATIC_SHARE = 4  # "auto" is this part of the memory: the other layers, their weights and gradients have the rest
SHORTEST = 8  # steps of a chunk; below it the products are too small to be worth a chunk


class Bytes(NamedTuple):
    """The three numbers of the formula."""

    step: int
    chunk: int = 0
    work: int = 0

    def total(self, T: int, L: int) -> int:
        """bytes(L)."""
        return T * self.step + -(-T // L) * self.chunk + L * self.work


class Chunks(NamedTuple):
    """A chunk length, whether a chunk is computed again for the gradient, and the bytes of that."""

    L: int
    remat: bool
    bytes: int


def size(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def is_integer(value: Any, least: int = 1) -> bool:
    """Of Python or numpy, no truth value, and not below `least`."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= least)


def check_chunk(chunk_size: Any, otherwise: str = "") -> None:
    """A number of steps; `otherwise` says what else may be given."""
    if not is_integer(chunk_size):
        raise ValueError(f"chunk_size is {chunk_size!r}: an integer of at least 1{otherwise} is needed")


def check_budget(budget: int | float | str | None) -> None:
    """None, "auto" or a positive number of bytes."""
    if isinstance(budget, str) and budget != "auto":
        raise ValueError(unknown("memory_budget", budget, ("auto",)) + ", or a number of bytes")
    if not (budget is None or budget == "auto" or is_integer(budget)):
        raise ValueError(f"memory_budget is {budget!r}: a positive number of bytes, 'auto' or None is needed")


def budget_bytes(budget: int | str) -> int:
    """The budget itself, or for "auto" a quarter of what the device says it has, or else of the machine's memory."""
    if budget != "auto":
        return budget
    found = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return (found or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // AUTOMATIC_SHARE


def within(budget: int | float | str | None, planned: Any) -> Any:
    """A kernel's plan, or why there is none: also that it sets aside more than the budget."""
    if isinstance(planned, str) or budget is None or planned.bytes <= budget_bytes(budget):
        return planned
    return f"the kernel would set aside {planned.bytes} bytes; memory_budget is {budget_bytes(budget)}"


def lengths(T: int, preferred: int) -> list[int]:
    """The preferred chunk length, then its halves and doubles, the nearest first."""
    preferred = min(preferred, T)
    shorter = [preferred >> n for n in range(1, preferred.bit_length()) if preferred >> n >= SHORTEST]
    longer = [preferred << n for n in range(1, (T // preferred).bit_length()) if preferred << n <= T]
    return sorted({preferred, *shorter, *longer}, key=lambda L: max(L, preferred) / min(L, preferred))


def fitting(T: int, preferred: int, budget: int | str, costs: Iterable[tuple[bool, Any]]) -> Chunks:
    """The first that fits: of the ways to compute, in their order, the chunk length nearest to the preferred one."""
    limit = budget_bytes(budget)
    plans = [Chunks(L, remat, cost.total(T, L)) for remat, cost in costs for L in lengths(T, preferred)]
    for plan in plans:
        if plan.bytes <= limit:
            return plan
    least = min(plans, key=lambda plan: plan.bytes)
    raise ValueError(
        f"memory_budget: {limit} bytes fit nothing for {T} steps; the least is {least.bytes}, "
        f"with chunk_size={least.L}{' and remat=True' if least.remat else ''}"
    )
