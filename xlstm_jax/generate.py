"""Generation: prompts of any lengths in one batch, read in whole pieces, then token by token in one compiled scan.

    tokens = generate(model, [[5, 1, 2], [7]], 100, key, Sampling(temperature=0.8, top_p=0.9), stop=(0,))
    for block in stream(model, prompts, 100, key): ...      # the same tokens as they come
    beams = beam_search(model, prompts, 100, beams=4)       # beams.tokens[:, 0] the best

Prompts are padded on the right and masked, so each row's state is exactly that after its own last token; padded lengths
are powers of two and the halves between, so another prompt needs no other program: there are two a padded length, one
with a mask and one without for prompts that all fill it. The scan runs in blocks of tokens: memory does not grow with
the length, and no result depends on the size of a block. A draw is decided by (key, row, position in the text): a text
that is cut anywhere and given as a prompt again goes on as before.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Int32, Key, PyTree

from .cells.arguments import is_integer
from .cells.wrappers import layers_apart

PADDING = -1  # what a row gives after its stop token
BLOCK = 32  # tokens a dispatch
PIECE = 2048  # the most tokens of a prompt that are read at once


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the filters apply in the order of the fields.

    repetition_penalty   scores of tokens in the prompt or the text so far are divided by it, negative ones multiplied
                         (CTRL, arXiv:1909.05858, section 4.1); 1: none
    temperature          scores are divided by it; 0: always the likeliest token
    top_k                only the k likeliest; 0: all
    top_p                only the likeliest that together reach this probability (arXiv:1904.09751); 1: all
    min_p                only those at least min_p times as likely as the likeliest (arXiv:2407.01082); 0: all
    """

    repetition_penalty: float | int = 1.0
    temperature: float | int = 1.0
    top_k: int = 0
    top_p: float | int = 1.0
    min_p: float | int = 0.0

    def __post_init__(self):
        for name, right, words in (
            ("repetition_penalty", lambda x: 0 < x < math.inf, "a positive number, or 1 for none,"),
            ("temperature", lambda x: 0 <= x < math.inf, "a positive number, or 0 for the likeliest token,"),
            ("top_p", lambda x: 0 < x <= 1, "a number above 0 and up to 1"),
            ("min_p", lambda x: 0 <= x <= 1, "a number from 0 to 1"),
        ):
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool) or not right(value):
                raise ValueError(f"{name} is {value!r}: {words} is needed")
        if not is_integer(self.top_k, 0):
            raise ValueError(f"top_k is {self.top_k!r}: a positive integer, or 0 for all tokens, is needed")


PLAIN, GREEDY = Sampling(), Sampling(temperature=0.0)


def penalised(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float | int) -> Float[Array, "B V"]:
    """CTRL's repetition penalty on the tokens that were seen."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def candidates(logits: Float[Array, "B V"], sampling: Sampling) -> tuple[Float[Array, "B C"], Int[Array, "B C"] | None]:
    """The scores to draw from, -inf where that is ruled out, and whose they are (None: token c has score c)."""
    scores, tokens = logits / sampling.temperature, None
    if sampling.top_k or sampling.top_p < 1:
        scores, tokens = jax.lax.top_k(scores, sampling.top_k or scores.shape[1])
    if sampling.top_p < 1:
        share = jax.nn.softmax(scores, axis=1)
        before = jnp.cumsum(share, axis=1) - share  # 0 for the likeliest, which therefore always stays
        scores = jnp.where(before < sampling.top_p, scores, -jnp.inf)
    if sampling.min_p > 0:
        least = jnp.max(scores, axis=1, keepdims=True) + math.log(sampling.min_p)
        scores = jnp.where(scores >= least, scores, -jnp.inf)
    return scores, tokens


def draw(logits: Float[Array, "B V"], keys: Key[Array, " B"], sampling: Sampling) -> Int[Array, " B"]:
    """One token a row, by the row's own key."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=1)
    scores, tokens = candidates(logits, sampling)
    place = jax.vmap(jax.random.categorical)(keys, scores)
    return place if tokens is None else jnp.take_along_axis(tokens, place[:, None], axis=1)[:, 0]


def bucket(length: int, least: int = 8) -> int:
    """The next of 8, 12, 16, 24, 32, ...: powers of two and the halves between."""
    power = max(least, 1 << max(length - 1, 0).bit_length())
    return 3 * power // 4 if power > least and length <= 3 * power // 4 else power


