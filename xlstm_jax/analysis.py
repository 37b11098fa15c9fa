"""The gradient-flow lab: what a cell of any kind does to a gradient on its way back through time.

Everything here goes through the contract alone (`initial_state` and calls of one step or more), so that it holds for
any cell, stack or model with a step, token models too; gates are those of `RecurrentCell`, `LinearCell` and `MLSTM`.

    state_gradients          dL/ds_t for every t (Hochreiter 1991; Bengio, Simard and Frasconi 1994)
    state_jacobian           ds_T/ds_0; its spectrum; Lyapunov exponents (Pascanu, Mikolov and Bengio 2013,
                             arXiv:1211.5063, section 2: singular values below 1 vanish, above 1 may explode)
    gate_preactivations      gates over time, their saturation, and how long the forget gate keeps half of what it holds
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Bool, Float

from .cells.arguments import check_flags
from .cells.base import Cell, RecurrentCell
from .cells.linear import LinearCell
from .cells.mlstm import MLSTM
from .cells.slstm import SLSTM
from .regularizers import Zoneout

LARGEST_STATE = 1024  # numbers a row: a Jacobian has the square of that
CANDIDATES = ("n", "h", "z")  # what gates let through and is none itself, unless it is the forget gate (the GRU's z)


def state_gradients(
    cell: Cell,
    xs: Array,
    loss: Callable[[Array], Array],
    state: Any = None,
    mask: Bool[Array, "B T"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
) -> dict[str, Array]:
    """dL/ds_t by field ("c", "h"; "0.c" in a tuple of states), (B, T, ...); s_t is the state that enters step t.

    xs (B, T, ...), counted from t = 0; `loss` takes all outputs (B, T, ...) to a number. A zero is added to every s_t
    and the loss differentiated with respect to it. A field is in its own units: xLSTM's c, n and C in those of exp(m).
    """
    state = _start(cell, xs, state, mask, reset)
    given = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (xs, mask, reset))
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(state)]
    leaves, treedef = jax.tree.flatten(state)
    axes = dict(zip(names, jax.tree.leaves(_batch_axes(cell, xs))))
    T = xs.shape[1]
    zeros = {name: jnp.zeros((T, *a.shape), a.dtype) for name, a in zip(names, leaves) if _floating(a)}

    def perturbed(added):
        def body(state, inputs):
            (x, mask, reset), added = inputs
            moved = (leaf + added[name] if name in added else leaf for name, leaf in zip(names, jax.tree.leaves(state)))
            y, state = _step(cell, x, jax.tree.unflatten(treedef, moved), mask, reset)
            return state, y

        value = loss(jnp.swapaxes(jax.lax.scan(body, state, (given, added))[1], 0, 1))
        if jnp.shape(value) != ():
            raise ValueError(f"loss must return one number, not an array of the shape {jnp.shape(value)}")
        return value

    grads = jax.grad(perturbed)(zeros)
    return {name: jnp.moveaxis(grad, 1 + axes[name], 0) for name, grad in grads.items()}


def gradient_norms(gradients: dict[str, Array]) -> dict[str, Float[Array, "B T"]]:
    """The Euclidean norm of each field's gradient, and of all fields together under "state"."""
    flat = {name: grad.reshape(*grad.shape[:2], -1) for name, grad in gradients.items()}
    return {name: norm(grad) for name, grad in (flat | {"state": jnp.concatenate([*flat.values()], axis=-1)}).items()}


def norm(a: Float[Array, "*M D"]) -> Float[Array, "*M"]:
    """Euclidean norm over the last axis; no square under- or overflows."""
    largest = jnp.max(jnp.abs(a), axis=-1, keepdims=True)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return jnp.sqrt(jnp.sum((a / scale) ** 2, axis=-1)) * scale[..., 0]


def state_jacobian(cell: Cell, xs: Array, state: Any = None) -> Float[Array, "B S S"]:
    """ds_T/ds_0 of each row over xs (B, T, ...): one step where T = 1, the product of the steps' Jacobians beyond.

    S: the state's floating numbers a row, fields in their order. Entry [b, i, j]: of new number i by old number j.
    """
    state = _start(cell, xs, state)
    _check_size(cell, xs, state)
    axes = _batch_axes(cell, xs)
    return jax.vmap(lambda xs, state: _jacobian(cell, xs, state, axes), (0, axes))(xs, state)


class Spectrum(NamedTuple):
    """Largest first."""

    singular_values: np.ndarray  # (B, S)
    eigenvalue_moduli: np.ndarray  # (B, S)


def state_jacobian_spectrum(cell: Cell, xs: Array, state: Any = None) -> Spectrum:
    """How much ds_T/ds_0 stretches, and the moduli of its eigenvalues, for each row of xs (B, T, ...).

    On the host, for most accelerators have no unsymmetric eigenvalues. Over many steps use `lyapunov_exponents`.
    """
    jacobian = np.asarray(state_jacobian(cell, xs, state))
    moduli = np.sort(np.abs(np.linalg.eigvals(jacobian)), axis=-1)[:, ::-1]
    return Spectrum(np.linalg.svd(jacobian, compute_uv=False), moduli)


