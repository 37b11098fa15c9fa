"""Layers that blocks are made of: head-wise norm and projection, causal convolution, gated feed-forward."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from .initializers import small_init, wang_init


class HeadNorm(nnx.Module):
    """LayerNorm of each head on its own (GroupNorm over heads), with one scale a feature and no bias."""

    def __init__(self, features: int, num_heads: int, *, epsilon: float = 1e-5, param_dtype=jnp.float32):
        self.num_heads, self.epsilon = num_heads, epsilon
        self.scale = nnx.Param(jnp.ones(features, param_dtype))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Statistics in float32 or wider."""
        h = x.reshape(*x.shape[:-1], self.num_heads, -1).astype(jnp.promote_types(x.dtype, jnp.float32))
        h = jax.nn.standardize(h, axis=-1, epsilon=self.epsilon).reshape(x.shape)
        return (h * self.scale[None, None]).astype(x.dtype)


class HeadwiseLinear(nnx.Module):
    """A linear map that is block-diagonal with `num_heads` blocks: kernel (H, E_in, E_out)."""

    def __init__(self, features: int, num_heads: int, *, kernel_init, dtype=None, param_dtype=jnp.float32, rngs):
        if num_heads < 1 or features % num_heads:
            raise ValueError(f"{num_heads} blocks must divide the width {features}")
        E = features // num_heads
        self.dtype = dtype
        self.kernel = nnx.Param(kernel_init(rngs.params(), (num_heads, E, E), param_dtype))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        dtype = self.dtype or x.dtype
        H, E, _ = self.kernel.shape
        if H == 1:
            return x.astype(dtype) @ self.kernel[0].astype(dtype)
        y = jnp.einsum("bthe,hef->bthf", x.astype(dtype).reshape(*x.shape[:-1], H, E), self.kernel[...].astype(dtype))
        return y.reshape(x.shape)


class CausalConv(nnx.Module):
    """Depthwise convolution over the last `width` valid steps of a sequence: kernel (width, D), oldest tap first.

    A False mask takes a step out of the window as if it were not there; a reset empties the window.
    The state is the last width - 1 valid inputs, oldest first.
    """

    def __init__(self, features: int, width: int = 4, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        if width < 1:
            raise ValueError(f"the convolution's width is {width}: at least 1 is needed")
        self.width, self.features, self.dtype, self.param_dtype = width, features, dtype, param_dtype
        bound = 1 / math.sqrt(width)  # torch's default, in which the papers' models were trained
        uniform = lambda shape: jax.random.uniform(rngs.params(), shape, param_dtype, -bound, bound)  # noqa: E731
        self.kernel, self.bias = nnx.Param(uniform((width, features))), nnx.Param(uniform((features,)))

    def initial_state(self, batch_size: int) -> Float[Array, "B W D"]:
        """An empty window."""
        dtype = jnp.promote_types(self.param_dtype, jnp.float32)
        return jnp.zeros((batch_size, self.width - 1, self.features), dtype)

    def __call__(
        self,
        xs: Float[Array, "B T D"],
        state: Float[Array, "B W D"],
        mask: Bool[Array, "B T"] | None = None,
        reset: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B W D"]]:
        """xs (B, T, D) to the convolution at each step and the window after the last."""
        T, W = xs.shape[1], self.width - 1
        dtype = self.dtype or xs.dtype
        segment = None if reset is None else jnp.cumsum(reset, axis=1)
        last_segment = None if segment is None else segment[:, -1:]
        if mask is not None:  # bring the valid steps of each row to its front, in order, and take them back at the end
            order = jnp.argsort(~mask, axis=1, stable=True)
            place = jnp.argsort(order, axis=1)
            xs = jnp.take_along_axis(xs, order[..., None], axis=1)
            segment = None if segment is None else jnp.take_along_axis(segment, order, axis=1)
        window = jnp.concatenate([state, xs.astype(state.dtype)], axis=1)
        kernel = self.kernel[...].astype(dtype)
        ys = jnp.broadcast_to(self.bias[...].astype(dtype), xs.shape)
        if segment is not None:
            segment = jnp.concatenate([jnp.zeros_like(segment, shape=(xs.shape[0], W)), segment], axis=1)
        for tap in range(self.width):
            x = window[:, tap : tap + T].astype(dtype)
            if segment is not None:
                x = jnp.where((segment[:, tap : tap + T] == segment[:, W:])[..., None], x, 0)
            ys = ys + x * kernel[tap][None, None]
        if mask is None:
            state = window[:, T:]
        else:
            ys = jnp.take_along_axis(ys, place[..., None], axis=1)
            # the W entries of the window that end at the last valid step
            last = mask.sum(axis=1)[:, None] + jnp.arange(W)[None]
            state = jnp.take_along_axis(window, last[..., None], axis=1)
            segment = None if segment is None else jnp.take_along_axis(segment, last, axis=1)
        if segment is not None:
            state = jnp.where((segment[:, -W:] == last_segment)[..., None], state, 0) if W else state
        return ys, state


class GatedFeedForward(nnx.Module):
    """down(activation(gate) * up), [gate, up] = up_projection(x)."""

    def __init__(self, features, hidden, *, activation, num_blocks=1, dtype=None, param_dtype=jnp.float32, rngs):
        self.activation = activation
        shared = dict(use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.up = nnx.Linear(features, 2 * hidden, kernel_init=small_init(features), **shared)
        self.down = nnx.Linear(hidden, features, kernel_init=wang_init(features, num_blocks), **shared)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate, up = jnp.split(self.up(x), 2, axis=-1)
        return self.down(self.activation(gate) * up)


def round_up(width: float, multiple: int = 64) -> int:
    """The published models round inner widths up to a multiple of 64."""
    return math.ceil(width / multiple) * multiple
