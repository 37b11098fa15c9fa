"""Modular arithmetic with brackets, and equations of one unknown (xLSTM App. B.1.1; Deletang et al. 2207.02098).

An expression E(L) of L symbols is drawn as Deletang et al. draw theirs (the authors of xLSTM have not released their
generators of these two): E(1) is a number d, E(2) is -d, E(3) and E(4) are (E(1)) and (E(2)), and a longer one is
( E(l) o E(L - l - 3) ) with l uniform in 1 .. L - 4 and o any of the operators. Brackets show every order.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from xlstm_jax.tasks.formal import FormalLanguage, Row, below

PLUS, MINUS, TIMES, EQUALS, OPEN, CLOSE = range(1, 7)
OPERATOR, CLOSING = -1, -2  # what may wait beside the lengths of expressions


def expression(
    words: UInt32[Array, " T"], length: Int[Array, ""], modulus: int, operators: int, zero: int
) -> Int[Array, " T"]:
    """An expression of `length` symbols, one from each word, of the first `operators` of + - *; 0 d is `zero` + d.

    Every form begins with a symbol of its own (the grammar is in Greibach's normal form), so what is still to come is a
    pile, and each step takes its top, gives one symbol and puts the rest of the form on the pile.
    """
    place = jnp.arange(words.size + 4, dtype=jnp.int32)

    def emit(carry, word):
        pile, top = carry  # place of the top
        what = jnp.sum(jnp.where(place == top, pile, 0), dtype=jnp.int32)
        left = 1 + below(word, jnp.maximum(what - 4, 1))
        rest = jnp.where(what >= 5, 4, jnp.where(what >= 3, 2, jnp.where(what == 2, 1, 0)))
        below_top = [jnp.where(what == 2, 1, CLOSING), jnp.where(what >= 5, what - left - 3, what - 2), OPERATOR, left]
        for offset, value in enumerate(below_top):
            pile = jnp.where((place == top + offset) & (offset < rest), value, pile)
        number = zero + below(word, modulus)
        symbol = jnp.where(what == 1, number, jnp.where(what == 2, MINUS, OPEN))
        symbol = jnp.where(what == OPERATOR, PLUS + below(word, operators), symbol)
        return (pile, top + rest - 1), jnp.where(what == CLOSING, CLOSE, symbol)

    start = (jnp.where(place == 0, length, 0).astype(jnp.int32), jnp.zeros((), jnp.int32))
    return jax.lax.scan(emit, start, words)[1]


def evaluate(symbols: Int[Array, " T"], size: Int[Array, ""], modulus: int, zero: int) -> Int[Array, ""]:
    """Value of the first `size` symbols, an expression, by one frame (value so far, operator) for each open bracket."""
    place = jnp.arange(symbols.size // 2 + 2, dtype=jnp.int32)

    def read(carry, each):
        values, pending, depth, sign, before = carry
        symbol, shown = each
        here, above = place == depth, place == depth - 1
        value = jnp.where(symbol >= zero, sign * (symbol - zero), jnp.sum(jnp.where(here, values, 0), dtype=jnp.int32))
        at = jnp.where(symbol == CLOSE, above, here)  # the frame that the value goes into
        joined = jnp.where(
            pending == MINUS, values - value, jnp.where(pending == TIMES, values * value, values + value)
        )
        is_value, is_operator = (symbol >= zero) | (symbol == CLOSE), symbol <= TIMES
        unary = is_operator & ~before
        values_new = jnp.where(at & is_value, joined % modulus, values)
        pending_new = jnp.where(here & is_operator & before, symbol, pending)
        values_new = jnp.where((place == depth + 1) & (symbol == OPEN), 0, values_new)
        pending_new = jnp.where((place == depth + 1) & (symbol == OPEN), PLUS, pending_new)
        depth_new = depth + jnp.where(symbol == OPEN, 1, jnp.where(symbol == CLOSE, -1, 0))
        new = (values_new, pending_new, depth_new, jnp.where(unary, -1, 1), is_value)
        return jax.tree.map(lambda a, b: jnp.where(shown, a, b), new, carry), None

    zeros, one = jnp.zeros_like(place), jnp.ones((), jnp.int32)
    start = (zeros, zeros + PLUS, one - 1, one, jnp.zeros((), bool))
    shown = jnp.arange(symbols.size, dtype=jnp.int32) < size
    (values, *_), _ = jax.lax.scan(read, start, (symbols, shown))
    return values[0]


def equation(
    words: UInt32[Array, " T"], choice: UInt32[Array, ""], length: Int[Array, ""], modulus: int, zero: int
) -> tuple[Int[Array, " T"], Int[Array, ""]]:
    """`length` symbols: an expression of + and -, one number in it replaced by x, "=", its value; and the number x.

    x is the token before `zero`. As no number is multiplied, x has one solution.
    """
    position, size = jnp.arange(words.size, dtype=jnp.int32), length - 2
    symbols = expression(words, size, modulus, 2, zero)
    value = evaluate(symbols, size, modulus, zero)
    numbers = (symbols >= zero) & (position < size)
    chosen = numbers & (jnp.cumsum(numbers, dtype=jnp.int32) == 1 + below(choice, jnp.sum(numbers, dtype=jnp.int32)))
    answer = jnp.sum(jnp.where(chosen, symbols, 0), dtype=jnp.int32)
    shown = jnp.where(chosen, zero - 1, symbols)
    shown = jnp.where(position == size, EQUALS, shown)
    return jnp.where(position == size + 1, zero + value, shown), answer


@dataclass(frozen=True)
class ModularArithmeticBrackets(FormalLanguage):
    """Tokens [PAD] 0, + 1, - 2, * 3, = 4, ( 5, ) 6, then the numbers 0 .. 4 from 7 on; modulus V - 7 = 5.

    ((2+3)*-4) =  -> -20 mod 5 = 0: inputs 5 5 9 1 10 6 3 2 11 6 4, answer 7.
    (3-4) =       -> -1 mod 5 = 4: inputs 5 10 2 11 6 4, answer 11.
    """

    name: ClassVar[str] = "modular_arithmetic_brackets"
    vocab_size: ClassVar[int] = 12
    chance: ClassVar[float] = 1 / 5

    def sample(self, words: UInt32[Array, " T"], size: Int[Array, ""]) -> tuple[Int[Array, " T"], Int[Array, ""]]:
        symbols = expression(words, size - 1, 5, 3, 7)
        equals = jnp.arange(words.size, dtype=jnp.int32) == size - 1
        return jnp.where(equals, EQUALS, symbols), 7 + evaluate(symbols, size - 1, 5, 7)


@dataclass(frozen=True)
class SolveEquation(FormalLanguage):
    """Tokens as with brackets up to ) 6, then [ACT] 7, x 8, and the numbers 0 .. 4 from 9 on; modulus V - 9 = 5.

    (3-x)=4 [ACT] -> 4: inputs 5 12 2 8 6 4 13 7, answer 13.

    The vocabulary has *, but as in Deletang et al. none is drawn, so that x has one solution; which number is x is
    uniform. The shortest is x=d [ACT] with its answer: a length below 5 counts as 5.
    """

    name: ClassVar[str] = "solve_equation"
    vocab_size: ClassVar[int] = 14
    chance: ClassVar[float] = 1 / 5
    least: ClassVar[int] = 5
    spare: ClassVar[int] = 1

    def row(self, words: UInt32[Array, " W"], length: Int[Array, ""]) -> Row:
        size = length - 1
        symbols, answer = equation(words[:-1], words[-1], size - 1, 5, 9)
        act = jnp.arange(symbols.size, dtype=jnp.int32) == size - 1
        return Row(jnp.where(act, 7, symbols), size, answer[None], jnp.ones((), jnp.int32), size - 1)