def token_rows(prompts: Sequence | ArrayLike, vocab_size: int) -> list[Int32[np.ndarray, " T"]]:
    """Each prompt as ids of the vocabulary, at least one; or one line about what is wrong."""
    prompts = list(np.atleast_1d(np.asarray(prompts))) if hasattr(prompts, "ndim") else prompts
    if np.ndim(prompts[0] if len(prompts) else 0) != 1:
        raise ValueError("prompts must be rows of token ids, [[5, 1, 2], [7]] say, with at least one row")
    rows = []
    for number, prompt in enumerate(prompts):
        row = np.asarray(prompt)
        if row.ndim == 1 and not row.size:
            raise ValueError(f"prompt {number} is empty: at least one token is needed")
        if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
            raise ValueError(f"prompt {number} is {row.dtype} {row.shape}: token ids (T,) are needed")
        check_ids(f"prompt {number} has", row, vocab_size)
        rows.append(row.astype(np.int32))
    return rows


def check_ids(where: str, ids: ArrayLike, vocab_size: int) -> None:
    """All lie in the vocabulary."""
    ids = np.asarray(ids)
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise ValueError(f"{where} the token {wrong[0]}: the vocabulary is 0 to {vocab_size - 1}")


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="state")
def _read(params, tokens, mask, state, y, *, graphdef):
    """One piece of all prompts: what the backbone gives for each row's last valid token so far, and the state."""
    ys, state = nnx.merge(graphdef, params).hidden(tokens, state, mask, None)
    if mask is None:
        return ys[:, -1], state
    last = jnp.max(jnp.where(mask, jnp.arange(tokens.shape[1])[None], 0), axis=1)
    new = jnp.take_along_axis(ys, last[:, None, None], axis=1)[:, 0]
    return (new if y is None else jnp.where(mask.any(axis=1)[:, None], new, y)), state


