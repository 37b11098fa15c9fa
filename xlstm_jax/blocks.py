"""Residual blocks and their stack, under the contract of a cell (`key` is for dropout; without one nothing is dropped).

Block        x + mixer(norm(x)), then x + ffn(norm(x)) if there is one
MLSTMLayer   the pre-up-projection mixer of the xLSTM paper (arXiv:2405.04517, Fig. 11)
SLSTMLayer   the mixer of its post-up-projection block (Fig. 10)
Stack        blocks one after another, the repeating part stacked and scanned
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from .cells.base import Cell, Initializer, check_inputs, initializer, masked, per_gate
from .cells.mlstm import gate, linspace_bias
from .cells.slstm import SLSTMState, powerlaw_forget_bias, slstm_rule
from .kernels import mlstm as mlstm_kernel
from .kernels.recurrent import recurrent
from .layers import CausalConv, HeadNorm, HeadwiseLinear, dropout, round_up, small_init, wang_init


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
        self.residual, self.dropout = residual, dropout

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
        keys = (None, None) if key is None else jax.random.split(key)
        x = xs if self.norm is None else self.norm(xs)
        y, state = self.mixer(x, state, mask, reset)
        y = dropout(y, self.dropout, keys[0])
        xs = xs + y if self.residual else y
        if self.ffn is not None:
            xs = xs + dropout(self.ffn(self.ffn_norm(xs)), self.dropout, keys[1])
        return masked(xs, mask), state


class MLSTMLayerState(NamedTuple):
    memory: mlstm_kernel.MLSTMState
    window: Float[Array, "B W D"]


class MLSTMLayer(Cell):
    """Pre-up-projection mLSTM mixer.

    [a, z] = up(x);   c = SiLU(conv(a));   q, k of c, v of a by blocks of 4;   gates of [q, k, v]
    y = down((norm(mlstm(q, k, v)) + skip c) SiLU(z))
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 4,
        proj_factor: float = 2.0,
        conv_width: int = 4,
        qkv_block: int = 4,
        num_blocks: int = 1,
        form: str = "chunkwise",
        chunk_size: int = 64,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """num_blocks: blocks in the whole model, for the initial scale of `down`."""
        inner = round_up(proj_factor * features)
        if num_heads < 1 or inner % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide the inner width {inner}")
        self.features, self.inner, self.num_heads = features, inner, num_heads
        self.form, self.chunk_size, self.param_dtype = form, chunk_size, param_dtype
        shared = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.up = nnx.Linear(features, 2 * inner, use_bias=False, kernel_init=small_init(features), **shared)
        self.conv = CausalConv(inner, conv_width, **shared)
        self.q, self.k, self.v = (
            HeadwiseLinear(inner, inner // qkv_block, kernel_init=small_init(features), **shared) for _ in "qkv"
        )
        self.i = gate(3 * inner, num_heads, jax.nn.initializers.normal(0.1), param_dtype, rngs)
        self.f = gate(3 * inner, num_heads, linspace_bias(3.0, 6.0), param_dtype, rngs)
        self.norm = HeadNorm(inner, num_heads, param_dtype=param_dtype)
        self.skip = nnx.Param(jnp.ones(inner, param_dtype))
        self.down = nnx.Linear(inner, features, use_bias=False, kernel_init=wang_init(features, num_blocks), **shared)

    def initial_state(self, batch_size: int) -> MLSTMLayerState:
        """Empty memory and convolution window."""
        H, E = self.num_heads, self.inner // self.num_heads
        dtype = jnp.promote_types(self.param_dtype, jnp.float32)
        memory = mlstm_kernel.initial_state(batch_size, H, E, E, dtype)
        return MLSTMLayerState(memory, self.conv.initial_state(batch_size))

    def __call__(
        self,
        xs: Float[Array, "B T D"],
        state: MLSTMLayerState | None = None,
        mask: Bool[Array, "B T"] | None = None,
        reset: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], MLSTMLayerState]:
        """xs (B, T, D) to outputs (B, T, D) and the last state."""
        check_inputs(xs, self.features, state, MLSTMLayerState, mask, reset)
        B, T, _ = xs.shape
        memory, window = self.initial_state(B) if state is None else state
        a, z = jnp.split(self.up(xs), 2, axis=-1)
        c, window = self.conv(a, window, mask, reset)
        c = jax.nn.silu(c)
        qkv = self.q(c), self.k(c), self.v(a)
        gates = jnp.concatenate(qkv, axis=-1)
        q, k, v = (x.reshape(B, T, self.num_heads, -1) for x in qkv)
        h, memory = mlstm_kernel.mlstm(
            q,
            k,
            v,
            self.i(gates),
            self.f(gates),
            memory,
            form=self.form,
            chunk_size=self.chunk_size,
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
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """block of num_blocks: the place in the model, for the initial forget bias."""
        if num_heads < 1 or features % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide features={features}")
        self.features, self.num_heads, self.dtype, self.param_dtype = features, num_heads, dtype, param_dtype
        self.form, self.chunk_size = form, chunk_size
        shared = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.conv = CausalConv(features, conv_width, **shared) if conv_width else None
        self.i, self.f, self.z, self.o = (
            HeadwiseLinear(features, num_heads, kernel_init=small_init(features), **shared) for _ in "ifzo"
        )
        E = features // num_heads
        keys = jax.random.split(rngs.params(), num_heads)
        self.R = nnx.Param(jnp.stack([per_gate(initializer(recurrent_init), k, (E, 4, E), param_dtype) for k in keys]))
        bias = powerlaw_forget_bias(features, num_heads, block, num_blocks)
        self.b = nnx.Param(jnp.zeros((4, features), param_dtype).at[1].set(bias.astype(param_dtype)))
        self.norm = HeadNorm(features, num_heads, param_dtype=param_dtype)

    def initial_state(self, batch_size: int) -> SLSTMLayerState:
        """Empty cell and convolution window."""
        dtype = jnp.promote_types(self.param_dtype, jnp.float32)
        cell = SLSTMState(*(jnp.zeros((batch_size, self.features), dtype) for _ in SLSTMState._fields))
        return SLSTMLayerState(cell, None if self.conv is None else self.conv.initial_state(batch_size))

    def __call__(
        self,
        xs: Float[Array, "B T D"],
        state: SLSTMLayerState | None = None,
        mask: Bool[Array, "B T"] | None = None,
        reset: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], SLSTMLayerState]:
        """xs (B, T, D) to outputs (B, T, D) and the last state."""
        check_inputs(xs, self.features, state, SLSTMLayerState, mask, reset)
        cell, window = self.initial_state(xs.shape[0]) if state is None else state
        c = xs
        if self.conv is not None:
            c, window = self.conv(xs, window, mask, reset)
            c = jax.nn.silu(c)
        gates = jnp.stack([self.i(c), self.f(c), self.z(xs), self.o(xs)], axis=2)
        dtype = self.dtype or xs.dtype
        ys, cell = recurrent(
            slstm_rule,
            gates,
            self.R[...].astype(dtype),
            cell,
            b=self.b[...],
            mask=mask,
            reset=reset,
            form=self.form,
            chunk_size=self.chunk_size,
        )
        return masked(self.norm(ys).astype(dtype), mask), SLSTMLayerState(cell, window)


