"""Convolutional cells: the products of LSTM and GRU become convolutions over 1, 2 or 3 axes of space.

ConvLSTM   Shi et al. 2015, arXiv:1506.04214, eq. 3: any LSTM of `lstm.py` whose W x and R h are convolutions
ConvGRU    Ballas et al. 2016, arXiv:1511.06432, eqs. 5-8: the GRU with the reset before the convolution

Inputs (B, T, *space, C_in), h and c (B, *space', D). The input's convolution has any stride, any dilation and padding
"same" or "valid", which set space'; the recurrent one has stride 1 and padding "same".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..initializers import per_gate
from ..kernels.choice import target
from ..kernels.rules import Maps
from .arguments import is_integer
from .gru import GRU
from .lstm import LSTM


class Window(NamedTuple):
    """How a kernel goes over its inputs."""

    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: str


@dataclass(frozen=True)
class Convolution(Maps):
    """The linear maps of a convolutional cell: W (*kernel, C_in, G, D) and R (*kernel, D, G, D)."""

    window: Window  # of the inputs

    def project(self, xs: Float[Array, "T B ..."], W: Array, dtype: DTypeLike) -> Float[Array, "T B ..."]:
        """The input's share of all gates of all steps (T, B, *space', G, D)."""
        return convolve(xs, W, dtype, self.window)

    def product(self, h: Float[Array, "..."], R: Array) -> Float[Array, "..."]:
        """h (*M, *space, D) to (*M, *space, G, D)."""
        ones = (1,) * len(self.window.strides)
        return convolve(h, R, h.dtype, Window(ones, ones, "same"))

    def copies(self, kernel: Array) -> int:
        """On a CPU one a tap."""
        return math.prod(kernel.shape[: len(self.window.strides)]) if target().platform == "cpu" else 0


def convolve(x: Array, kernel: Array, dtype: DTypeLike, window: Window) -> Array:
    """x (*M, *space, C), kernel (*k, C, G, D) to (*M, *space', G, D): in the kernel's dtype, summed in `dtype`."""
    rank = len(window.strides)
    *size, C, G, D = kernel.shape
    lead, space = x.shape[: -rank - 1], x.shape[-rank - 1 : -1]
    x = x.astype(kernel.dtype).reshape(math.prod(lead), *space, C)
    run = _convolution_on_cpu if target().platform == "cpu" else _convolution
    y = run(x, kernel.reshape(*size, C, G * D), dtype, window)
    return y.reshape(*lead, *y.shape[1:-1], G, D)


def _convolution(x, kernel, dtype, window):
    """x (N, *space, C), kernel (*k, C, O) to (N, *space', O)."""
    letters = "DHW"[3 - len(window.strides) :]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window.strides,
        window.padding.upper(),
        rhs_dilation=window.dilation,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        preferred_element_type=dtype,
    )


def _by_taps(x, kernel, dtype, window):
    """The same as a sum of one product a tap."""
    *size, _, _ = kernel.shape
    space, (strides, dilation, padding) = x.shape[1:-1], window
    reach = [(k - 1) * d + 1 for k, d in zip(size, dilation)]
    x = jnp.pad(x, [(0, 0), *jax.lax.padtype_to_pads(space, reach, strides, padding.upper()), (0, 0)])
    last = [(n - r) // s * s for n, r, s in zip(x.shape[1:-1], reach, strides)]

    def product(tap):
        cut = [slice(i * d, i * d + n + 1, s) for i, d, n, s in zip(tap, dilation, last, strides)]
        return jnp.matmul(x[:, *cut], kernel[tap], preferred_element_type=dtype)

    return sum(map(product, np.ndindex(*size)))


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _convolution_on_cpu(x, kernel, dtype, window):
    """The kernel's gradient is that of `_by_taps`: XLA's, in a loop on a CPU, is far slower."""
    return _convolution(x, kernel, dtype, window)


@partial(_convolution_on_cpu.defjvp, symbolic_zeros=True)
def _convolution_jvp(dtype, window, primals, tangents):
    (x, kernel), (dx, d_kernel) = primals, tangents
    dy = [] if isinstance(dx, SymbolicZero) else [_convolution(dx, kernel, dtype, window)]
    dy += [] if isinstance(d_kernel, SymbolicZero) else [_by_taps(x, d_kernel, dtype, window)]
    return _convolution_on_cpu(x, kernel, dtype, window), reduce(jnp.add, dy)


class ConvCell:
    """What makes a dense cell convolutional; to be named before the cell in the bases."""

    by_position = False  # whether there are parameters for each position, which fix the size of the inputs

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel_size: int | Sequence[int],
        *,
        rank: int | None = None,
        strides: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        padding: str = "same",
        space: Sequence[int] | None = None,
        **options,
    ):
        """kernel_size: a number for each axis of space, or one number and the `rank` (2 if not given).

        space: the size of the inputs, which `initial_state` needs where it is not called with one.
        """
        n = len(kernel_size) if np.iterable(kernel_size) else rank or 2
        if n not in (1, 2, 3) or rank not in (None, n):
            raise ValueError(f"kernel_size={kernel_size}, rank={rank}: one number an axis of space, of 1 to 3 axes")
        self.kernel_size = per_axis("kernel_size", kernel_size, n)
        if options.get("num_heads", 1) != 1 or options.get("projection") or options.get("layer_norm"):
            raise ValueError("a convolutional cell has neither heads nor a projection nor layer_norm")
        if options.get("gate_recurrence"):
            raise ValueError("a convolutional cell has no gate_recurrence")
        self.strides, self.dilation = per_axis("strides", strides, n), per_axis("dilation", dilation, n)
        if padding not in ("same", "valid"):
            raise ValueError(f"padding must be 'same' or 'valid', not {padding!r}")
        self.padding, self.space = padding, None if space is None else per_axis("space", space, n)
        self.maps = Convolution(Window(self.strides, self.dilation, padding))
        super().__init__(in_features, features, **options)

    def make_matrices(self, kernel_init, recurrent_init, key):
        """W (*kernel, C_in, G, D), R (*kernel, D, G, D) and S (*kernel, D, 1, D)."""
        keys, D = jax.random.split(key, 3), self.features

        def kernel(init, key, C, G):
            return nnx.Param(per_gate(init, key, (*self.kernel_size, C, G, D), self.param_dtype))

        self.W = kernel(kernel_init, keys[0], self.in_features, len(self.gates))
        self.R = kernel(recurrent_init, keys[1], D, len(self.recurrent_gates or self.gates))
        self.S = kernel(recurrent_init, keys[2], D, 1) if self.inner_shape else None

    def as_gate(self, a):
        """A parameter (D,), or (*space, D), with the rank of a gate (B, *space, D)."""
        return a.astype(self.state_dtype).reshape((1,) * (2 + len(self.kernel_size) - a.ndim) + a.shape)

    def input_shape(self, xs):
        """xs after (B, T); any space of the right number of axes."""
        n = len(self.kernel_size)
        free = jnp.shape(xs)[2:-1] if jnp.ndim(xs) == 3 + n else ("space",) * n
        return (*(self.space if self.by_position else free), self.in_features)

    def initial_state(self, batch_size: int, space: Sequence[int] | None = None):
        """The empty state for inputs of the size `space`: zeros (B, *space', D)."""
        space = self.space if space is None else per_axis("space", space, len(self.kernel_size))
        if space is None:
            raise ValueError(
                "the size of the inputs is not known: initial_state(batch_size, space), or space= at the start"
            )
        size = []
        for width, kernel, stride, dilation in zip(space, self.kernel_size, self.strides, self.dilation):
            extent = dilation * (kernel - 1) + 1
            if self.padding == "valid" and extent > width:
                raise ValueError(
                    f"a kernel of extent {extent} (kernel_size={kernel}, dilation={dilation}) is wider than "
                    f"the input's {width} with padding='valid'; padding='same' would fit"
                )
            size.append(-(-(width if self.padding == "same" else width - extent + 1) // stride))
        shape = (batch_size, *size, self.features)
        return self.State(*(jnp.zeros(shape, self.state_dtype) for _ in self.State._fields))

    def empty_state(self, xs):
        """The empty state that fits xs, of any size."""
        return self.initial_state(xs.shape[0], xs.shape[2:-1])


def per_axis(name: str, value: Any, n: int) -> tuple[int, ...]:
    """One positive integer an axis."""
    values = tuple(value) if np.iterable(value) else (value,) * n
    if len(values) != n or not all(map(is_integer, values)):
        raise ValueError(f"{name} is {value!r}: wanted is a positive integer, or {n} of them, one an axis of space")
    return tuple(map(int, values))


class ConvLSTM(ConvCell, LSTM):
    """ConvLSTM over 1, 2 or 3 axes; all of LSTM's options but heads, projection, layer norm and full gate recurrence.

    peephole: True for one weight a channel, so that images may have any size, or "position" for one a channel and
    position as in the paper, which fixes the size (`space`).
    """

    def __init__(self, in_features: int, features: int, kernel_size, *, peephole: bool | str = False, **options):
        if peephole not in (False, True, "position"):
            raise ValueError(f"peephole must be False, True or 'position', not {peephole!r}")
        self.by_position = peephole == "position"
        super().__init__(in_features, features, kernel_size, peephole=bool(peephole), **options)

    def peephole_shape(self):
        return self.initial_state(1).c.shape[1:] if self.by_position else super().peephole_shape()


class ConvGRU(ConvCell, GRU):
    """ConvGRU over 1, 2 or 3 axes; the reset acts before the convolution unless `reset_after=True`."""

    def __init__(self, in_features: int, features: int, kernel_size, *, reset_after: bool = False, **options):
        super().__init__(in_features, features, kernel_size, reset_after=reset_after, **options)