def prefill(graphdef, params: PyTree, rows: Sequence[np.ndarray]) -> tuple[Float[Array, "B D"], Any]:
    """What the backbone gives for the last token of each prompt, and the state after it.

    Prompts that all fill the padded length have no mask, and with it a program of their own: on a CPU a mask that is
    True everywhere takes 2 to 6 % of the time of a long prompt.
    """
    longest, y, state = max(map(len, rows)), None, None
    for start in range(0, longest, PIECE):
        tokens = np.zeros((len(rows), bucket(min(longest - start, PIECE))), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for number, row in enumerate(rows):
            piece = row[start : start + PIECE]
            tokens[number, : len(piece)], mask[number, : len(piece)] = piece, True
        y, state = _read(params, tokens, None if mask.all() else mask, state, y, graphdef=graphdef)
    return y, state


class Carry(NamedTuple):
    """Between two tokens: what the backbone gave, its state, tokens read, rows that stopped, tokens met (B, V)."""

    y: Float[Array, "B D"]
    state: Any
    position: Int[Array, " B"]
    done: Bool[Array, " B"]
    seen: Bool[Array, "B V"] | None


@functools.partial(jax.jit, static_argnames=("graphdef", "sampling", "num_tokens", "block"), donate_argnames="carry")
def _write(params, carry, key, stop, *, graphdef, sampling, num_tokens, block):
    """`block` tokens a row (B, block)."""
    model = nnx.merge(graphdef, params)
    rows = jnp.arange(carry.done.size)
    key_at = jax.vmap(lambda row, position: jax.random.fold_in(jax.random.fold_in(key, row), position))

    def step(carry, _):
        y, state, position, done, seen = carry
        logits = model.answers(y[:, None])[:, 0, :num_tokens]
        if seen is not None:
            logits = penalised(logits, seen, sampling.repetition_penalty)
        token = draw(logits, key_at(rows, position), sampling).astype(jnp.int32)
        ys, state = model.hidden(token[:, None], state, None, None)
        if seen is not None:
            seen = seen.at[rows, token].set(True)
        shown = jnp.where(done, PADDING, token)
        return Carry(ys[:, 0], state, position + 1, done | jnp.isin(token, stop), seen), shown

    carry, tokens = jax.lax.scan(step, carry, None, length=block)
    return carry, tokens.T


def check_request(model: nnx.Module, prompts, length: int, stop: Sequence, num_tokens: int | None, block: int):
    """The prompts as rows, the stop tokens as an array, and how many tokens may be drawn."""
    for name, value in (("length", length), ("block", block)):
        if not is_integer(value):
            raise ValueError(f"{name} is {value!r}: an integer of at least 1 is needed")
    if num_tokens is not None and not (is_integer(num_tokens) and num_tokens <= model.vocab_size):
        raise ValueError(f"num_tokens is {num_tokens!r}: an integer from 1 to {model.vocab_size} is needed")
    wrong = [token for token in stop if not is_integer(token, 0)]
    if wrong:
        raise ValueError(f"stop holds {wrong[0]!r}: token ids are needed")
    check_ids("stop has", np.array(stop, np.int64), model.vocab_size)
    return token_rows(prompts, model.vocab_size), np.array(stop, np.int32), num_tokens or model.vocab_size


def stream(
    model: nnx.Module,
    prompts: Sequence | ArrayLike,
    length: int,
    key: Key[Array, ""] | None = None,
    sampling: Sampling = PLAIN,
    *,
    stop: Sequence = (),
    num_tokens: int | None = None,
    block: int = BLOCK,
) -> Iterator[Int32[np.ndarray, "B n"]]:
    """What `generate` gives, in blocks of up to `block` tokens a row; ends when every row has stopped."""
    rows, stop, num_tokens = check_request(model, prompts, length, stop, num_tokens, block)
    if sampling.top_k > num_tokens:
        raise ValueError(f"top_k is {sampling.top_k}: there are {num_tokens} tokens")
    if key is None and sampling.temperature:
        raise ValueError("key is None: tokens are drawn by a key, jax.random.key(0) say, unless temperature is 0")
    key = jax.random.key(0) if key is None else key
    graphdef, params = nnx.split(layers_apart(model))
    options = dict(graphdef=graphdef, sampling=sampling, num_tokens=num_tokens, block=min(block, bucket(length)))
    return _blocks(params, rows, length, key, stop, options)


def _blocks(params, rows, length, key, stop, options):
    y, state = prefill(options["graphdef"], params, rows)
    seen = None
    if options["sampling"].repetition_penalty != 1:
        seen = np.zeros((len(rows), options["num_tokens"]), bool)
        for met, row in zip(seen, rows):
            met[row[row < met.size]] = True
    position = jnp.array([len(row) for row in rows], jnp.int32)
    carry = Carry(y, state, position, jnp.zeros(len(rows), bool), None if seen is None else jnp.array(seen))
    for start in range(0, length, options["block"]):
        carry, tokens = _write(params, carry, key, stop, **options)
        yield np.asarray(tokens)[:, : length - start]
        if stop.size and bool(carry.done.all()):
            return


def compiled_block(model: nnx.Module, batch_size: int = 1, sampling: Sampling = PLAIN, *, block: int = BLOCK):
    """The program that writes one block of so many rows, compiled without a weight or state of it being made."""
    graphdef, params = nnx.split(nnx.eval_shape(layers_apart, model))
    tokens = jax.ShapeDtypeStruct((batch_size, 1), jnp.int32)
    y, state = jax.eval_shape(functools.partial(_read, graphdef=graphdef), params, tokens, None, None, None)
    position, done = (jax.ShapeDtypeStruct((batch_size,), dtype) for dtype in (jnp.int32, bool))
    carry, stop = Carry(y, state, position, done, None), jax.ShapeDtypeStruct((0,), jnp.int32)
    options = dict(graphdef=graphdef, sampling=sampling, num_tokens=model.vocab_size, block=block)
    return _write.lower(params, carry, jax.random.key(0), stop, **options).compile()


def generate(
    model: nnx.Module,
    prompts: Sequence | ArrayLike,
    length: int,
    key: Key[Array, ""] | None = None,
    sampling: Sampling = PLAIN,
    *,
    stop: Sequence = (),
    num_tokens: int | None = None,
    block: int = BLOCK,
) -> Int32[np.ndarray, "B length"]:
    """`length` tokens that follow each prompt, those after a row's first stop token PADDING.

    stop: tokens that end a row. num_tokens: only ids below it are drawn, where the model has more than its tokenizer.
    """
    options = dict(stop=stop, num_tokens=num_tokens, block=block)
    return joined(list(stream(model, prompts, length, key, sampling, **options)), length)


def joined(blocks: Sequence[Int32[np.ndarray, "*B n"]], length: int) -> Int32[np.ndarray, "*B length"]:
    """Blocks one after another, and PADDING to the full length."""
    tokens = np.concatenate(blocks, axis=-1)
    rest = [(0, 0)] * (tokens.ndim - 1) + [(0, length - tokens.shape[-1])]
    return np.pad(tokens, rest, constant_values=PADDING)


class Beams(NamedTuple):
    """The best continuations of each prompt, best first, and their scores."""

    tokens: Int32[np.ndarray, "B N length"]
    scores: Float[np.ndarray, "B N"]


class BeamCarry(NamedTuple):
    """Between two tokens of B N rows; log_p, length and done are (B, N)."""

    y: Float[Array, "BN D"]
    state: Any
    log_p: Float[Array, "B N"]
    length: Int[Array, "B N"]
    done: Bool[Array, "B N"]


def batch_axes(model: nnx.Module) -> tuple[int, ...]:
    """The axis of each array of the model's state that counts rows: stacked layers have an axis before it."""
    two, three = (jax.tree.leaves(jax.eval_shape(lambda n=n: model.initial_state(n))) for n in (2, 3))
    return tuple(
        next(i for i, sizes in enumerate(zip(a.shape, b.shape)) if sizes == (2, 3)) for a, b in zip(two, three)
    )


def on_rows(function, state: Any, axes: Sequence[int]) -> Any:
    """function(array, axis of the rows) on all arrays of a state."""
    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, [function(leaf, axis) for leaf, axis in zip(leaves, axes)])


