"""Residual blocks and their mixers, under the contract of a cell.

Block        x + mixer(norm(x)), then x + ffn(norm(x)) if there is one
MLSTMLayer   the pre-up-projection mixer of the xLSTM paper (arXiv:2405.04517, Fig. 11)
SLSTMLayer   the mixer of its post-up-projection block (Fig. 10)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from .cells.arguments import check_inputs
from .cells.base import Cell, masked
from .cells.mlstm import MLSTM, gate, pre_activations
from .cells.slstm import SLSTM, SLSTMState
from .initializers import Initializer, initializer, small_init, wang_init
from .kernels import local
from .kernels import mlstm as mlstm_kernel
from .kernels.memory import check_budget
from .layers import CausalConv, HeadwiseLinear, Norm, round_up
from .regularizers import check_rates, dropout, split


class Block(Cell):
    """Any mixer that is a cell, with norms, an optional feed-forward part and residual connections around both."""

    def __init__(
        self,
        mixer: Cell,
        *,
        norm: nnx.Module | None = None,
        ffn: nnx.Module | None = None,
        ffn_norm: nnx.Module | None = None,
        residual: bool = True,
        dropout: float = 0.0,
    ):
        self.mixer, self.norm, self.ffn, self.ffn_norm = mixer, norm, ffn, ffn_norm
        check_rates(dropout=dropout)
        self.residual, self.dropout = residual, dropout

    @property
    def has_step(self) -> bool:
        """Whether the mixer has one."""
        return self.mixer.has_step

    def input_shape(self, xs: Any) -> tuple[int | str, ...]:
        """The mixer's."""
        return self.mixer.input_shape(xs)

    def initial_state(self, batch_size: int) -> Any:
        """The mixer's."""
        return self.mixer.initial_state(batch_size)

    def __call__(
        self,
        xs: Float[Array, "B T D_in"],
        state: Any = None,
        mask: Bool[Array, "B T"] | None = None,
        reset: Bool[Array, "B T"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """xs (B, T, D) to outputs (B, T, D), zero where masked, and the mixer's last state."""
        keys = split(key, 3)
        x = xs if self.norm is None else self.norm(xs)
        y, state = self.mixer(x, state, mask, reset, key=keys[2])
        y = dropout(y, self.dropout, keys[0])
        xs = xs + y if self.residual else y
        if self.ffn is not None:
            xs = xs + dropout(self.ffn(self.ffn_norm(xs)), self.dropout, keys[1])
        return masked(xs, mask), state


class MLSTMLayerState(NamedTuple):
    memory: mlstm_kernel.MLSTMState
    window: Float[Array, "B W D"] | None


class MLSTMLayer(Cell):
    """Pre-up-projection mLSTM mixer.

    [a, z] = up(x);   c = SiLU(conv(a));   q, k of c, v of a by blocks of 4;   gates of [q, k, v]
    y = down((norm(mlstm(q, k, v)) + skip c) SiLU(z))

    `conv_width=0` leaves the convolution out: c = SiLU(a). `input_gate_of` and `forget_gate_of`: "inputs", or "bias" or
    "constant" in the ablation of the gates (Tab. 2): see `cells.mlstm.gate`.
    """

    forms, chosen_forms = MLSTM.forms, MLSTM.chosen_forms

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 4,
        proj_factor: float | int = 2.0,
        inner_width: int | None = None,
        conv_width: int = 4,
        qkv_block: int = 4,
        use_bias: bool = False,
        input_gate_of: str = "inputs",
        forget_gate_of: str = "inputs",
        input_bias: Initializer | str | float = "normal(0.1)",
        forget_bias: Initializer | str | float = "linspace(3, 6)",
        num_blocks: int = 1,
        form: str = "chunkwise",
        chunk_size: int | None = None,
        memory_budget: int | float | str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """inner_width: of a, z, q, k and v, if not proj_factor D rounded up to 64; use_bias: in up, q, k, v and down.

        num_blocks: in the whole model, for the initial scale of `down`.
        """
        inner = round_up(proj_factor * features) if inner_width is None else inner_width
        for name, width in (("num_heads", num_heads), ("qkv_block", qkv_block)):
            if inner % width:
                raise ValueError(f"{name}={width} must divide the inner width {inner}")
        self.in_features = self.features = features
        self.inner, self.num_heads = inner, num_heads
        check_budget(memory_budget)
        self.form, self.chunk_size, self.memory_budget, self.param_dtype = form, chunk_size, memory_budget, param_dtype
        shared = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        small = dict(use_bias=use_bias, kernel_init=small_init(features), **shared)
        self.up = nnx.Linear(features, 2 * inner, **small)
        self.conv = CausalConv(inner, conv_width, **shared) if conv_width else None
        self.q, self.k, self.v = (HeadwiseLinear(inner, inner // qkv_block, **small) for _ in "qkv")
        self.i = gate(3 * inner, num_heads, initializer(input_bias), param_dtype, rngs, of=input_gate_of)
        self.f = gate(3 * inner, num_heads, initializer(forget_bias), param_dtype, rngs, of=forget_gate_of)
        self.norm = Norm(inner, num_heads, residual=True, param_dtype=param_dtype)
        self.skip = nnx.Param(jnp.ones(inner, param_dtype))
        wang = wang_init(features, num_blocks)
        self.down = nnx.Linear(inner, features, use_bias=use_bias, kernel_init=wang, **shared)

    def initial_state(self, batch_size: int) -> MLSTMLayerState:
        """Empty memory and convolution window."""
        H, E = self.num_heads, self.inner // self.num_heads
        memory = mlstm_kernel.initial_state(batch_size, H, E, E, self.state_dtype)
        return MLSTMLayerState(memory, None if self.conv is None else self.conv.initial_state(batch_size))

    def __call__(
        self,
        xs: Float[Array, "B T D"],
        state: MLSTMLayerState | None = None,
        mask: Bool[Array, "B T"] | None = None,
        reset: Bool[Array, "B T"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], MLSTMLayerState]:
        """xs (B, T, D) to outputs (B, T, D) and the last state."""
        check_inputs(self, xs, state, mask, reset, key)
        B, T, _ = xs.shape
        memory, window = self.initial_state(B) if state is None else state
        a, z = local.columns(self.up, xs, (self.inner, self.inner))
        c = a
        if self.conv is not None:
            c, window = self.conv(a, window, mask, reset)
        c = jax.nn.silu(c)
        qkv = self.q(c), self.k(c), self.v(a)
        q, k, v = (x.reshape(B, T, self.num_heads, -1) for x in qkv)
        h, memory = mlstm_kernel.mlstm(
            q,
            k,
            v,
            *pre_activations((self.i, self.f), qkv),
            memory,
            form=self.form,
            chunk_size=self.chunk_size,
            memory_budget=self.memory_budget,
            mask=mask,
            reset=reset,
        )
        h = self.norm(h.reshape(B, T, -1)) + self.skip[...].astype(c.dtype)[None, None] * c
        return masked(self.down(h * jax.nn.silu(z)), mask), MLSTMLayerState(memory, window)


class SLSTMLayerState(NamedTuple):
    cell: SLSTMState
    window: Float[Array, "B W D"] | None


class SLSTMLayer(Cell):
    """sLSTM mixer: i and f from SiLU(conv(x)), z and o from x, each projected by head; cell; head-wise norm.

    `conv_width=0` leaves the convolution out, as in the paper's formal-language runs.
    """

    forms, chosen_forms = SLSTM.forms, SLSTM.chosen_forms

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 4,
        conv_width: int = 4,
        block: int = 0,
        num_blocks: int = 1,
        recurrent_init: Initializer | str = "zeros",
        form: str = "fused",
        chunk_size: int = 64,
        memory_budget: int | float | str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """block of num_blocks: the place in the model, for the initial forget bias."""
        self.in_features = features
        shared = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.cell = SLSTM(
            None,
            features,
            num_heads=num_heads,
            recurrent_init=recurrent_init,
            forget_bias=f"powerlaw({block}, {num_blocks})",
            form=form,
            chunk_size=chunk_size,
            memory_budget=memory_budget,
            **shared,
        )
        self.conv = CausalConv(features, conv_width, **shared) if conv_width else None
        self.i, self.f, self.z, self.o = (
            HeadwiseLinear(features, num_heads, kernel_init=small_init(features), **shared) for _ in "ifzo"
        )
        self.norm = Norm(features, num_heads, residual=True, param_dtype=param_dtype)

    def initial_state(self, batch_size: int) -> SLSTMLayerState:
        """Empty cell and convolution window."""
        window = None if self.conv is None else self.conv.initial_state(batch_size)
        return SLSTMLayerState(self.cell.initial_state(batch_size), window)

    def __call__(
        self,
        xs: Float[Array, "B T D"],
        state: SLSTMLayerState | None = None,
        mask: Bool[Array, "B T"] | None = None,
        reset: Bool[Array, "B T"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], SLSTMLayerState]:
        """xs (B, T, D) to outputs (B, T, D) and the last state."""
        check_inputs(self, xs, state, mask, reset, key)
        cell, window = self.initial_state(xs.shape[0]) if state is None else state
        c = xs
        if self.conv is not None:
            c, window = self.conv(xs, window, mask, reset)
            c = jax.nn.silu(c)
        gates = jnp.stack([self.i(c), self.f(c), self.z(xs), self.o(xs)], axis=2)
        ys, cell = self.cell(gates, cell, mask, reset, key=key)
        return masked(self.norm(ys), mask), SLSTMLayerState(cell, window)
