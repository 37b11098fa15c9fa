"""What cells have in common: the contract, and the weights, initialisers and regularisers of a cell that is a rule."""

from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from ..initializers import Chrono, Initializer, initializer, per_gate
from ..kernels.choice import CHOSEN_FORMS
from ..kernels.memory import check_budget
from ..kernels.recurrent import recurrent
from ..kernels.rules import Dense
from ..names import unknown
from ..regularizers import Zoneout, check_rates, dropout, locked_dropout, locked_scale, split
from .arguments import CellType, check_array, check_flag, check_inputs


class Cell(nnx.Module, metaclass=CellType):
    """One step of any layer is the sequence of one step; a subclass has `initial_state` and `__call__`."""

    forms: tuple[str, ...] = ()  # the first is the plain loop; a cell made of cells has theirs
    chosen_forms: tuple[str, ...] = ()  # those that not every machine has, or that choose one

    @property
    def state_dtype(self) -> DTypeLike:
        """float32, or float64 where the parameters are."""
        return jnp.promote_types(self.param_dtype, jnp.float32)

    @property
    def has_step(self) -> bool:
        """Whether an output needs nothing that comes later."""
        return True

    def input_shape(self, xs: Any) -> tuple[int | str, ...]:
        """The shape that xs must have after (B, T), () for tokens; any, of a cell that does not say its width."""
        return (self.in_features,) if hasattr(self, "in_features") else jnp.shape(xs)[2:]

    def empty_state(self, xs: Array) -> Any:
        """The empty state that fits xs."""
        return self.initial_state(xs.shape[0])

    def step(self, x: Array, state: Any, reset: Bool[Array, " B"] | None = None) -> tuple[Array, Any]:
        """x (B, D_in), or tokens (B,), and the state to y (B, D) and the next state; a True `reset` empties it."""
        if not self.has_step:
            raise TypeError(f"this {type(self).__name__} needs the whole sequence and has no step")
        shape = self.input_shape(x[:, None] if getattr(x, "ndim", 0) else jnp.zeros(()))
        check_array(*(("x", x, "B", shape) if shape else ("tokens", x, "B", shape, jnp.integer)))
        check_flag("reset", reset, x.shape[:1])
        ys, state = self(x[:, None], state, reset=None if reset is None else reset[:, None])
        return ys[:, 0], state


