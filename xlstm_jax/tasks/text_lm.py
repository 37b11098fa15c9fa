"""Language modelling on any corpus of `data.lookup` by any tokeniser of `data.tokenizers`: which token comes next?"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from xlstm_jax.data import lookup, tokens
from xlstm_jax.data.tokenizers import Tokenizer
from xlstm_jax.tasks.byte_lm import LARGEST, ByteLM, register
from xlstm_jax.tasks.task import SPLITS, split_index


@dataclass(frozen=True, eq=False)
class TextLM(ByteLM):
    """As `ByteLM`, over tokens: the same streams, windows and evaluation, each target of a split asked for once.

    "In the beginning" by words -> inputs In _the, targets _the _beginning.

    Running text is tokenised split by split. Documents stand between end tokens (`data.tokens`): an end as input
    resets the state, its target is the document's first token, and every document's end is a target.
    """

    tokenizer: str = "bytes"
    data_dir: str = ""  # of the look-up; "": its default
    data: Shaped[Array, " N"] = field(init=False, repr=False)  # train, valid, and test where it is not valid
    vocab_size: int = field(init=False)
    coder: Tokenizer = field(init=False, repr=False)
    end: int | None = field(init=False, repr=False)  # the id between documents, None in running text
    spans: tuple[tuple[int, int], ...] = field(init=False, repr=False)  # of the targets of each split
    num_bytes: tuple[int, ...] = field(init=False, repr=False)  # of the text of each split, 0 where it is not known

    name: ClassVar[str] = "text_lm"

    def _read(self):
        corpus = lookup.load(self.corpus, self.data_dir or None)
        coder = tokens.tokenizer_for(corpus, self.tokenizer)
        files = tokens.tokenise(corpus, coder)
        parts, starts, size = [], {}, 0
        for file in files.values():
            if file.path not in starts:
                starts[file.path] = size
                size += len(file)
                parts.append(file.tokens)
        least = self.seq_len + 1
        if len(files["train"]) < least or size > LARGEST:
            raise ValueError(
                f"{self.name}: {self.corpus} has {len(files['train'])} training tokens, {size} in all: need at least"
                f" {least} (seq_len + 1) and at most {LARGEST}; data.windows reads larger ones"
            )
        inner = 0 if corpus.whole else 1  # a document split begins with an end that is no target
        spans = [(starts[files[s].path] + inner, starts[files[s].path] + len(files[s])) for s in SPLITS]
        return {
            "data": jnp.asarray(np.concatenate(parts)),
            "data_hash": corpus.hash,
            "vocab_size": coder.vocab_size,
            "coder": coder,
            "end": files["train"].end,
            "spans": ((0, spans[0][1]), *spans[1:]),
            "num_bytes": tuple(files[split].num_bytes for split in SPLITS),
        }

    @property
    def num_classes(self) -> int:
        return self.vocab_size

    @property
    def chance(self) -> float:
        return 1 / self.vocab_size

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Loss in nats a token and its exponential; in bits where a token is a byte or a character."""
        loss = float(sums["nll"]) / float(sums["weight"])
        unit = {"bytes": "byte", "characters": "character"}.get(self.coder.kind)
        bits = {f"bits_per_{unit}": loss / math.log(2)} if unit else {}
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))} | bits

    def bounds(self, split):
        return self.spans[split_index(split)]

    def _at(self, positions, weights, reset=None):
        batch = super()._at(positions, weights, reset)
        if self.end is None:
            return batch
        begins = batch.inputs == self.end
        return batch._replace(reset=begins if reset is None else begins | reset)


register(TextLM)
