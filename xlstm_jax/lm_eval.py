"""A language model of this package in lm-evaluation-harness (the package lm_eval, needed by `harness_model` alone).

    model = harness_model(lm, tokenizer)                        # registered there as "xlstm_jax"
    lm_eval.simple_evaluate(model=model, tasks=["lambada_openai"])

Contexts of any length are read from their first token on; nothing is cut off. Text is conditioned on the tokenizer's
end token where a request gives no context to score it in; on a line end where the tokenizer has none, or to generate.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from .data.tokenizers import Tokenizer
from .evaluate import row_scores
from .generate import GREEDY, Sampling
from .models import LM
from .names import unknown
from .text import check_vocabulary, continuations

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
KNOWN = ("until", "max_gen_toks", "do_sample", *SAMPLING)


class Adapter:
    """The three kinds of request; a request has `args`, a pair or one text."""

    def __init__(
        self,
        model: LM,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 8,
        chunk: int = 256,
        max_gen_toks: int = 256,
        seed: int = 0,
    ):
        """batch_size, chunk: as in `evaluate.row_scores`; max_gen_toks: where a request says none; seed: of draws."""
        check_vocabulary(model, tokenizer)
        self.model, self.coder, self.batch_size, self.chunk = model, tokenizer, batch_size, chunk
        self.max_gen_toks, self.seed = max_gen_toks, seed
        self.prefix = tokenizer.encode("\n")[-1:] if tokenizer.end is None else np.array([tokenizer.end], np.int32)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): log p of the continuation, and whether it is the likeliest throughout."""
        pairs = [self.pair(*request.args) for request in requests]
        return [
            (-float(nll[start:].sum(dtype=np.float64)), bool(likeliest[start:].all()))
            for (_, start), (nll, likeliest) in zip(pairs, self.scores([row for row, _ in pairs]))
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text, of any length."""
        rows = [np.concatenate([self.prefix, self.coder.encode(request.args[0])]) for request in requests]
        return [-float(nll.sum(dtype=np.float64)) for nll, _ in self.scores(rows)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """For each (context, arguments) the text that follows, up to the first of `until`; those alike in one batch."""
        groups: dict[Any, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(self.settings(request.args[1]), []).append(number)
        answers = [""] * len(requests)
        for (until, length, sampling), numbers in groups.items():
            for first in range(0, len(numbers), self.batch_size):
                batch = numbers[first : first + self.batch_size]
                prompts = [requests[number].args[0] or "\n" for number in batch]
                key = jax.random.fold_in(jax.random.key(self.seed), batch[0])
                *_, texts = continuations(self.model, self.coder, prompts, length, key, sampling, stop=until)
                for number, text in zip(batch, texts):
                    answers[number] = text
        return answers

    def settings(self, arguments: dict[str, Any]) -> tuple[tuple[str, ...], int, Sampling]:
        """Where a text ends, how long it may be, and how tokens are chosen: greedily unless do_sample says not."""
        wrong = [name for name in arguments if name not in KNOWN]
        if wrong:
            raise ValueError(unknown("generation argument", wrong[0], KNOWN))
        until = arguments.get("until") or ()
        until = tuple(filter(None, [until] if isinstance(until, str) else until))
        given = {name: arguments[name] for name in SAMPLING if arguments.get(name) is not None}
        draws = arguments.get("do_sample", given.get("temperature", 0) > 0) and given.get("temperature", 1) > 0
        if draws:
            sampling = Sampling(**given)
        else:
            penalty = given.get("repetition_penalty", 1.0)
            sampling = Sampling(repetition_penalty=penalty, temperature=GREEDY.temperature)
        return until, int(arguments.get("max_gen_toks") or self.max_gen_toks), sampling

    def pair(self, context: str, continuation: str) -> tuple[np.ndarray, int]:
        """The tokens of both, and where the scores of the continuation begin; spaces between belong to it."""
        if not context:
            return np.concatenate([self.prefix, self.coder.encode(continuation)]), 0
        bare = context.rstrip()
        whole = self.coder.encode(context + continuation)
        inside = len(self.coder.encode(bare)) if bare else 0
        return (whole, inside - 1) if inside else (np.concatenate([self.prefix, whole]), 0)

    def scores(self, rows: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """`row_scores` in batches of like lengths, in the order of the rows."""
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
        options = dict(batch_size=self.batch_size, chunk=self.chunk)
        found = dict(zip(order, row_scores(self.model, [rows[number] for number in order], **options)))
        return [found[number] for number in range(len(rows))]


@functools.cache
def harness_class() -> type:
    """The class that lm_eval knows as "xlstm_jax"."""
    try:
        from lm_eval.api.model import LM as Base
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise ValueError(f"lm-evaluation-harness is missing ({error}): pip install lm_eval") from None

    @register_model("xlstm_jax")
    class Harness(Adapter, Base):
        """`Adapter` with what the harness's base class adds."""

        def __init__(self, model: LM, tokenizer: Tokenizer, **options: Any):
            Base.__init__(self)
            Adapter.__init__(self, model, tokenizer, **options)

    return Harness


def harness_model(model: LM, tokenizer: Tokenizer, **options: Any) -> Any:
    """A model for lm_eval.simple_evaluate(model=...); options are those of `Adapter`."""
    return harness_class()(model, tokenizer, **options)
