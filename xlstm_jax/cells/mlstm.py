"""mLSTM: matrix memory with exponential gating (Beck et al. 2024, arXiv:2405.04517, eqs. 19-27) as a cell.

    q, k, v = W x_t;   i~, f~ = W x_t + b (one number a head);   h_t = sigmoid(W_o x_t + b_o) * mlstm(q, k, v, i~, f~)

The recurrence itself, in three forms, is `kernels.mlstm`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from ..initializers import Initializer, initializer
from ..kernels import mlstm as kernel
from ..kernels.choice import CHOSEN_FORMS
from ..kernels.memory import check_budget
from ..kernels.mlstm import MLSTMState
from ..layers import few_outputs
from ..names import unknown
from .arguments import check_inputs
from .base import Cell, compute_dtype, linear


class MLSTM(Cell):
    """mLSTM with output gate; q and k of width `qk_features`, v of width `features`, all split over `num_heads`."""

    forms = ("recurrent", "parallel", "chunkwise")
    chosen_forms = CHOSEN_FORMS

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        num_heads: int = 4,
        qk_features: int | None = None,
        input_gate: str = "exp",
        normalize: bool = True,
        kernel_init: Initializer | str = "lecun",
        forget_bias: Initializer | str | float = "linspace(3, 6)",
        input_bias: Initializer | str | float = "normal(0.1)",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        form: str = "chunkwise",
        chunk_size: int | None = None,
        memory_budget: int | float | str | None = None,
        rngs: nnx.Rngs,
    ):
        check_budget(memory_budget)
        self.memory_budget = memory_budget
        qk_features = qk_features or features
        kernel.check_gate(input_gate, normalize)
        if features % num_heads or qk_features % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide features={features} and qk_features={qk_features}")
        self.in_features, self.features, self.num_heads, self.qk_features = (
            in_features,
            features,
            num_heads,
            qk_features,
        )
        self.dtype, self.param_dtype = dtype, param_dtype
        self.form, self.chunk_size, self.input_gate, self.normalize = form, chunk_size, input_gate, normalize
        shared = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        kernel_init = initializer(kernel_init)
        self.qkv = nnx.Linear(
            in_features, 2 * qk_features + features, use_bias=False, kernel_init=kernel_init, **shared
        )
        self.o = nnx.Linear(in_features, features, kernel_init=kernel_init, **shared)
        self.i = gate(in_features, num_heads, initializer(input_bias), param_dtype, rngs)
        self.f = gate(in_features, num_heads, initializer(forget_bias), param_dtype, rngs)

    def initial_state(self, batch_size: int) -> MLSTMState:
        """The empty memory, float32 or wider."""
        H = self.num_heads
        return kernel.initial_state(batch_size, H, self.qk_features // H, self.features // H, self.state_dtype)

    def __call__(
        self,
        xs: Float[Array, "B T D_in"],
        state: MLSTMState | None = None,
        mask: Bool[Array, "B T"] | None = None,
        reset: Bool[Array, "B T"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], MLSTMState]:
        """xs (B, T, D_in) to outputs (B, T, D) and the last state; nothing is random, whatever the key."""
        check_inputs(self, xs, state, mask, reset, key)
        B, T, _ = xs.shape
        dtype = compute_dtype(self.dtype, xs)
        q, k, v = jnp.split(linear(self.qkv, xs, dtype), [self.qk_features, 2 * self.qk_features], axis=-1)
        q, k, v = (a.reshape(B, T, self.num_heads, -1) for a in (q, k, v))
        state = self.initial_state(B) if state is None else state
        h, state = kernel.mlstm(
            *(q, k, v, *pre_activations((self.i, self.f), (xs,)), state),
            form=self.form,
            chunk_size=self.chunk_size,
            input_gate=self.input_gate,
            normalize=self.normalize,
            memory_budget=self.memory_budget,
            mask=mask,
            reset=reset,
        )
        return jax.nn.sigmoid(linear(self.o, xs, dtype)) * h.reshape(B, T, self.features), state


class BiasGate(nnx.Module):
    """A gate that sees no inputs: its bias at all times, learned or not."""

    def __init__(self, num_heads: int, bias_init: Initializer, learned: bool, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.bias, self.learned = nnx.Param(bias_init(rngs.params(), (num_heads,), param_dtype)), learned

    def __call__(self, xs: Float[Array, "B T D"]) -> Float[Array, "B T H"]:
        """The pre-activation of every step of inputs like xs."""
        bias = self.bias[...] if self.learned else jax.lax.stop_gradient(self.bias[...])
        return jnp.broadcast_to(bias[None, None], (*xs.shape[:2], bias.size))


GATES_OF = ("inputs", "bias", "constant")


def gate(
    in_features: int,
    num_heads: int,
    bias_init: Initializer,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
    of: str = "inputs",
) -> nnx.Linear | BiasGate:
    """A gate's pre-activation, one a head, in float32 or wider; it starts from its bias alone.

    of: what it depends on, "inputs"; "bias", one learned number a head; "constant", the initial bias for ever.
    """
    if of not in GATES_OF:
        raise ValueError(unknown("gate of", of, GATES_OF))
    dtype = jnp.promote_types(param_dtype, jnp.float32)
    if of != "inputs":
        return BiasGate(num_heads, bias_init, of == "bias", param_dtype, rngs)
    return nnx.Linear(
        in_features,
        num_heads,
        kernel_init=jax.nn.initializers.zeros,
        bias_init=bias_init,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def pre_activations(
    gates: tuple[nnx.Linear | BiasGate, ...], parts: tuple[Float[Array, "B T _"], ...]
) -> list[Float[Array, "B T H"]]:
    """Each gate's, of inputs that lie side by side in the parts: one product a part for all gates, and nothing joined.

    Joined parts would take as long to write as the products, and would not be divided over a `tensor` axis as they are.
    """
    weighted, shares = [gate for gate in gates if isinstance(gate, nnx.Linear)], iter(())
    if weighted:
        kernel = jnp.stack([gate.kernel[...].astype(gate.dtype) for gate in weighted], axis=1)
        ends = np.cumsum([part.shape[-1] for part in parts])[:-1]
        products = [few_outputs(x.astype(kernel.dtype), rows) for x, rows in zip(parts, jnp.split(kernel, ends))]
        shares = iter(jnp.unstack(sum(products), axis=2))
    return [
        gate(parts[0]) if isinstance(gate, BiasGate) else next(shares) + gate.bias[...].astype(gate.dtype)[None, None]
        for gate in gates
    ]
