"""Causal self-attention with rotary positions (Su et al. 2021) and a rolling cache, under the contract of a cell."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from .cells.arguments import check_inputs
from .cells.base import Cell, masked
from .initializers import small_init, wang_init


class AttentionState(NamedTuple):
    """The keys and values of the last `context` valid steps, which of them count, and how many steps there were."""

    k: Float[Array, "B S H K"]
    v: Float[Array, "B S H K"]
    segment: Int[Array, "B S"]  # 0: of the running sequence, -1: empty
    count: Int[Array, " B"]


def rotate(x: Float[Array, "B T H K"], position: Int[Array, "B T"], base: float = 10_000.0) -> Float[Array, "B T H K"]:
    """Rotary embedding: the pair (x_j, x_{j + K/2}) turned by position * base^(-2 j / K)."""
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=x.dtype) / half)
    angle = position[..., None, None].astype(x.dtype) * frequency[None, None, None]
    (a, b), cos, sin = jnp.split(x, 2, axis=-1), jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Attention(Cell):
    """Each step attends to the last `context` valid steps of its own sequence, itself included; any T is served.

    The last `context` keys and values are the state, so memory is bounded and a sequence may be cut anywhere.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 4,
        context: int = 512,
        num_blocks: int = 1,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features % (2 * num_heads):
            raise ValueError(f"num_heads={num_heads} must divide features={features} into heads of even width")
        self.in_features = self.features = features
        self.num_heads, self.context, self.param_dtype = num_heads, context, param_dtype
        shared = dict(use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.qkv = nnx.Linear(features, 3 * features, kernel_init=small_init(features), **shared)
        self.out = nnx.Linear(features, features, kernel_init=wang_init(features, num_blocks), **shared)

    def initial_state(self, batch_size: int) -> AttentionState:
        """An empty cache."""
        shape = (batch_size, self.context, self.num_heads, self.features // self.num_heads)
        k, v = (jnp.zeros(shape, self.state_dtype) for _ in "kv")
        return AttentionState(k, v, jnp.full(shape[:2], -1, jnp.int32), jnp.zeros(batch_size, jnp.int32))

    def __call__(
        self,
        xs: Float[Array, "B T D"],
        state: AttentionState | None = None,
        mask: Bool[Array, "B T"] | None = None,
        reset: Bool[Array, "B T"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], AttentionState]:
        """xs (B, T, D) to outputs (B, T, D) and the cache; cost T (T + context), T^2 without a state."""
        check_inputs(self, xs, state, mask, reset, key)
        B, T, D = xs.shape
        cached = state is not None
        state = state or self.initial_state(B)
        dtype = state.k.dtype
        valid = jnp.ones((B, T), bool) if mask is None else mask
        position = state.count[:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
        q, k, v = (a.reshape(B, T, self.num_heads, -1).astype(dtype) for a in jnp.split(self.qkv(xs), 3, axis=-1))
        q, k = rotate(q, position), rotate(k, position)
        segment = jnp.zeros((B, T), jnp.int32) if reset is None else jnp.cumsum(reset, axis=1, dtype=jnp.int32)
        last_segment = segment[:, -1:]

        back = jnp.arange(self.context, 0, -1, dtype=jnp.int32)[None]
        k_all, v_all = jnp.concatenate([state.k, k], axis=1), jnp.concatenate([state.v, v], axis=1)
        segment_all = jnp.concatenate([state.segment, jnp.where(valid, segment, -1)], axis=1)
        position_all = jnp.concatenate([state.count[:, None] - back, position], axis=1)
        start = 0 if cached else self.context
        distance = position[:, :, None] - position_all[:, None, start:]
        allowed = (segment_all[:, None, start:] == segment[:, :, None]) & (distance >= 0) & (distance < self.context)
        own = jnp.arange(T)[:, None] == jnp.arange(k_all.shape[1] - start)[None] - (k_all.shape[1] - start - T)
        allowed = allowed | own[None]  # a masked step sees itself alone, so that its softmax is defined
        scores = jnp.einsum("bthk,bshk->bhts", q, k_all[:, start:]) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(allowed[:, None], scores, -jnp.inf), axis=-1)
        y = jnp.einsum("bhts,bshk->bthk", weights, v_all[:, start:])
        y = masked(self.out(y.reshape(B, T, D).astype(xs.dtype)), mask)

        keep = jnp.argsort(segment_all >= 0, axis=1, stable=True)[:, -self.context :]  # the newest valid, in order
        take = lambda a: jnp.take_along_axis(a, keep.reshape(keep.shape + (1,) * (a.ndim - 2)), axis=1)  # noqa: E731
        segment_kept = take(segment_all)
        segment_kept = jnp.where(
            segment_kept == last_segment, jnp.int32(0), -1
        )  # what came before the last reset is gone
        gone = (segment_kept < 0)[..., None, None]
        k_kept, v_kept = (jnp.where(gone, 0, take(a)) for a in (k_all, v_all))
        return y, AttentionState(k_kept, v_kept, segment_kept, state.count + valid.sum(axis=1, dtype=jnp.int32))