def lyapunov_exponents(cell: Cell, xs: Array, state: Any = None) -> Float[Array, "B S"]:
    """Mean growth of the state's directions in nats a step along xs (B, T, ...), largest first.

    Repeated QR (Benettin et al. 1980): Q_t R_t = J_t Q_{t-1}, and the exponents are the means of log |diag R_t|; -inf
    for a direction that is lost altogether.
    """
    state = _start(cell, xs, state)
    _check_size(cell, xs, state)
    axes = _batch_axes(cell, xs)

    def row(xs, state):
        S = sum(leaf.size for leaf in jax.tree.leaves(state) if _floating(leaf))
        dtype = jnp.result_type(*(leaf for leaf in jax.tree.leaves(state) if _floating(leaf)))

        def body(carry, x):
            state, Q = carry
            Q, R = jnp.linalg.qr(_jacobian(cell, x[None], state, axes) @ Q)
            return (_advance(cell, x[None], state, axes), Q), jnp.log(jnp.abs(jnp.diagonal(R)))

        return jax.lax.scan(body, (state, jnp.eye(S, dtype=dtype)), xs)[1].mean(axis=0)

    return -jnp.sort(-jax.vmap(row, (0, axes))(xs, state), axis=-1)


def gate_names(cell: Cell) -> tuple[str, ...]:
    """The gates of a cell, without candidates (the LSTM's z, the GRU's n): none of an Elman network."""
    if isinstance(cell, MLSTM):
        return "i", "f", "o"
    if isinstance(cell, LinearCell):
        return tuple(gate for gate in cell.gates if gate != "h")
    if isinstance(cell, RecurrentCell):
        return tuple(gate for gate in cell.gates if gate == cell.forget_gate or gate not in CANDIDATES)
    raise ValueError(f"{type(cell).__name__} is no RecurrentCell, LinearCell or MLSTM: its gates are not known")


def has_forget_gate(cell: Cell) -> bool:
    """Whether one of its gates says how much of the memory a step keeps."""
    return bool(gate_names(cell)) and (not isinstance(cell, RecurrentCell) or cell.forget_gate is not None)


def gate_preactivations(cell: Cell, xs: Array, state: Any = None) -> dict[str, Array]:
    """Of each gate over xs (B, T, D_in), before its sigmoid or exp: (B, T, D), one a head (B, T, H) for the mLSTM.

    W x_t + R h_{t-1} + b and all that the cell's options add to it; of zoneout, its expectation.
    """
    _start(cell, xs, state)
    if not (names := gate_names(cell)):
        raise ValueError(f"{type(cell).__name__} has no gates")
    if isinstance(cell, MLSTM):
        return {gate: getattr(cell, gate)(xs) for gate in names}
    if isinstance(cell, LinearCell):
        return cell.preactivations(xs)
    recorder = nnx.clone(cell)
    recorder.rule = Recorder(Zoneout(cell.rule, cell.zoneout), cell.gates, cell.recurrent_gates or cell.gates, names)
    recorder.zoneout = ()
    return dict(zip(names, jnp.split(recorder(xs, state)[0], len(names), axis=-1)))


@dataclass(frozen=True)
class Recorder:
    """A rule that goes on as the given one does and whose output is the pre-activations of the gates `names`.

    They are the rule's own `preactivations`, or else the sums of both shares.
    """

    zoneout: Zoneout
    gates: tuple[str, ...]
    recurrent_gates: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def inner(self) -> Callable:
        return self.zoneout.inner

    def __call__(self, x, r, state, params):
        if hasattr(rule := self.zoneout.rule, "preactivations"):
            found = rule.preactivations(x, r, state, params)
        else:
            shares = dict(zip(self.recurrent_gates, r))
            found = {gate: a + shares.get(gate, 0.0) for gate, a in zip(self.gates, x)}
        return self.zoneout(x, r, state, params)[0], jnp.concatenate([found[gate] for gate in self.names], axis=-1)


class Saturation(NamedTuple):
    """The share of a gate's activations, over rows and units, that is nearly closed and nearly open at each step."""

    low: Float[Array, " T"]
    high: Float[Array, " T"]


