"""Stack manipulation: what is on the stack after these pushes and pops? (xLSTM App. B.1.1; Deletang et al.)"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

from xlstm_jax.tasks.formal import FormalLanguage, Row, below


def run_stack(
    pushed: Int[Array, " T"], pops: Bool[Array, " T"], size: Int[Array, ""]
) -> tuple[Int[Array, " T"], Int[Array, ""]]:
    """The stack after `size` actions, bottom first, and its height: each pops (an empty stack stays) or pushes."""
    position = jnp.arange(pushed.size, dtype=jnp.int32)

    def act(carry, action):
        stack, height = carry
        symbol, pop, shown = action
        stack = jnp.where(shown & ~pop & (position == height), symbol, stack)
        height = jnp.where(shown, jnp.where(pop, jnp.maximum(height - 1, 0), height + 1), height)
        return (stack, height), None

    start = (jnp.zeros_like(pushed), jnp.zeros((), jnp.int32))
    return jax.lax.scan(act, start, (pushed, pops, position < size))[0]


@dataclass(frozen=True)
class StackManipulation(FormalLanguage):
    """Tokens [PAD] 0, [ACT] 1, POP 2, ST(1) .. ST(4) 3 .. 6, PUSH(1) .. PUSH(4) 7 .. 10; bottom to top.

    ST(1) ST(3) POP PUSH(2) PUSH(2) [ACT] -> 1 2 2: inputs 3 5 2 8 8 1 0 0, answers 3 4 4 asked at the last three.

    V = 11 holds (V - 3) / 2 = 4 symbols, 1 / s_rand. A row of k tokens before [ACT], n = 2 k + 1, begins with 1 .. k
    ST; each later one is POP with probability 1/3 while the stack holds more than one symbol, and PUSH otherwise, so
    that there always is an answer. There are at most k answers: a row may be shorter than the length drawn.
    """

    name: ClassVar[str] = "stack_manipulation"
    vocab_size: ClassVar[int] = 11
    chance: ClassVar[float] = 1 / 4
    spare: ClassVar[int] = 1

    def row(self, words: UInt32[Array, " W"], length: Int[Array, ""]) -> Row:
        size = (length - 1) // 2
        initial = 1 + below(words[-1], size)
        words = words[:-1]
        position = jnp.arange(words.size, dtype=jnp.int32)
        values = below(words // 3, 4)

        def choose(height, each):
            wanted, place = each
            pop = wanted & (place >= initial) & (height > 1)
            return height + jnp.where(pop, -1, 1), pop

        _, pops = jax.lax.scan(choose, jnp.zeros((), jnp.int32), (below(words, 3) == 0, position))
        stack, height = run_stack(values + 3, pops, size)
        symbols = jnp.where(position < initial, values + 3, jnp.where(pops, 2, values + 7))
        return Row(jnp.where(position == size, 1, symbols), size + 1, stack, height, size)