class RecurrentCell(Cell):
    """A cell that is a rule: W (D_in, G, D) for the input, R (N, H/N, G, D/N) by head for h, b (G, D), and the rule.

    A subclass sets `State`, `gates` (their order) and `rule`, a function or a hashable object that is called like one,
    and where they differ from the plain case

        recurrent_gates   the gates that R has
        inner_shape       (E, G, F) of a second matrix S (N, E/N, G, F/N), for a rule with a method `inner`
        hidden            the width H of h, if it is not D
        forget_gate, input_gate   those that `forget_bias` speaks of; forget_sign -1 if the first lets the past go
        default_forget_bias       where none is given (None: like all biases)
        zoneout_fields    the state's fields that may be zoned out
    """

    State: type
    gates: tuple[str, ...]
    recurrent_gates: tuple[str, ...] | None = None
    inner_shape: tuple[int, int, int] | None = None
    forget_gate: str | None = None
    forget_sign: int = 1
    input_gate: str | None = None
    default_forget_bias: str | float | None = None
    hidden: int | None = None
    zoneout_fields: tuple[str, ...] = ("h",)
    maps = Dense()
    forms = ("scan", "fused")
    chosen_forms = CHOSEN_FORMS

    def __init__(
        self,
        in_features: int | None,
        features: int,
        *,
        num_heads: int = 1,
        use_bias: bool = True,
        kernel_init: Initializer | str = "glorot",
        recurrent_init: Initializer | str = "orthogonal",
        bias_init: Initializer | str | float = "zeros",
        forget_bias: Initializer | str | float | None = None,
        input_dropout: float = 0.0,
        state_dropout: float = 0.0,
        output_dropout: float = 0.0,
        weight_drop: float = 0.0,
        zoneout: float | dict[str, float] = 0.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        form: str = "fused",
        chunk_size: int = 64,
        remat: bool = False,
        memory_budget: int | float | str | None = None,
        rngs: nnx.Rngs,
    ):
        """in_features None: the inputs are gates (B, T, G, D), and there is no W.

        memory_budget: bytes, or "auto", that forward and backward may set aside; it chooses chunk length and remat.
        dtype: of the products (default: the inputs'); the state and the rule stay in float32 or wider.
        forget_bias: of the gate that keeps the state, a number or an initialiser, or None for the cell's own; with
        "chrono(T)" the input gate has the negative.
        input_, state_, output_dropout: locked over time; zoneout: a rate, or {field: rate}; weight_drop: of R, and of
        an S that is recurrent too.
        """
        if in_features is None and input_dropout:
            raise ValueError("input_dropout needs inputs; with in_features=None they are gates")
        hidden = self.hidden or features
        if features % num_heads or hidden % num_heads:
            widths = f"features={features}" + (f" and hidden={hidden}" if hidden != features else "")
            raise ValueError(f"num_heads={num_heads} must divide {widths}")
        check_rates(input_dropout=input_dropout, state_dropout=state_dropout)
        check_rates(output_dropout=output_dropout, weight_drop=weight_drop)
        if forget_bias is None and use_bias and self.forget_gate is not None:
            forget_bias = self.default_forget_bias
        elif forget_bias is not None and (self.forget_gate is None or not use_bias):
            lacks = "bias" if self.forget_gate else "forget gate"
            raise ValueError(f"forget_bias={forget_bias!r}: this {type(self).__name__} has no {lacks}")
        self.in_features, self.features, self.hidden, self.num_heads = in_features, features, hidden, num_heads
        self.dtype, self.param_dtype = dtype, param_dtype
        self.form, self.chunk_size, self.remat = form, chunk_size, remat
        check_budget(memory_budget)
        self.memory_budget = memory_budget
        self.input_dropout, self.state_dropout, self.output_dropout = input_dropout, state_dropout, output_dropout
        self.weight_drop, self.zoneout = weight_drop, self.check_zoneout(zoneout)
        key = rngs.params()
        self.make_matrices(initializer(kernel_init), initializer(recurrent_init), key)
        biases = self.initial_biases(jax.random.fold_in(key, 2**20), initializer(bias_init), forget_bias)
        self.b = nnx.Param(biases) if use_bias else None

    def make_matrices(self, kernel_init: Initializer, recurrent_init: Initializer, key: Key[Array, ""]) -> None:
        """W, R and S."""
        N, D, H = self.num_heads, self.features, self.hidden

        def by_head(E_in, G, E_out, offset):
            shape = (E_in // N, G, E_out // N)
            keys = [jax.random.fold_in(key, offset + n) for n in range(N)]
            return nnx.Param(jnp.stack([per_gate(recurrent_init, k, shape, self.param_dtype) for k in keys]))

        shape = (self.in_features, len(self.gates), D)
        kernel_key = jax.random.fold_in(key, 0)
        self.W = nnx.Param(per_gate(kernel_init, kernel_key, shape, self.param_dtype)) if self.in_features else None
        self.R = by_head(H, len(self.recurrent_gates or self.gates), D, 1)
        self.S = by_head(*self.inner_shape, 2**16) if self.inner_shape else None

    def initial_biases(self, key: Key[Array, ""], bias_init: Initializer, forget_bias: Any) -> Float[Array, "G D"]:
        """Each gate's bias, by head; `forget_bias` over `bias_init` for the gate that keeps the state."""

        def draw(init, key):
            return init(key, (self.num_heads, self.features // self.num_heads), self.state_dtype).reshape(-1)

        keys = jax.random.split(key, len(self.gates))
        b = {gate: draw(bias_init, k) for gate, k in zip(self.gates, keys)}
        if forget_bias is not None:
            init = initializer(forget_bias)
            b[self.forget_gate] = self.forget_sign * draw(init, keys[self.gates.index(self.forget_gate)])
            if isinstance(init, Chrono) and self.input_gate is not None:
                b[self.input_gate] = -b[self.forget_gate]
        return jnp.stack(list(b.values())).astype(self.param_dtype)

    def check_zoneout(self, zoneout: float | dict[str, float]) -> tuple[tuple[str, float], ...]:
        """(field, rate) pairs without those of rate 0."""
        rates = zoneout if isinstance(zoneout, dict) else dict.fromkeys(self.zoneout_fields, zoneout)
        for field, rate in rates.items():
            if field not in self.zoneout_fields:
                raise ValueError(unknown(f"zoneout field of {type(self).__name__}", field, self.zoneout_fields))
            if not isinstance(rate, Real) or not 0 <= rate <= 1:
                raise ValueError(f"zoneout of {field} is {rate!r}: it must lie in [0, 1]")
        return tuple((field, rate) for field, rate in rates.items() if rate)

    def rule_params(self) -> Any:
        """What the rule needs beside the gates, in the state's dtype, with the rank of a gate."""
        return ()

    def dropped_inner(self, key: Key[Array, ""] | None) -> Array | None:
        """S, with weight drop where it is a recurrent matrix and no projection."""
        if self.S is None:
            return None
        return self.S[...] if self.hidden != self.features else dropout(self.S[...], self.weight_drop, key)

    def gate_bias(self) -> Float[Array, "G D"] | None:
        """What is added to the input's share of the gates."""
        return None if self.b is None else self.b[...]

    def as_gate(self, a: Array) -> Array:
        """A parameter (D,), or (G, D), in the state's dtype with one axis for the batch in front."""
        return a.astype(self.state_dtype)[None]

    def state_widths(self) -> dict[str, int]:
        """The width of each field of the state that is not D wide."""
        return {"h": self.hidden}

    def initial_state(self, batch_size: int) -> Any:
        """The empty state: zeros (B, D), h (B, H), float32, or float64 where the parameters are."""
        widths = dict.fromkeys(self.State._fields, self.features) | self.state_widths()
        return self.State(*(jnp.zeros((batch_size, width), self.state_dtype) for width in widths.values()))

    def input_shape(self, xs: Any) -> tuple[int | str, ...]:
        return (self.in_features,) if self.W is not None else (len(self.gates), self.features)

    def __call__(
        self,
        xs: Float[Array, "B T ..."],
        state: Any = None,
        mask: Bool[Array, "B T"] | None = None,
        reset: Bool[Array, "B T"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T ..."], Any]:
        """xs (B, T, D_in) to outputs (B, T, H) and the last state; a masked step copies the state through.

        key: draws all that is random (dropout, weight drop, zoneout) for the whole sequence; none is random without it.
        """
        check_inputs(self, xs, state, mask, reset, key)
        state = self.empty_state(xs) if state is None else state
        dtype = compute_dtype(self.dtype, xs)
        keys = split(key, 6)
        rule, noise = self.rule, ()
        if self.zoneout:
            rule = Zoneout(self.rule, self.zoneout)
            if key is not None:
                noise = rule.noise(state, xs.shape[1], keys[0])
        ys, state = recurrent(
            rule,
            locked_dropout(xs.astype(dtype), self.input_dropout, keys[1]),
            dropout(self.R[...], self.weight_drop, keys[2]),
            state,
            S=self.dropped_inner(keys[5]),
            W=None if self.W is None else self.W[...],
            b=self.gate_bias(),
            dtype=dtype,
            params=self.rule_params(),
            maps=self.maps,
            form=self.form,
            chunk_size=self.chunk_size,
            remat=self.remat,
            memory_budget=self.memory_budget,
            mask=mask,
            reset=reset,
            state_scale=locked_scale(state.h.shape, self.state_dropout, keys[3], state.h.dtype),
            noise=noise,
        )
        return locked_dropout(ys.astype(dtype), self.output_dropout, keys[4]), state


def compute_dtype(dtype: DTypeLike | None, xs: Array) -> DTypeLike:
    """That of a cell's products: the one it was given, or the inputs' (float32 for numpy's float64 without x64)."""
    return jax.dtypes.canonicalize_dtype(dtype or xs.dtype)


def linear(layer: nnx.Linear, xs: Float[Array, "B T D_in"], dtype: DTypeLike) -> Float[Array, "B T D"]:
    """The layer with inputs and weights in `dtype`, even where the layer itself has none."""
    ys = jnp.asarray(xs, dtype) @ layer.kernel[...].astype(dtype)
    return ys if layer.bias is None else ys + layer.bias[...].astype(dtype)[None, None]


def masked(ys: Float[Array, "B T ..."], mask: Bool[Array, "B T"] | None) -> Float[Array, "B T ..."]:
    """Zeros where the mask is False."""
    return ys if mask is None else jnp.where(mask.reshape(mask.shape + (1,) * (ys.ndim - 2)), ys, 0)
