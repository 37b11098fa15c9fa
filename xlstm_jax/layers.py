"""Layers that blocks are made of: head-wise norm and projection, causal convolution, gated feed-forward."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from .initializers import small_init, wang_init
from .kernels import local
from .kernels.choice import target
from .kernels.rules import by_head
from .names import unknown


class Norm(nnx.Module):
    """Layer norm, or with `mean=False` RMS norm, of each of `num_heads` heads on its own; one scale a feature.

    scale: where it starts; residual: the parameter is its difference from 1, as NX-AI's xlstm stores it.
    """

    def __init__(
        self,
        features: int,
        num_heads: int = 1,
        *,
        mean: bool = True,
        residual: bool = False,
        use_bias: bool = False,
        epsilon: float | int = 1e-5,
        scale: float | int = 1.0,
        dtype=None,
        param_dtype=jnp.float32,
    ):
        self.num_heads, self.mean, self.residual, self.epsilon, self.dtype = num_heads, mean, residual, epsilon, dtype
        self.scale = nnx.Param(jnp.full(features, scale - residual, param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype)) if use_bias else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Statistics in float32 or wider."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        ones = (1,) * (x.ndim - 1)
        heads = (self.num_heads,) if self.num_heads > 1 else ()  # an axis of 1 costs XLA on a CPU ten times the sum
        h = x.reshape(*x.shape[:-1], *heads, -1).astype(wide)
        mean = None if self.mean else jnp.zeros((), wide)
        h = jax.nn.standardize(h, axis=-1, mean=mean, epsilon=self.epsilon, algorithm="stable")
        h = h.reshape(x.shape) * (self.scale[...].astype(wide) + self.residual).reshape(*ones, -1)
        if self.bias is not None:
            h = h + self.bias[...].astype(wide).reshape(*ones, -1)
        return h.astype(self.dtype or x.dtype)


def few_outputs(x: Float[Array, "B T D"], kernel: Float[Array, "D G N"]) -> Float[Array, "B T G N"]:
    """x times a kernel whose G and N are small.

    On a CPU the gradient of the kernel is summed with D last, which is far faster; the barrier keeps it so.
    """
    axis = 0
    if target().platform == "cpu":
        axis, kernel = 2, jax.lax.optimization_barrier(jnp.moveaxis(kernel, 0, 2))
    return jax.lax.dot_general(x, kernel, (((2,), (axis,)), ((), ())))


class HeadwiseLinear(nnx.Module):
    """A linear map that is block-diagonal with `num_heads` blocks: kernel (H, E_in, E_out)."""

    def __init__(
        self, features: int, num_heads: int, *, kernel_init, use_bias=False, dtype=None, param_dtype=jnp.float32, rngs
    ):
        if num_heads < 1 or features % num_heads:
            raise ValueError(f"{num_heads} blocks must divide the width {features}")
        E = features // num_heads
        self.dtype = dtype
        self.kernel = nnx.Param(kernel_init(rngs.params(), (num_heads, E, E), param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype)) if use_bias else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        dtype = self.dtype or x.dtype
        x, kernel = x.astype(dtype), self.kernel[...].astype(dtype)
        if target().platform == "cpu":
            kernel = wider_blocks(kernel)
        H = kernel.shape[0]
        if H == 1:
            y = x @ kernel[0]
        else:
            y = jnp.swapaxes(jnp.matmul(by_head(x, H), kernel), 0, 1).reshape(x.shape)
        return y if self.bias is None else y + self.bias[...].astype(dtype)[None, None]


WIDTH = 16  # numbers in a cache line, of float32


def wider_blocks(kernel: Float[Array, "H E F"]) -> Float[Array, "joined in out"]:
    """Blocks joined up to `WIDTH` where their number divides so, the same map with zeros between them.

    The copies of x into another order of axes, which take longer than the products, then move whole cache lines.
    """
    H, E, F = kernel.shape
    count = math.gcd(H, -(-WIDTH // E))
    eye = jnp.eye(count, dtype=kernel.dtype)[None, :, None, :, None]
    return (kernel.reshape(-1, count, E, 1, F) * eye).reshape(-1, count * E, count * F) if count > 1 else kernel


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
    """down(activation(gate) * up), [gate, up] = up_projection(x); the activation by its name in `ACTIVATIONS`."""

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        activation: str,
        num_blocks: int = 1,
        use_bias: bool = False,
        dtype=None,
        param_dtype=jnp.float32,
        rngs,
    ):
        if activation not in ACTIVATIONS:
            raise ValueError(unknown("activation", activation, ACTIVATIONS))
        self.activation, self.hidden = activation, hidden
        shared = dict(use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.up = nnx.Linear(features, 2 * hidden, kernel_init=small_init(features), **shared)
        self.down = nnx.Linear(hidden, features, kernel_init=wang_init(features, num_blocks), **shared)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate, up = local.columns(self.up, x, (self.hidden, self.hidden))
        return self.down(ACTIVATIONS[self.activation](gate) * up)


ACTIVATIONS = {
    "gelu": partial(jax.nn.gelu, approximate=False),  # the published feed-forward part uses erf
    "relu": jax.nn.relu,
    "relu^2": lambda x: jnp.square(jax.nn.relu(x)),
    "sigmoid": jax.nn.sigmoid,
    "swish": jax.nn.silu,
    "selu": jax.nn.selu,
}


def logits(xs: Float[Array, "*B D"], kernel: Float[Array, "D V"], dtype=None) -> Float[Array, "*B V"]:
    """xs kernel, multiplied in `dtype` (if given) but summed and left in float32 or wider: logits are not rounded."""
    dtype = dtype or jnp.promote_types(xs.dtype, kernel.dtype)
    return jnp.matmul(
        xs.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.promote_types(dtype, "float32")
    )


def soft_cap(x: Float[Array, "*B"], cap: float | int | None) -> Float[Array, "*B"]:
    """cap tanh(x / cap), which stays within +-cap; x itself without a cap."""
    return cap * jnp.tanh(x / cap) if cap else x


def round_up(width: float | int, multiple: int = 64) -> int:
    """The published models round inner widths up to a multiple of 64."""
    return math.ceil(width / multiple) * multiple
