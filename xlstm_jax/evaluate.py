"""Evaluation: a task's split as it was trained on, or a language model on token streams of any length.

    evaluate(model, task, "test", batch_size)           a task's metrics, its state carried where the task asks for it
    nll = stream_losses(model, tokens, 512)             nats of each token but the first, read in windows of 512
    summary(nll, *text_size(tokenizer, tokens[1:]))     perplexity, bits a byte, bits a character
    by_position(nll, 512), by_document(nll, tokens, end)

No dropout. Token streams are read in chunks of one length with the state carried on, so memory does not grow with a
window's length, and windows of all lengths share one compiled program.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Shaped

from . import sharding
from .cells.arguments import is_integer
from .data.tokenizers import Tokenizer
from .feed import Feed, is_fed
from .generate import bucket, check_ids
from .kernels import local


def token_scores(
    logits: Float[Array, "B T K"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Cross-entropy in nats, and 1.0 where the largest logit is the target's; float32 at least."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - picked
    return nll, (jnp.argmax(logits, axis=-1) == targets).astype(logits.dtype)


def split_task(task) -> tuple[list[Array], "TaskShell"]:
    """(arrays of the task, the hashable rest): arrays go into a compiled program as arguments, not as constants."""
    leaves, structure = jax.tree.flatten(task)
    if len(leaves) == 1 and leaves[0] is task:  # no pytree: the task itself is static
        return [], TaskShell(task, None)
    return leaves, TaskShell(None, structure)


class TaskShell:
    """A task without its arrays; hashable, so that equal tasks share one compiled program."""

    def __init__(self, task, structure):
        self._task, self._structure = task, structure
        try:
            self._key = (hash(task), task, hash(structure), structure)
        except TypeError:  # holds an array and is no pytree
            self._key = (id(task),)

    def join(self, arrays):
        return self._task if self._structure is None else jax.tree.unflatten(self._structure, arrays)

    def __hash__(self):
        return hash(self._key[0])

    def __eq__(self, other):
        return isinstance(other, TaskShell) and self._key == other._key


@functools.partial(jax.jit, static_argnames=("graphdef", "shell", "split", "batch_size"), donate_argnames="carry")
def _batch_sums(params, arrays, carry, seed, step, *, graphdef, shell, split, batch_size):
    task, model = shell.join(arrays), nnx.merge(graphdef, params)
    batch = jax.tree.map(local.activations, task.batch(split, seed, step, batch_size))
    logits, state = model(batch.inputs, carry if task.carries_state else None, batch.mask, batch.reset)
    nll, correct = getattr(task, "scores", token_scores)(logits, batch.targets)
    weights = batch.weights.astype(nll.dtype)
    sums = {
        "nll": jnp.sum(jnp.where(weights != 0, nll, 0) * weights),
        "correct": jnp.sum(correct * weights),
        "weight": jnp.sum(weights),
    }
    if hasattr(task, "bucket"):
        member = task.bucket(batch)[:, None] == jnp.arange(len(task.buckets()))[None]
        for name, values in (("correct", correct * weights), ("weight", weights)):
            sums[f"{name}_by_length"] = jnp.sum(jnp.sum(values, axis=1)[:, None] * member, axis=0)
    return sharding.whole(sums), sharding.carried(state, model) if task.carries_state else ()


def evaluate_params(
    graphdef, params: PyTree, task, split: str, batch_size: int, seed=0, between: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Metrics of the split, by `task.metrics`; sums are float32 within a batch, float64 over batches.

    between: called before every batch.
    """
    arrays, shell = split_task(task)
    model = nnx.merge(graphdef, params)
    carry = sharding.carried(model.initial_state(batch_size), model) if task.carries_state else ()
    feed = Feed(task, split, seed, batch_size) if is_fed(task) else None
    sums = []
    for step in range(task.num_batches(split, batch_size)):
        between()
        if feed:
            arrays, shell = split_task(feed.take(step, 1))
        one, carry = _batch_sums(
            params,
            arrays,
            carry,
            jnp.int32(seed),
            jnp.int32(step),
            graphdef=graphdef,
            shell=shell,
            split=split,
            batch_size=batch_size,
        )
        sums.append(one)  # read after the loop: the device never waits for the host
    if not sums:
        raise ValueError(
            f"task {task.name}: the {split} split has no batch of {batch_size} rows; use a smaller batch size"
        )
    sums = jax.device_get(sums)
    total = {name: np.sum([one[name] for one in sums], axis=0, dtype=np.float64) for name in sums[0]}
    return task.metrics(total)


def evaluate(model: nnx.Module, task, split: str, batch_size: int, seed=0) -> dict[str, Any]:
    """Metrics of a model on the "valid" or "test" split of a task."""
    graphdef, params = nnx.split(model)
    return evaluate_params(graphdef, params, task, split, batch_size, seed)


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="state")
def _chunk_scores(params, state, inputs, targets, mask, reset, *, graphdef):
    logits, state = nnx.merge(graphdef, params)(inputs, state, mask, reset)
    return token_scores(logits, targets), state


