"""Language model: a Tagger whose classes are its own vocabulary, with tied or separate output weights."""

from jaxtyping import Array, Float

from .sequence import Tagger


class LM(Tagger):
    """tokens (B, T) to the logits (B, T, vocab_size) of the next token."""

    def __init__(self, vocab_size: int, *, tie_weights: bool = False, **options):
        super().__init__(vocab_size, vocab_size, **options)
        self.tie_weights = tie_weights
        if tie_weights:
            del self.head

    def logits(self, xs: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """By the head, or by the embedding where tied."""
        return self.embedding.attend(xs) if self.tie_weights else self.head(xs)
