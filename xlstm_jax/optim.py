"""Optimisers and schedules by name; clip to the global norm, decoupled weight decay on matrices only.

adamw   Loshchilov and Hutter 2019, arXiv:1711.05101
lion    Chen et al. 2023, arXiv:2302.06675: the sign of an interpolated momentum
muon    Jordan et al. 2024, with the scale of Liu et al. 2025, arXiv:2502.16982, under which learning rate and decay are
        AdamW's: orthogonalised momentum for the hidden matrices, AdamW for embeddings, head, biases, norms and all else
sgd     with or without (heavy-ball) momentum

After the warm-up from 0 to learning_rate, count by count to the last of `steps`

constant     stays
cosine       falls to min_learning_rate
exponential  falls to min_learning_rate by the same factor each step, then linearly to 0 (xLSTM 7B, arXiv:2503.13427)
wsd          stays, then falls linearly to min_learning_rate (warm-up, stable, decay; Haegele et al., arXiv:2405.18392)

where the last fall of "exponential" and "wsd" takes `cooldown_steps`.
"""

import functools
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from xlstm_jax.names import unknown

# Of each optimiser: the betas and the momentum where none are given; None: it has no such thing.
OPTIMISERS = {
    "adamw": ((0.9, 0.95), None),
    "lion": ((0.9, 0.99), None),
    "muon": ((0.9, 0.95), 0.95),
    "sgd": (None, 0.0),
}
SCHEDULES = ("cosine", "constant", "exponential", "wsd")
NUMBERS = ("learning_rate", "min_learning_rate", "weight_decay", "betas", "momentum", "epsilon", "clip")
Number = float | int | Float[Array, ""]  # an array where many runs with numbers of their own are one program
MUON_SCALE = 0.2  # of the root mean square of an AdamW update (arXiv:2502.16982, section 2.2)

# Decayed: W, W_up, kernel, qkv_kernel, weight, head. Not decayed: b*, R, scale, skip, norm and embedding parameters.
_MATRIX = re.compile(r"(W\w*|(?!recurrent)\w*kernel|weight|head)")
_NEVER = re.compile(r"norm|embed", re.IGNORECASE)
_NOT_HIDDEN = re.compile(r"(^|\.)(head|conv)\.")


class LearningRateState(NamedTuple):
    """Updates so far, and the learning rate of the last one (read by `learning_rate`)."""

    count: Int[Array, ""]
    learning_rate: Float[Array, ""]


class Settings(NamedTuple):
    """The arguments of `make`, checked and complete; those in NUMBERS may be replaced by arrays before `build`."""

    name: str
    learning_rate: Number
    steps: int
    warmup_steps: int
    cooldown_steps: int
    schedule: str
    min_learning_rate: Number
    weight_decay: Number
    betas: tuple[Number, Number] | Float[Array, "2"] | None
    momentum: Number | None
    epsilon: Number
    clip: Number