def row_scores(
    model: nnx.Module,
    rows: Sequence[np.ndarray],
    *,
    batch_size: int = 8,
    chunk: int = 256,
    end: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each row of tokens (N,): nats of all but the first (N - 1,), and 1.0 where one was the likeliest.

    Each is read from the empty state, `batch_size` rows at once, `chunk` tokens at a time. end: the token that begins a
    document, at which the state is emptied.
    """
    check_counts(batch_size=batch_size, chunk=chunk)
    graphdef, params = nnx.split(model)
    longest = max((len(row) - 1 for row in rows), default=0)
    batch_size, chunk = min(batch_size, max(len(rows), 1)), min(chunk, bucket(longest))
    for first in range(0, len(rows), batch_size):
        group = rows[first : first + batch_size]
        found, state = [], model.initial_state(batch_size)
        for start in range(0, max(len(row) - 1 for row in group), chunk):
            tokens = np.zeros((batch_size, chunk + 1), np.int32)
            mask = np.zeros((batch_size, chunk), bool)
            for number, row in enumerate(group):
                part = row[start : start + chunk + 1]
                tokens[number, : len(part)] = part
                mask[number, : max(len(part) - 1, 0)] = True
            check_ids("the data has", tokens, model.vocab_size)
            inputs, targets = tokens[:, :-1], tokens[:, 1:]
            reset = None if end is None else inputs == end
            valid = None if mask.all() else mask
            scores, state = _chunk_scores(params, state, inputs, targets, valid, reset, graphdef=graphdef)
            found.append(scores)  # read after the rows' last chunk: the device never waits for the host
        columns = [np.concatenate(each, axis=1) for each in zip(*jax.device_get(found))]
        for number, row in enumerate(group):
            yield tuple(each[number, : len(row) - 1] for each in columns) if found else (np.zeros(0, np.float32),) * 2


def check_counts(**counts: int) -> None:
    """All are integers of at least 1."""
    for name, value in counts.items():
        if not is_integer(value):
            raise ValueError(f"{name} is {value!r}: an integer of at least 1 is needed")


def stream_losses(
    model: nnx.Module,
    tokens: Shaped[np.ndarray, " N"],
    length: int | None,
    *,
    batch_size: int = 8,
    chunk: int = 256,
    end: int | None = None,
) -> Float[np.ndarray, " N-1"]:
    """Nats of each token but the first, in windows of `length` that each begin with the empty state.

    length None: the state is carried on from the first token to the last, in `batch_size` parts read side by side.
    """
    if len(tokens) < 2:
        raise ValueError(f"the data has {len(tokens)} tokens: at least 2 are needed, one to be predicted")
    check_counts(batch_size=batch_size, chunk=chunk, **({} if length is None else {"length": length}))
    targets = len(tokens) - 1
    length = math.ceil(targets / batch_size) if length is None else length
    rows = [tokens[start : start + length + 1] for start in range(0, targets, length)]
    scores = row_scores(model, rows, batch_size=batch_size, chunk=chunk, end=end)
    return np.concatenate([nll for nll, _ in scores])


def text_size(tokenizer: Tokenizer, tokens: Shaped[np.ndarray, " N"]) -> tuple[int | None, int | None]:
    """Bytes and characters of the text that the tokens stand for, ends not counted; None where there is no text."""
    if tokenizer.kind == "ids":
        return None, None
    if tokenizer.kind == "bytes":
        tokens = tokens[tokens < 256]
        return tokens.size, int(np.count_nonzero(tokens & 0xC0 != 0x80))  # bytes that begin a character
    text = tokenizer.decode(tokens)
    return len(text.encode()), len(text)


def summary(
    nll: Float[ArrayLike, " N"], num_bytes: int | None = None, num_characters: int | None = None
) -> dict[str, float | int]:
    """Tokens, nats a token, perplexity, and bits a byte and a character of the text if their number is known."""
    total, count = math.fsum(np.asarray(nll, np.float64)), len(nll)
    row = {"tokens": count, "loss": total / count, "perplexity": math.exp(min(total / count, 700.0))}
    for unit, size in (("byte", num_bytes), ("character", num_characters)):
        if size:
            row |= {f"{unit}s": size, f"bits_per_{unit}": total / math.log(2) / size}
    return row


def position_edges(length: int) -> list[int]:
    """0, 1, 2, 3, 4, 6, 8, 12, ... up to `length`: powers of two and the halves between."""
    edges = [0, 1]
    while edges[-1] < length:
        edges.append(min(bucket(edges[-1] + 1, 1), length))
    return edges


def by_position(nll: Float[ArrayLike, " N"], length: int) -> list[dict[str, float | int]]:
    """Mean loss by how many tokens of the window came before the input, in `position_edges`; empty ones left out."""
    nll = np.asarray(nll, np.float64)
    position, rows = np.arange(nll.size) % length, []
    for first, stop in zip(edges := position_edges(length), edges[1:]):
        inside = nll[(position >= first) & (position < stop)]
        if inside.size:
            rows.append({"first": first, "last": stop - 1, "tokens": inside.size, "loss": float(inside.mean())})
    return rows


def by_document(
    nll: Float[ArrayLike, " N"], tokens: Shaped[ArrayLike, " M"], end: int | None
) -> list[dict[str, float | int]]:
    """Mean loss of each document, its own end included; `tokens` with the first, which has no loss."""
    if end is None:
        raise ValueError("the data is one running text: there are no documents to tell apart")
    nll, document = np.asarray(nll, np.float64), np.cumsum(np.asarray(tokens)[:-1] == end)
    counts, totals = np.bincount(document), np.bincount(document, weights=nll)
    sums = [(int(count), float(total)) for count, total in zip(counts, totals) if count]
    return [{"document": n, "tokens": count, "loss": total / count} for n, (count, total) in enumerate(sums)]
