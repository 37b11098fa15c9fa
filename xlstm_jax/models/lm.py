"""Language model: a Tagger whose classes are its own vocabulary, with tied or separate output weights."""

from jax.nn.initializers import normal
from jaxtyping import Array, Float

from ..layers import logits, soft_cap
from ..sharding import gathered
from .sequence import Tagger


class LM(Tagger):
    """tokens (B, T) to the logits (B, T, vocab_size) of the next token, soft-capped at +-logit_cap if that is given.

    Embeddings start as published, N(0, 2 / (5 D)). A head that started so too would give logits of variance 0.4, and
    tied to the embedding one of order sqrt(D) to the token just read; so a separate head starts with the standard
    deviation 1 / D, and where tied the scale of the final norm starts at (0.4 D)^-1/2: the loss is then near log V.
    """

    def __init__(self, vocab_size: int, *, tie_weights: bool = False, logit_cap: float | int | None = None, **options):
        dim = max(options.get("dim", 1), 1)
        start = dict(norm_scale=(0.4 * dim) ** -0.5) if tie_weights else dict(head_init=normal(1 / dim))
        super().__init__(vocab_size, vocab_size, **start | options)
        self.tie_weights, self.logit_cap = tie_weights, logit_cap
        if tie_weights:
            if self.embedding.features != dim:
                raise ValueError(f"tie_weights=True needs embedding_dim={self.embedding.features} to be dim={dim}")
            del self.head

    def logits(self, xs: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """By the head, or by the embedding where tied."""
        if not self.tie_weights:
            return soft_cap(super().logits(xs), self.logit_cap)
        embedding = gathered(self.embedding)
        return soft_cap(logits(xs, embedding.embedding[...].T, embedding.dtype), self.logit_cap)
