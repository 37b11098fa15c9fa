"""What every cell has in common: the contract, and the weights of a cell that is a rule."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from ..kernels.recurrent import recurrent
from ..names import unknown

Initializer = jax.nn.initializers.Initializer
INITIALIZERS = {
    "glorot": jax.nn.initializers.glorot_uniform(),
    "lecun": jax.nn.initializers.lecun_normal(),
    "orthogonal": jax.nn.initializers.orthogonal(),
    "zeros": jax.nn.initializers.zeros,
}


def initializer(init: Initializer | str) -> Initializer:
    """An initialiser by name, or the function as it is."""
    if isinstance(init, str) and init not in INITIALIZERS:
        raise ValueError(unknown("initialiser", init, INITIALIZERS))
    return INITIALIZERS[init] if isinstance(init, str) else init


class Cell(nnx.Module):
    """One step of any layer is the sequence of one step; a subclass has `initial_state` and `__call__`."""

    def step(self, x: Array, state: Any, reset: Bool[Array, " B"] | None = None) -> tuple[Array, Any]:
        """x (B, D_in), or tokens (B,), and the state to y (B, D) and the next state; a True `reset` empties it."""
        ys, state = self(x[:, None], state, reset=None if reset is None else reset[:, None])
        return ys[:, 0], state


class RecurrentCell(Cell):
    """A cell that is a rule: W (D_in, G, D) for the input, R (N, D/N, G, D/N) by head, b (G, D), and the rule.

    A subclass sets `State`, `gates` (their order) and `rule(x, r, state, params)`, and may add to `rule_params`.
    """

    State: type
    gates: tuple[str, ...]

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        num_heads: int = 1,
        use_bias: bool = True,
        kernel_init: Initializer | str = "glorot",
        recurrent_init: Initializer | str = "orthogonal",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        form: str = "fused",
        chunk_size: int = 64,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        """dtype: of the two products (default: the inputs'); the state and the rule stay in float32 or wider."""
        if num_heads < 1 or features % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide features={features}")
        self.in_features, self.features, self.num_heads = in_features, features, num_heads
        self.dtype, self.param_dtype = dtype, param_dtype
        self.form, self.chunk_size, self.remat = form, chunk_size, remat
        G, E = len(self.gates), features // num_heads
        key = rngs.params()
        self.W = nnx.Param(
            per_gate(initializer(kernel_init), jax.random.fold_in(key, 0), (in_features, G, features), param_dtype)
        )
        heads = [
            per_gate(initializer(recurrent_init), jax.random.fold_in(key, 1 + n), (E, G, E), param_dtype)
            for n in range(num_heads)
        ]
        self.R = nnx.Param(jnp.stack(heads))
        self.b = nnx.Param(jnp.zeros((G, features), param_dtype)) if use_bias else None

    def rule_params(self) -> Any:
        """What the rule needs beside the gates, in the state's dtype."""
        return ()

    def initial_state(self, batch_size: int):
        """The empty state: zeros (B, D), float32, or float64 where the parameters are."""
        dtype = jnp.promote_types(self.param_dtype, jnp.float32)
        return self.State(*(jnp.zeros((batch_size, self.features), dtype) for _ in self.State._fields))

    def __call__(
        self,
        xs: Float[Array, "B T D_in"],
        state: Any = None,
        mask: Bool[Array, "B T"] | None = None,
        reset: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """xs (B, T, D_in) to outputs (B, T, D) and the last state; see DESIGN: masked steps copy the state through."""
        check_inputs(xs, self.in_features, state, self.State, mask, reset)
        dtype = self.dtype or xs.dtype
        ys, state = recurrent(
            self.rule,
            xs.astype(dtype),
            self.R[...].astype(dtype),
            self.initial_state(xs.shape[0]) if state is None else state,
            W=self.W[...].astype(dtype),
            b=None if self.b is None else self.b[...],
            params=self.rule_params(),
            form=self.form,
            chunk_size=self.chunk_size,
            remat=self.remat,
            mask=mask,
            reset=reset,
        )
        return ys.astype(dtype), state


def per_gate(init: Initializer, key: Key[Array, ""], shape: tuple[int, int, int], dtype: DTypeLike) -> Array:
    """(D_in, G, D) with each gate's matrix drawn on its own."""
    D_in, G, D = shape
    return jnp.stack([init(k, (D_in, D), dtype) for k in jax.random.split(key, G)], axis=1)


def masked(ys: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None) -> Float[Array, "B T D"]:
    """Zeros where the mask is False."""
    return ys if mask is None else jnp.where(mask[..., None], ys, 0)


def check_inputs(xs: Any, in_features: int, state: Any, state_type: type | None, mask: Any, reset: Any) -> None:
    """One clear line for what does not fit, before anything is computed."""
    if xs.ndim != 3 or xs.shape[-1] != in_features:
        raise ValueError(f"xs must have the shape (B, T, {in_features}), not {xs.shape}")
    if xs.shape[1] == 0:
        raise ValueError("xs has no time step (T = 0); at least one is needed")
    for name, flags in (("mask", mask), ("reset", reset)):
        if flags is not None and (flags.shape != xs.shape[:2] or flags.dtype != jnp.bool_):
            raise ValueError(f"{name} must be bool of the shape {xs.shape[:2]}, not {flags.dtype} {flags.shape}")
    if state is not None and state_type is not None and not isinstance(state, state_type):
        raise ValueError(f"state must be a {state_type.__name__}, not a {type(state).__name__}")
    for leaf in jax.tree.leaves(state) if state_type is not None else ():
        if leaf.shape[0] != xs.shape[0]:
            raise ValueError(f"state is for a batch of {leaf.shape[0]}, xs for one of {xs.shape[0]}")
