"""Linear cells: the gates see the input alone, so that h_t = a_t h_{t-1} + b_t runs in parallel over time.

minGRU (Feng et al. 2024, "Were RNNs All We Needed?", arXiv:2410.01201, section 3.1)

    z = sigmoid(W_z x_t + b_z);   h~ = W_h x_t + b_h;   h_t = (1 - z) h_{t-1} + z h~

minLSTM (section 3.2, with the gates normalised)

    f, i = sigmoid(W x_t + b);   h~ = W_h x_t + b_h;   h_t = f / (f + i) h_{t-1} + i / (f + i) h~

and both in log space (appendix B), the default here, with g(h~) in place of h~, which keeps h positive:
g(x) = x + 0.5 where x >= 0, sigmoid(x) elsewhere.

RG-LRU (De et al. 2024, Griffin, arXiv:2402.19427, section 2.4, eqs. 1-4, log a as in appendix A)

    r, i = sigmoid(W x_t + b), W block-diagonal;   log a = -8 softplus(Lambda) r
    h_t = a h_{t-1} + sqrt(1 - a^2) i x_t

The recurrence itself, in its forms, is `kernels.linear`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import log_sigmoid, sigmoid, softplus
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from ..initializers import Chrono, Initializer, initializer, per_gate
from ..kernels.linear import linear_recurrence, log_linear_recurrence
from .arguments import check_inputs
from .base import Cell, compute_dtype, linear

C = 8.0  # the RG-LRU's constant c


class MinGRUState(NamedTuple):
    h: Float[Array, "B D"]


class MinLSTMState(NamedTuple):
    h: Float[Array, "B D"]


class RGLRUState(NamedTuple):
    h: Float[Array, "B D"]


class LinearCell(Cell):
    """A linear cell: W (D_in/N, G, D), of which each head's columns see its own inputs, and b (G, D).

    A subclass sets `State`, `gates` (their order) and `coefficients(xs)`, which gives log a and b, or log a and log b
    where it sets `log_space`.
    """

    State: type
    gates: tuple[str, ...]
    log_space: bool = False
    forms: tuple[str, ...] = ("scan", "associative")

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        num_heads: int = 1,
        use_bias: bool = True,
        kernel_init: Initializer | str = "glorot",
        bias_init: Initializer | str | float = "zeros",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        form: str = "associative",
        chunk_size: int = 32,
        rngs: nnx.Rngs,
    ):
        """dtype: of the product (default: the inputs'); the gates and the recurrence stay in float32 or wider."""
        for name, width in {"features": features, "in_features": in_features}.items():
            if width % num_heads:
                raise ValueError(f"num_heads={num_heads} must divide {name}={width}")
        if form == "log" and not self.log_space:
            raise ValueError("form='log' needs log_space=True: a candidate that can be negative has no logarithm")
        self.in_features, self.features, self.num_heads = in_features, features, num_heads
        self.dtype, self.param_dtype = dtype, param_dtype
        self.form, self.chunk_size = form, chunk_size
        shape = in_features // num_heads, len(self.gates), features // num_heads
        keys = jax.random.split(rngs.params(), num_heads)
        heads = [per_gate(initializer(kernel_init), key, shape, param_dtype) for key in keys]
        self.W = nnx.Param(jnp.concatenate(heads, axis=-1))
        biases = jnp.stack([self.initial_bias(bias_init, rngs) for _ in self.gates])
        self.b = nnx.Param(biases) if use_bias else None

    def initial_bias(self, init: Initializer | str | float, rngs: nnx.Rngs) -> Float[Array, " D"]:
        """One gate's, by head."""
        shape = self.num_heads, self.features // self.num_heads
        return initializer(init)(rngs.params(), shape, self.state_dtype).reshape(-1).astype(self.param_dtype)

    def initial_state(self, batch_size: int) -> Any:
        """The empty state h = 0."""
        return self.State(jnp.zeros((batch_size, self.features), self.state_dtype))

    def inputs(self, xs: Float[Array, "B T D_in"]) -> Float[Array, "B T E"]:
        """What W multiplies, in the dtype of the products."""
        return xs.astype(compute_dtype(self.dtype, xs))

    def preactivations(self, xs: Float[Array, "B T D_in"]) -> dict[str, Float[Array, "B T D"]]:
        """W x + b of each gate; the candidate h is none."""
        return {gate: a for gate, a in zip(self.gates, self.project(self.inputs(xs))) if gate != "h"}

    def project(self, xs: Float[Array, "B T E"]) -> tuple[Float[Array, "B T D"], ...]:
        """W x + b, an array a gate."""
        W, N = self.W[...].astype(xs.dtype), self.num_heads
        E, G, D = W.shape
        xs = xs.reshape(*xs.shape[:2], N, E)
        W = W.reshape(E, G, N, D // N)
        x = jnp.einsum("btne,egnf->btgnf", xs, W, preferred_element_type=self.state_dtype)
        x = x.reshape(*xs.shape[:2], G, D)
        return jnp.unstack(x if self.b is None else x + self.b[...].astype(x.dtype)[None, None], axis=2)

    def __call__(
        self,
        xs: Float[Array, "B T D_in"],
        state: Any = None,
        mask: Bool[Array, "B T"] | None = None,
        reset: Bool[Array, "B T"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """xs (B, T, D_in) to outputs (B, T, D) and the last state; nothing is random, whatever the key."""
        check_inputs(self, xs, state, mask, reset, key)
        h = (self.initial_state(xs.shape[0]) if state is None else state).h
        options = dict(chunk_size=self.chunk_size, mask=mask, reset=reset)
        log_a, b = self.coefficients(xs)
        if self.form == "log":
            hs, h = log_linear_recurrence(log_a, b, h, **options)
        else:
            b = jnp.exp(b) if self.log_space else b
            hs, h = linear_recurrence(jnp.exp(log_a), b, h, form=self.form, **options)
        return hs.astype(compute_dtype(self.dtype, xs)), self.State(h)


def log_g(x: Array) -> Array:
    """log g(x); both branches are finite everywhere, and so are their gradients."""
    return jnp.where(x >= 0, jnp.log(jnp.where(x >= 0, x, 0) + 0.5), log_sigmoid(x))


def gated(log_gate: Array, candidate: Array, log_space: bool) -> Array:
    """gate * candidate, or log(gate * g(candidate))."""
    return log_gate + log_g(candidate) if log_space else jnp.exp(log_gate) * candidate


class MinGRU(LinearCell):
    """minGRU; `log_space=False` has the plain candidate h~, which can be negative, and no form "log"."""

    State, gates, forms = MinGRUState, ("z", "h"), (*LinearCell.forms, "log")

    def __init__(self, in_features: int, features: int, *, log_space: bool = True, **options):
        self.log_space = log_space
        super().__init__(in_features, features, **options)

    def coefficients(self, xs: Float[Array, "B T D_in"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """log(1 - z), and z h~ or its logarithm."""
        z, candidate = self.project(self.inputs(xs))
        return log_sigmoid(-z), gated(log_sigmoid(z), candidate, self.log_space)


class MinLSTM(LinearCell):
    """minLSTM; `forget_bias` is the forget gate's initial bias, 1 if not given; `log_space` as for the minGRU."""

    State, gates, forms = MinLSTMState, ("f", "i", "h"), (*LinearCell.forms, "log")

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        forget_bias: Initializer | str | float | None = None,
        log_space: bool = True,
        rngs: nnx.Rngs,
        **options,
    ):
        self.log_space = log_space
        super().__init__(in_features, features, rngs=rngs, **options)
        if self.b is not None:
            init = initializer(1.0 if forget_bias is None else forget_bias)
            forget = self.initial_bias(init, rngs)
            self.b[...] = self.b[...].at[0].set(forget)
            if isinstance(init, Chrono):
                self.b[...] = self.b[...].at[1].set(-forget)
        elif forget_bias is not None:
            raise ValueError(f"forget_bias={forget_bias!r}: this MinLSTM has no bias")

    def coefficients(self, xs: Float[Array, "B T D_in"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """log f / (f + i), and i / (f + i) h~ or its logarithm: f / (f + i) = sigmoid(log f - log i)."""
        f, i, candidate = self.project(self.inputs(xs))
        ratio = log_sigmoid(f) - log_sigmoid(i)
        return log_sigmoid(ratio), gated(log_sigmoid(-ratio), candidate, self.log_space)


def decay_logits(key: Key[Array, ""], features: int, low: float, high: float, dtype: DTypeLike) -> Float[Array, " D"]:
    """Lambda with a^c = exp(-c softplus(Lambda)) uniform in [low, high]."""
    decay = jax.random.uniform(key, (features,), dtype, low, high)
    return jnp.log(jnp.expm1(-jnp.log(decay) / C))


def root_one_minus_square(log_a: Array) -> Array:
    """sqrt(1 - a^2); where it underflows (a = 1) its derivative is 0, the limit as the gate r closes."""
    square = -jnp.expm1(2 * log_a)
    above = square > jnp.finfo(square.dtype).tiny
    return jnp.where(above, jnp.sqrt(jnp.where(above, square, 1)), 0)


class RGLRU(LinearCell):
    """RG-LRU, gates block-diagonal over `num_heads`; at first a^c is uniform in `decay_range`.

    It keeps the width of its input; inputs of another width go through a linear map first, without bias, as in
    Griffin's recurrent block. The first step has its factor sqrt(1 - a^2) like all others.
    """

    State, gates = RGLRUState, ("r", "i")

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        num_heads: int = 4,
        kernel_init: Initializer | str = "lecun",
        decay_range: tuple[float, float] = (0.9, 0.999),
        rngs: nnx.Rngs,
        **options,
    ):
        low, high = decay_range
        if not 0 < low <= high < 1:
            raise ValueError(f"decay_range must be (low, high) with 0 < low <= high < 1, not {decay_range}")
        super().__init__(features, features, num_heads=num_heads, kernel_init=kernel_init, rngs=rngs, **options)
        self.in_features = in_features
        self.Lambda = nnx.Param(
            decay_logits(rngs.params(), features, low, high, self.state_dtype).astype(self.param_dtype)
        )
        shared = dict(kernel_init=initializer(kernel_init), dtype=self.dtype, param_dtype=self.param_dtype)
        self.projection = (
            None if in_features == features else nnx.Linear(in_features, features, use_bias=False, rngs=rngs, **shared)
        )

    def inputs(self, xs: Float[Array, "B T D_in"]) -> Float[Array, "B T D"]:
        """At the cell's own width."""
        xs = super().inputs(xs)
        return xs if self.projection is None else linear(self.projection, xs, xs.dtype)

    def coefficients(self, xs: Float[Array, "B T D_in"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """log a, and sqrt(1 - a^2) i x."""
        xs = self.inputs(xs)
        r, i = self.project(xs)
        log_a = -C * softplus(self.Lambda[...].astype(r.dtype))[None, None] * sigmoid(r)
        return log_a, root_one_minus_square(log_a) * sigmoid(i) * xs.astype(r.dtype)
