"""Text in, text out: prompts as strings, ends as strings, over `generate` and a tokeniser of `data.tokenizers`."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32

from .data.tokenizers import Tokenizer
from .generate import PLAIN, Sampling, beam_search, stream
from .layers import round_up
from .models import LM

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what the first bytes of a character decode to


def check_vocabulary(model: LM, tokenizer: Tokenizer) -> None:
    """The model's ids are the tokeniser's, but for a rounding up to a multiple of 64, as published models have it."""
    ours, theirs = model.vocab_size, tokenizer.vocab_size
    if ours not in (theirs, round_up(theirs, 64), round_up(theirs, 128)):
        raise ValueError(
            f"the model has {ours} tokens, tokenizer {tokenizer.name!r} {theirs}: they do not belong together"
        )


def encoded(tokenizer: Tokenizer, prompt: str | bytes) -> Int32[np.ndarray, " T"]:
    """The prompt's tokens, at least one."""
    if not prompt:
        raise ValueError("the prompt is empty: give at least one character")
    return tokenizer.encode(prompt)


def vocabulary(model: LM, tokenizer: Tokenizer) -> dict[str, Any]:
    """What `stream` and `beam_search` must know: the token that ends a text, and how many tokens have a text."""
    check_vocabulary(model, tokenizer)
    return dict(stop=() if tokenizer.end is None else (tokenizer.end,), num_tokens=tokenizer.vocab_size)


def continuations(
    model: LM,
    tokenizer: Tokenizer,
    prompts: Sequence[str | bytes],
    length: int,
    key: jax.Array | None = None,
    sampling: Sampling = PLAIN,
    *,
    stop: Sequence[str] = (),
    **options: Any,
) -> Iterator[list[str]]:
    """The texts that follow the prompts, so far, each time more tokens have come; ends when all of them have ended.

    A text ends before the first of the `stop` texts, or at the tokeniser's end token.
    """
    rows = [encoded(tokenizer, prompt) for prompt in prompts]
    blocks = stream(model, rows, length, key, sampling, **vocabulary(model, tokenizer), **options)
    return _texts(blocks, tokenizer, stop, len(rows))


def _texts(blocks, tokenizer, stop, rows):
    tokens = np.zeros((rows, 0), np.int32)
    for block in blocks:
        tokens = np.concatenate([tokens, block], axis=1)
        texts, ended = zip(*(cut(row, tokenizer, stop) for row in tokens))
        yield list(texts)
        if all(ended):
            return


def cut(tokens: Int32[np.ndarray, " T"], tokenizer: Tokenizer, stop: Sequence[str] = ()) -> tuple[str, bool]:
    """The text of the tokens, padding left out, up to the first of the stop texts; and whether it has ended."""
    text = tokenizer.decode(tokens[tokens >= 0])
    ends = [place for place in map(text.find, stop) if place >= 0]
    return (text[: min(ends)] if ends else text), bool(ends) or bool(np.any(tokens < 0))


def best(
    model: LM,
    tokenizer: Tokenizer,
    prompt: str | bytes,
    length: int,
    beams: int,
    *,
    length_penalty: float | int = 1.0,
    stop: Sequence[str] = (),
) -> list[str]:
    """The best texts that follow the prompt by beam search, best first."""
    options = dict(length_penalty=length_penalty) | vocabulary(model, tokenizer)
    found = beam_search(model, [encoded(tokenizer, prompt)], length, beams, **options)
    return [cut(row, tokenizer, stop)[0] for row in found.tokens[0]]


def settled(text: str, stop: Sequence[str] = ()) -> str:
    """What no later token can change: without a character's first bytes, and without what may begin a stop text."""
    text = text.rstrip(UNFINISHED)
    held = max((n for end in stop for n in range(1, len(end)) if text.endswith(end[:n])), default=0)
    return text[: len(text) - held]