@functools.partial(jax.jit, static_argnames=("graphdef", "axes", "num_tokens", "block"), donate_argnames="carry")
def _write_beams(params, carry, stop, penalty, left, *, graphdef, axes, num_tokens, block):
    """The tokens of `block` steps, and which beam of the step before each goes on from; no step past `left`."""
    model = nnx.merge(graphdef, params)
    B, N = carry.done.shape
    only = jnp.where(jnp.arange(num_tokens) == 0, 0.0, -jnp.inf)[None, None]  # what has stopped goes on in one way

    def step(carry, number):
        y, state, log_p, length, done = carry
        still = done | (number >= left)
        logits = model.answers(y[:, None])[:, 0, :num_tokens]
        scores = jax.nn.log_softmax(logits, axis=1).reshape(B, N, num_tokens)
        total = log_p[..., None] + jnp.where(still[..., None], only.astype(scores.dtype), scores)
        length = length + ~still
        ranked = total / (length.astype(total.dtype) ** penalty)[..., None]
        _, best = jax.lax.top_k(ranked.reshape(B, N * num_tokens), N)
        parent, token = jnp.divmod(best, num_tokens)
        of_parent = lambda a: jnp.take_along_axis(a, parent, axis=1)  # noqa: E731
        log_p = jnp.take_along_axis(total.reshape(B, N * num_tokens), best, axis=1)
        shown = jnp.where(of_parent(still), PADDING, token.astype(jnp.int32))
        done = of_parent(done) | jnp.isin(shown, stop)
        rows = (jnp.arange(B)[:, None] * N + parent).reshape(-1)
        state = on_rows(lambda a, axis: jnp.take(a, rows, axis=axis), state, axes)
        ys, state = model.hidden(jnp.maximum(shown, 0).reshape(-1, 1), state, None, None)
        return BeamCarry(ys[:, 0], state, log_p, of_parent(length), done), (shown, parent)

    return jax.lax.scan(step, carry, jnp.arange(block))


def beam_search(
    model: nnx.Module,
    prompts: Sequence | ArrayLike,
    length: int,
    beams: int = 4,
    *,
    length_penalty: float | int = 1.0,
    stop: Sequence = (),
    num_tokens: int | None = None,
    block: int = BLOCK,
) -> Beams:
    """Up to `length` tokens after each prompt by beam search, stopped beams competing with running ones.

    The score of a beam is log p / (its tokens, the stop token included)^length_penalty; each step keeps the best.
    """
    rows, stop, num_tokens = check_request(model, prompts, length, stop, num_tokens, block)
    if not is_integer(beams) or beams > num_tokens:
        raise ValueError(f"beams is {beams!r}: an integer from 1 to {num_tokens}, the number of tokens, is needed")
    if not isinstance(length_penalty, Real) or not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty is {length_penalty!r}: a finite number is needed")
    model = layers_apart(model)
    graphdef, params = nnx.split(model)
    axes, size, B = batch_axes(model), min(block, bucket(length)), len(rows)
    y, state = prefill(graphdef, params, rows)
    state = on_rows(lambda a, axis: jnp.repeat(a, beams, axis=axis), state, axes)
    dtype = jnp.promote_types(y.dtype, jnp.float32)
    first = np.where(np.arange(beams) == 0, 0.0, -np.inf).astype(dtype)  # all beams are still the same
    start = [jnp.array(np.tile(each, (B, 1))) for each in (first, np.zeros(beams, np.int32), np.zeros(beams, bool))]
    carry, steps = BeamCarry(jnp.repeat(y, beams, axis=0), state, *start), []
    options = dict(graphdef=graphdef, axes=axes, num_tokens=num_tokens, block=size)
    for done in range(0, length, size):
        carry, taken = _write_beams(params, carry, stop, np.float32(length_penalty), length - done, **options)
        steps.append(taken)
        if stop.size and bool(carry.done.all()):
            break
    tokens, parents = (np.concatenate(each)[:length] for each in zip(*jax.device_get(steps)))
    scores = carry.log_p / carry.length.astype(carry.log_p.dtype) ** length_penalty
    return Beams(joined([followed(tokens, parents)], length), np.asarray(scores))


def followed(tokens: Int[np.ndarray, "T B N"], parents: Int[np.ndarray, "T B N"]) -> Int[np.ndarray, "B N T"]:
    """Each last beam's tokens, found from the end."""
    T, B, N = tokens.shape
    beam, out = np.tile(np.arange(N), (B, 1)), np.empty((B, N, T), np.int32)
    for t in reversed(range(T)):
        out[..., t] = np.take_along_axis(tokens[t], beam, axis=1)
        beam = np.take_along_axis(parents[t], beam, axis=1)
    return out