class Stack(Cell):
    """Blocks one after another. A pattern that repeats is stored stacked and run by one `lax.scan`, compiled once.

    make: block index -> block; pattern: one kind a block, equal kinds have parameters of equal shapes.
    """

    def __init__(self, make: Callable[[int], Block], pattern: tuple[str, ...]):
        if not pattern:
            raise ValueError("a stack needs at least one block")
        self.period = smallest_period(pattern)
        self.repeats = len(pattern) // self.period
        groups = [nnx.List([make(n * self.period + i) for i in range(self.period)]) for n in range(self.repeats)]
        if self.repeats == 1:
            self.blocks = groups[0]
        else:
            graphdef, _ = nnx.split(groups[0])
            params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.state(group) for group in groups))
            self.blocks = nnx.merge(graphdef, params)

    def initial_state(self, batch_size: int) -> tuple:
        """One state a block of the repeating group, with a leading axis of repeats where there are several."""
        states = tuple(block.initial_state(batch_size) for block in self.blocks)
        if self.repeats == 1:
            return states
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (self.repeats, *leaf.shape)), states)

    def __call__(
        self,
        xs: Float[Array, "B T D_in"],
        state: tuple | None = None,
        mask: Bool[Array, "B T"] | None = None,
        reset: Bool[Array, "B T"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple]:
        """xs (B, T, D) to outputs (B, T, D) and the last states."""

        def run(blocks, xs, states, key):
            keys = [None] * self.period if key is None else jax.random.split(key, self.period)
            new = []
            for n, block in enumerate(blocks):
                xs, new_state = block(xs, None if states is None else states[n], mask, reset, key=keys[n])
                new.append(new_state)
            return xs, tuple(new)

        if self.repeats == 1:
            return run(self.blocks, xs, state, key)
        graphdef, params = nnx.split(self.blocks)
        keys = None if key is None else jax.random.split(key, self.repeats)

        def body(xs, inputs):
            params, states, key = inputs
            return run(nnx.merge(graphdef, params), xs, states, key)

        return jax.lax.scan(body, xs, (params, state, keys))


def smallest_period(pattern: tuple[str, ...]) -> int:
    """The length of the shortest group whose repetition is the pattern."""
    n = len(pattern)
    return next(p for p in range(1, n + 1) if n % p == 0 and pattern == pattern[:p] * (n // p))
