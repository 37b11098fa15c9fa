"""Models for tasks: one answer a step (`Tagger`, of real inputs `FeatureTagger`), one a sequence (`Classifier`)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from ..cells.arguments import check_array, check_flags, check_tokens
from ..cells.base import Cell, masked
from ..initializers import Initializer, small_init
from ..kernels import local
from ..layers import Norm, logits
from ..names import unknown
from ..regularizers import check_rates, dropout, locked_scale, split
from ..sharding import gathered
from .backbone import BARE
from .backbone import backbone as make_backbone

NORMS = {"layer": {}, "rms": dict(mean=False), "rms_bias": dict(mean=False, use_bias=True), "none": None}


def output_norm(
    name: str | None,
    backbone: str,
    dim: int,
    epsilon: float | int | None = None,
    scale: float | int = 1.0,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
) -> Norm | None:
    """The norm after a backbone: "layer", "rms", "rms_bias" or "none"; the published models' where not given.

    That is "rms" after "xlstm_large" and "transformer", else "layer", with an epsilon of 1e-6 and 1e-5. scale: where
    the norm's starts.
    """
    name = name or ("rms" if backbone in ("xlstm_large", "transformer") else "layer")
    if name not in NORMS:
        raise ValueError(unknown("final_norm", name, NORMS))
    if NORMS[name] is None:
        return None
    residual = backbone.startswith("xlstm") and name == "layer"
    epsilon = (1e-5 if name == "layer" else 1e-6) if epsilon is None else epsilon
    options = dict(residual=residual, scale=scale, dtype=dtype, param_dtype=param_dtype) | NORMS[name]
    return Norm(dim, epsilon=epsilon, **options)


class Tagger(Cell):
    """Embedding, backbone, norm, linear head: tokens (B, T) to logits (B, T, num_classes)."""

    def __init__(
        self,
        vocab_size: int,
        num_classes: int,
        *,
        backbone: str,
        dim: int,
        num_layers: int,
        embedding_dim: int | None = None,
        final_norm: str | None = None,
        norm_eps: float | int | None = None,
        norm_scale: float | int = 1.0,
        head_init: Initializer | None = None,
        dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **options,
    ):
        """embedding_dim: if not `dim` (bare cells only); options: of the backbone's cells or mixers.

        embedding_dropout: of whole tokens of the vocabulary, the same in all rows and steps (Merity et al. 2017,
        arXiv:1708.02182, section 4.3); a head tied to the embedding sees all of them.
        final_norm, norm_eps, norm_scale: see `output_norm`; norm_eps is of all norms of "xlstm_large".
        """
        check_rates(dropout=dropout, embedding_dropout=embedding_dropout)
        embedding_dim = embedding_dim or dim
        self.vocab_size, self.num_classes = vocab_size, num_classes
        self.dropout, self.embedding_dropout = dropout, embedding_dropout
        shared = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.embedding = nnx.Embed(vocab_size, embedding_dim, embedding_init=small_init(embedding_dim), **shared)
        widths = dict(in_features=embedding_dim, dropout=dropout)
        self.norm = output_norm(final_norm, backbone, dim, norm_eps, norm_scale, dtype, param_dtype)
        if norm_eps is not None and backbone == "xlstm_large":
            options["norm_eps"] = norm_eps
        self.backbone = make_backbone(backbone, dim, num_layers, **widths, **shared, **options)
        self.head = nnx.Linear(dim, num_classes, use_bias=False, kernel_init=head_init or small_init(dim), **shared)

    def input_shape(self, xs: Any) -> tuple[int | str, ...]:
        return ()

    def initial_state(self, batch_size: int) -> Any:
        """The backbone's."""
        return self.backbone.initial_state(batch_size)

    def hidden(self, tokens, state, mask, reset, *, key=None) -> tuple[Float[Array, "B T D"], Any]:
        """What the backbone gives, and the last state."""
        check_array("tokens", tokens, "BT", (), jnp.integer)
        check_flags(tokens, mask, reset)
        check_tokens(tokens, mask, self.vocab_size)
        keys = split(key, 3)
        xs = gathered(self.embedding)(tokens)
        if key is not None and self.embedding_dropout:
            own = jax.random.fold_in(keys[0], 1)  # models without it draw as they did before there was any
            xs = xs * locked_scale((self.vocab_size, 1), self.embedding_dropout, own, xs.dtype)[tokens]
        xs = dropout(local.activations(xs), self.dropout, keys[0])
        return self.backbone(xs, state, mask, reset, key=keys[1])

    def features(self, ys: Float[Array, "B T D"], *, key=None) -> Float[Array, "B T D"]:
        """What the head reads."""
        ys = ys if self.norm is None else self.norm(ys)
        return dropout(ys, self.dropout, split(key, 3)[2])

    def answers(self, ys: Float[Array, "B T D"], mask=None, *, key=None) -> Float[Array, "B T C"]:
        """From what the backbone gives to float32 (or wider) logits, zero where masked."""
        logits = self.logits(local.activations(self.features(ys, key=key), "tensor"))
        return masked(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), mask)

    def __call__(
        self,
        tokens: Int[Array, "B T"] | Float[Array, "B T F"],
        state: Any = None,
        mask: Bool[Array, "B T"] | None = None,
        reset: Bool[Array, "B T"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T C"], Any]:
        """tokens (B, T) to float32 (or wider) logits, zero where masked, and the last state."""
        ys, state = self.hidden(tokens, state, mask, reset, key=key)
        return self.answers(ys, mask, key=key), state

    def logits(self, xs: Float[Array, "*B D"]) -> Float[Array, "*B C"]:
        """The head, float32 or wider."""
        head = gathered(self.head)
        ys = logits(xs, head.kernel[...], head.dtype)
        return ys if head.bias is None else ys + head.bias[...].astype(ys.dtype).reshape(*(1,) * (ys.ndim - 1), -1)


class FeatureTagger(Tagger):
    """Real inputs xs (B, T, in_features) to outputs (B, T, num_classes): a linear map in place of the embedding.

    Bare cells read xs as it is, unless `embedding_dim` is given. The head has a bias.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        backbone: str,
        dim: int,
        embedding_dim: int | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **options,
    ):
        if options.get("embedding_dropout"):
            raise ValueError("embedding_dropout is for tokens; real inputs have no embedding")
        width = embedding_dim or (in_features if backbone in BARE else dim)
        shared = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        super().__init__(1, num_classes, backbone=backbone, dim=dim, embedding_dim=width, **shared, **options)
        self.in_features = in_features
        del self.embedding, self.head
        reads_all = embedding_dim is None and backbone in BARE
        self.embedding = None if reads_all else nnx.Linear(in_features, width, **shared)
        self.head = nnx.Linear(dim, num_classes, kernel_init=small_init(dim), **shared)

    def input_shape(self, xs: Any) -> tuple[int | str, ...]:
        return (self.in_features,)

    def hidden(self, xs, state, mask, reset, *, key=None) -> tuple[Float[Array, "B T D"], Any]:
        """What the backbone gives, and the last state."""
        check_array("xs", xs, "BT", (self.in_features,))
        check_flags(xs, mask, reset)
        keys = split(key, 3)
        if self.embedding is not None:
            xs = dropout(self.embedding(xs), self.dropout, keys[0])
        return self.backbone(xs, state, mask, reset, key=keys[1])


class BlockStack(Cell):
    """Backbone and norm alone: xs (B, T, D) to features (B, T, D), as NX-AI's xLSTMBlockStack."""

    def __init__(
        self,
        *,
        backbone: str,
        dim: int,
        num_layers: int,
        final_norm: str | None = None,
        dropout: float = 0.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **options,
    ):
        """options: of the backbone's cells or mixers."""
        check_rates(dropout=dropout)
        shared = dict(dtype=dtype, param_dtype=param_dtype)
        self.backbone = make_backbone(backbone, dim, num_layers, dropout=dropout, rngs=rngs, **shared, **options)
        self.norm = output_norm(final_norm, backbone, dim, **shared)

    def initial_state(self, batch_size: int) -> Any:
        """The backbone's."""
        return self.backbone.initial_state(batch_size)

    def __call__(
        self,
        xs: Float[Array, "B T D"],
        state: Any = None,
        mask: Bool[Array, "B T"] | None = None,
        reset: Bool[Array, "B T"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """xs (B, T, D) to outputs (B, T, D), zero where masked, and the last state."""
        xs, state = self.backbone(xs, state, mask, reset, key=key)
        return (xs if self.norm is None else masked(self.norm(xs), mask)), state


class Classifier(Tagger):
    """One answer a sequence, from its last valid step (`pool="last"`) or the mean of its valid steps (`"mean"`)."""

    def __init__(self, vocab_size: int, num_classes: int, *, pool: str = "last", **options):
        if pool not in ("last", "mean"):
            raise ValueError(f"pool must be 'last' or 'mean', not {pool!r}")
        super().__init__(vocab_size, num_classes, **options)
        self.pool = pool

    def __call__(self, tokens, state=None, mask=None, reset=None, *, key=None):
        """tokens (B, T) to logits (B, num_classes) and the last state; a row without a valid step has zero features."""
        ys, state = self.hidden(tokens, state, mask, reset, key=key)
        xs = self.features(ys, key=key)
        valid = jnp.ones(tokens.shape, bool) if mask is None else mask
        if self.pool == "last":
            last = jnp.max(jnp.where(valid, jnp.arange(tokens.shape[1])[None], -1), axis=1)
            weights = jax.nn.one_hot(last, tokens.shape[1], dtype=xs.dtype)
        else:
            weights = valid / jnp.maximum(valid.sum(axis=1, keepdims=True), 1)
        logits = self.logits(jnp.einsum("btd,bt->bd", xs, weights.astype(xs.dtype)))
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), state

    @property
    def has_step(self) -> bool:
        """No: the answer is that of a whole sequence."""
        return False
