"""The mixer of xLSTM 7B (arXiv:2503.13427, section 2.1), to stand in a `Block` with RMS norms and SwiGLU."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from .cells.arguments import check_inputs
from .cells.base import Cell, masked
from .cells.mlstm import MLSTM, gate, pre_activations
from .initializers import Initializer, initializer, small_init, wang_init
from .kernels import local
from .kernels import mlstm as kernel
from .kernels.memory import check_budget
from .kernels.mlstm import MLSTMState
from .layers import Norm, soft_cap


class MLSTMLargeLayer(Cell):
    """Post-up-projection mLSTM mixer, without convolution and skip.

    q, k (width qk_factor D), v, o~ (width v_factor D), i~, f~ (one a head, cap tanh((W x + b) / cap)) of x
    y = out(sigmoid(o~) norm(mlstm(q, k, v, i~, f~))),   the norm a layer norm of each head
    """

    forms, chosen_forms = MLSTM.forms, MLSTM.chosen_forms

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 8,
        qk_factor: float | int = 0.5,
        v_factor: float | int = 1.0,
        gate_cap: float | int | None = 15.0,
        input_gate: str = "exp",
        normalize: bool = True,
        input_bias: Initializer | str | float = -10.0,
        forget_bias: Initializer | str | float = "linspace(3, 6)",
        use_bias: bool = False,
        norm_eps: float | int = 1e-6,
        eps: float | int = 1e-6,
        num_blocks: int = 1,
        form: str = "chunkwise",
        chunk_size: int | None = None,
        memory_budget: int | float | str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """use_bias: of all but the gates i and f, which have one in any case; eps: of the mLSTM's denominator."""
        qk_features, v_features = int(qk_factor * features), int(v_factor * features)
        if min(qk_features, v_features) < 1 or qk_features % num_heads or v_features % num_heads:
            raise ValueError(
                f"num_heads={num_heads} must divide the widths {qk_features} of q and k, {v_features} of v"
            )
        self.in_features = self.features = features
        self.num_heads, self.qk_features, self.v_features = num_heads, qk_features, v_features
        self.gate_cap, self.input_gate, self.normalize, self.eps = gate_cap, input_gate, normalize, eps
        check_budget(memory_budget)
        self.form, self.chunk_size, self.memory_budget, self.param_dtype = form, chunk_size, memory_budget, param_dtype
        shared = dict(use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        small, zeros = small_init(features), jax.nn.initializers.zeros
        self.qkv = nnx.Linear(features, 2 * qk_features + v_features, kernel_init=small, **shared)
        self.o = nnx.Linear(features, v_features, kernel_init=zeros, **shared)
        self.i = gate(features, num_heads, initializer(input_bias), param_dtype, rngs)
        self.f = gate(features, num_heads, initializer(forget_bias), param_dtype, rngs)
        self.norm = Norm(v_features, num_heads, use_bias=use_bias, epsilon=norm_eps, param_dtype=param_dtype)
        self.out = nnx.Linear(v_features, features, kernel_init=wang_init(features, num_blocks), **shared)

    def initial_state(self, batch_size: int) -> MLSTMState:
        """The empty memory, float32 or wider."""
        H = self.num_heads
        return kernel.initial_state(batch_size, H, self.qk_features // H, self.v_features // H, self.state_dtype)

    def __call__(
        self,
        xs: Float[Array, "B T D"],
        state: MLSTMState | None = None,
        mask: Bool[Array, "B T"] | None = None,
        reset: Bool[Array, "B T"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], MLSTMState]:
        """xs (B, T, D) to outputs (B, T, D) and the last state; nothing is random, whatever the key."""
        check_inputs(self, xs, state, mask, reset, key)
        B, T, _ = xs.shape
        q, k, v = local.columns(self.qkv, xs, (self.qk_features, self.qk_features, self.v_features))
        q, k, v = (a.reshape(B, T, self.num_heads, -1) for a in (q, k, v))
        i, f = (soft_cap(gate, self.gate_cap) for gate in pre_activations((self.i, self.f), (xs,)))
        h, state = kernel.mlstm(
            *(q, k, v, i, f, self.initial_state(B) if state is None else state),
            form=self.form,
            chunk_size=self.chunk_size,
            memory_budget=self.memory_budget,
            input_gate=self.input_gate,
            normalize=self.normalize,
            eps=self.eps,
            mask=mask,
            reset=reset,
        )
        h = self.norm(h.reshape(B, T, -1)) * jax.nn.sigmoid(self.o(xs))
        return masked(self.out(h), mask), state