def settings(
    name: str = "adamw",
    *,
    learning_rate: float,
    steps: int,
    warmup_steps: int = 0,
    cooldown_steps: int = 0,
    schedule: str = "cosine",
    min_learning_rate: float = 0.0,
    weight_decay: float = 0.0,
    betas: Iterable | float | int | None = None,
    momentum: float | None = None,
    epsilon: float = 1e-8,
    clip: float | None = 1.0,
) -> Settings:
    """The arguments of `make`, checked.

    betas: of adamw and lion, and of muon's AdamW part; momentum: of sgd (0 if not given) and muon (0.95).
    """
    if name not in OPTIMISERS:
        raise ValueError(unknown("optimizer", name, OPTIMISERS))
    if schedule not in SCHEDULES:
        raise ValueError(unknown("schedule", schedule, SCHEDULES))
    if steps < 1:
        raise ValueError(f"steps is {steps}: at least 1 is needed")
    if not 0 <= warmup_steps <= steps:
        raise ValueError(f"warmup_steps is {warmup_steps}: it must lie between 0 and steps ({steps})")
    if not 0 <= cooldown_steps <= steps - warmup_steps:
        left = f"steps - warmup_steps ({steps - warmup_steps})"
        raise ValueError(f"cooldown_steps is {cooldown_steps}: it must lie between 0 and {left}")
    if cooldown_steps and schedule not in ("exponential", "wsd"):
        raise ValueError(f"cooldown_steps is {cooldown_steps}: {schedule} has none, only exponential and wsd have")
    if not cooldown_steps and schedule == "wsd":
        raise ValueError("cooldown_steps is 0: wsd needs at least 1 (without a cooldown it is the schedule constant)")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate is {learning_rate}: it must be positive and finite")
    if not 0 <= min_learning_rate <= learning_rate:
        raise ValueError(
            f"min_learning_rate is {min_learning_rate}: it must lie between 0 and learning_rate ({learning_rate})"
        )
    if not min_learning_rate and schedule == "exponential":
        raise ValueError("min_learning_rate is 0: the schedule exponential needs a positive one, such as a tenth")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay is {weight_decay}: it must be finite and 0 or more")
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon is {epsilon}: it must be positive and finite")
    if clip is not None and not clip >= 0:
        raise ValueError(f"clip is {clip}: it must be positive, or 0 for none")
    own_betas, own_momentum = OPTIMISERS[name]
    for option, given, own in (("betas", betas, own_betas), ("momentum", momentum, own_momentum)):
        if given is not None and own is None:
            users = " and ".join(n for n, owned in OPTIMISERS.items() if owned[option == "momentum"] is not None)
            raise ValueError(f"{option} is {given}: {name} has none, only {users} have")
    betas = own_betas if betas is None else tuple(betas) if isinstance(betas, Iterable) else (betas,)
    numbers = betas is None or all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas)
    if not numbers or (betas is not None and len(betas) != 2):
        raise ValueError(f"betas are {betas}: two numbers in [0, 1) are needed")
    momentum = own_momentum if momentum is None else momentum
    if momentum is not None and not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}: it must lie in [0, 1)")
    return Settings(
        name,
        learning_rate,
        steps,
        warmup_steps,
        cooldown_steps,
        schedule,
        min_learning_rate,
        weight_decay,
        betas,
        momentum,
        epsilon,
        clip or 0.0,
    )


@functools.wraps(settings)
def make(*args, **options) -> optax.GradientTransformation:
    """Clip to the global norm `clip` (None, 0: no clip), the optimiser, decoupled decay of matrices, the schedule.

    Equal arguments give the same object, so that runs which share them share one compiled program.
    """
    return _cached(settings(*args, **options))


def build(s: Settings) -> optax.GradientTransformation:
    """The optimiser of settings whose NUMBERS may be arrays; a part whose number is the constant 0 is left out."""
    rate = (s.learning_rate, s.steps, s.warmup_steps, s.cooldown_steps, s.schedule, s.min_learning_rate)
    return optax.chain(
        optax.clip_by_global_norm(s.clip) if _present(s.clip) else optax.identity(),
        _direction(s.name, s.betas, s.momentum, s.epsilon),
        optax.add_decayed_weights(s.weight_decay, mask=decay_mask) if _present(s.weight_decay) else optax.identity(),
        _scale_by_learning_rate(functools.partial(scheduled_rate, *rate)),
    )


_cached = functools.cache(build)


def _present(number: Number | None) -> bool:
    return isinstance(number, jax.Array) or bool(number)


def _direction(name, betas, momentum, epsilon) -> optax.GradientTransformation:
    """From gradients to the update of a learning rate of -1."""
    if name == "lion":
        return optax.scale_by_lion(*betas)
    if name == "sgd":
        return optax.trace(momentum) if _present(momentum) else optax.identity()
    adam = optax.scale_by_adam(*betas, eps=epsilon)
    if name == "adamw":
        return adam
    orthogonal = optax.contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=matrix_axes)
    return optax.partition({True: optax.chain(orthogonal, optax.stateless(_scale_matrices)), False: adam}, _is_matrix)