def gate_saturation(
    cell: Cell, xs: Array, state: Any = None, low: float = 0.05, high: float = 0.95
) -> dict[str, Saturation]:
    """Shares below `low` and above `high` of each sigmoid gate (Karpathy, Johnson and Fei-Fei 2015, arXiv:1506.02078).

    An exponential input gate has no ceiling and is left out.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"low and high must be 0 <= low < high <= 1, not {low} and {high}")
    exponential = isinstance(cell, SLSTM) or (isinstance(cell, MLSTM) and cell.input_gate == "exp")
    preactivations = gate_preactivations(cell, xs, state)
    gates = {g: jax.nn.sigmoid(a) for g, a in preactivations.items() if g != "i" or not exponential}

    def share(flags):
        return jnp.moveaxis(flags, 1, 0).reshape(xs.shape[1], -1).mean(axis=1)

    return {gate: Saturation(share(a < low), share(a > high)) for gate, a in gates.items()}


def log_forget(cell: Cell, xs: Array, state: Any = None) -> Float[Array, "B T ..."]:
    """log of the share of its memory that each step of xs (B, T, D_in) keeps: of f; z of the GRU; 1 - i if coupled.

    Of linear cells a: 1 - z of the minGRU, f / (f + i) of the minLSTM, exp(-8 softplus(Lambda) r) of the RG-LRU.
    """
    if not has_forget_gate(cell):
        raise ValueError(f"{type(cell).__name__} has no forget gate")
    if isinstance(cell, LinearCell):
        _start(cell, xs, state)
        return cell.coefficients(xs)[0]
    preactivations = gate_preactivations(cell, xs, state)
    gate, sign = ("f", 1) if isinstance(cell, MLSTM) else (cell.forget_gate, cell.forget_sign)
    return jax.nn.log_sigmoid(sign * preactivations[gate])


def half_life(f: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    """Steps after which a memory that keeps the share f a step has halved: ln 2 / -ln f; infinite from f = 1 on.

    The forgetting time of Tallec and Ollivier 2018 (arXiv:1804.11188, section 1), 1 / (1 - f), is near 1 / -ln f.
    """
    return half_life_of_log(jnp.log(f))


def half_life_of_log(log_f: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    """The same from ln f, which still tells apart shares that round to 1."""
    return jnp.where(log_f >= 0, jnp.inf, math.log(2) / -jnp.asarray(log_f))


def _start(cell: Cell, xs: Array, state: Any, mask: Array | None = None, reset: Array | None = None) -> Any:
    """The given state or the empty one, after the checks that a step of its own would make too late or not at all."""
    if xs.ndim < 2 or xs.shape[1] == 0:
        raise ValueError(f"xs must be (B, T, ...) with T at least 1, not {xs.shape}")
    check_flags(xs, mask, reset)
    if state is None:
        state = cell.empty_state(xs)
    if not cell.has_step:
        raise ValueError(f"{type(cell).__name__} has no step to follow its state by: it needs the whole sequence")
    jax.eval_shape(cell.step, xs[:, 0], state)  # what does not fit is refused before a long scan is traced
    return state


def _step(cell: Cell, x: Array, state: Any, mask: Array | None, reset: Array | None) -> tuple[Array, Any]:
    """One step as a sequence of one, which unlike `cell.step` takes a mask."""
    mask, reset = (None if flags is None else flags[:, None] for flags in (mask, reset))
    ys, state = cell(x[:, None], state, mask, reset)
    return ys[:, 0], state


def _batch_axes(cell: Cell, xs: Array) -> Any:
    """The axis of each leaf of the state that counts rows: not the first in a stack that repeats its layers."""
    states = [
        jax.eval_shape(lambda xs: cell(xs)[1], jax.ShapeDtypeStruct((B, *xs.shape[1:]), xs.dtype)) for B in (2, 3)
    ]
    return jax.tree.map(lambda two, three: [a == b for a, b in zip(two.shape, three.shape)].index(False), *states)


def _advance(cell: Cell, xs: Array, state: Any, axes: Any) -> Any:
    """The state of one row, without its batch axes, after xs (T, ...)."""
    last = cell(xs[None], jax.tree.map(jnp.expand_dims, state, axes))[1]
    return jax.tree.map(jnp.squeeze, last, axes)


def _jacobian(cell: Cell, xs: Array, state: Any, axes: Any) -> Float[Array, "S S"]:
    """ds_T/ds_0 of one row, by reverse mode: the fused form has no other."""
    leaves, treedef = jax.tree.flatten(state)
    moving = [leaf for leaf in leaves if _floating(leaf)]
    flat, unflatten = ravel_pytree(moving)

    def advance(flat):
        numbers = iter(unflatten(flat))
        start = jax.tree.unflatten(treedef, [next(numbers) if _floating(leaf) else leaf for leaf in leaves])
        last = jax.tree.leaves(_advance(cell, xs, start, axes))
        return jnp.concatenate([leaf.reshape(-1) for leaf in last if _floating(leaf)])

    return jax.jacrev(advance)(flat)


def _check_size(cell: Cell, xs: Array, state: Any) -> None:
    S = sum(leaf.size for leaf in jax.tree.leaves(state) if _floating(leaf)) // xs.shape[0]
    if S > LARGEST_STATE:
        raise ValueError(
            f"the state of this {type(cell).__name__} has {S} numbers a row, too many for its Jacobian: "
            f"at most {LARGEST_STATE}; use a narrower cell"
        )


def _floating(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