def _scale_matrices(updates: PyTree, params: PyTree) -> PyTree:
    """Orthogonal matrices (a, b), scaled to the size that AdamW's updates have, whatever a and b."""
    del params

    def scale(path, x):
        axes = _axes(parameter_name(path), x.ndim)
        return MUON_SCALE * max(x.shape[axes.reduction_axis], x.shape[axes.output_axis]) ** 0.5 * x

    return jax.tree_util.tree_map_with_path(scale, updates)


def scheduled_rate(
    peak: Number, steps: int, warmup: int, cooldown: int, schedule: str, floor: Number, count: Int[Array, ""]
) -> Float[Array, ""]:
    """The learning rate of update number `count`, counted from 0."""
    done = jnp.clip((count - warmup) / max(steps - cooldown - warmup, 1), 0.0, 1.0)
    if schedule == "cosine":
        after = floor + (peak - floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
    elif schedule == "exponential":
        after = peak * (floor / peak) ** done
    else:
        after = jnp.full((), peak)
    ramp = jnp.minimum((count + 1) / max(warmup, 1), 1.0)  # never 0: the first step moves too
    end = floor if schedule == "wsd" else 0.0
    left = jnp.clip((steps - count) / cooldown, 0.0, 1.0) if cooldown else 1.0
    return (ramp * (end + (after - end) * left)).astype(jnp.float32)


def matrix_axes(params: PyTree) -> PyTree:
    """For each parameter, the axes of the matrix that Muon makes orthogonal, None for those that are AdamW's.

    All other axes count off matrices: layers that are stacked, heads, and the gates of W (in, G, D) and R, S
    (H, in, G, D). Not Muon's: embeddings, head, depthwise convolutions, biases, norms and all vectors.
    """
    return jax.tree_util.tree_map_with_path(lambda path, x: _axes(parameter_name(path), x.ndim), params)


def _axes(name: str, ndim: int) -> optax.contrib.MuonDimensionNumbers | None:
    last = name.rpartition(".")[2]
    if ndim < 2 or _NEVER.search(name) or _NOT_HIDDEN.search(name):
        return None
    if re.fullmatch(r"(\w+_)?kernel", last) or (ndim == 2 and last in ("W", "R", "S")):
        return optax.contrib.MuonDimensionNumbers(-2, -1)
    return optax.contrib.MuonDimensionNumbers(-3, -1) if last in ("W", "R", "S") else None


def _is_matrix(params: PyTree) -> PyTree:
    """True at each parameter that is Muon's."""
    return jax.tree_util.tree_map_with_path(lambda path, x: _axes(parameter_name(path), x.ndim) is not None, params)


def _scale_by_learning_rate(rate) -> optax.GradientTransformation:
    """Multiply by -rate(count), and keep the rate in the state for the metrics."""

    def init(params):
        del params
        return LearningRateState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(updates, state, params=None):
        del params
        now = rate(state.count)
        updates = jax.tree.map(lambda u: -now.astype(u.dtype) * u, updates)
        return updates, LearningRateState(state.count + 1, now)

    return optax.GradientTransformation(init, update)


def learning_rate(opt_state: PyTree) -> Float[Array, ""] | None:
    """The learning rate of the last update; None if the optimiser was not made by `make`."""
    found = jax.tree.leaves(opt_state, is_leaf=lambda s: isinstance(s, LearningRateState))
    return next((s.learning_rate for s in found if isinstance(s, LearningRateState)), None)


def parameter_name(path: tuple) -> str:
    """Dotted name of a parameter from its key path: "blocks.0.cell.W"."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def decays(name: str) -> bool:
    """Whether weight decay acts on the parameter of this name: matrices yes; biases, norms, skips, R, embeddings no."""
    return bool(_MATRIX.fullmatch(name.rpartition(".")[2])) and not _NEVER.search(name)


def decay_mask(params: PyTree) -> PyTree:
    """True at each parameter that weight decay acts on."""
    return jax.tree_util.tree_map_with_path(lambda path, _: decays(parameter_name(path)), params)
