"""Optimisers: AdamW with warm-up, cosine decay, gradient clip, and weight decay on matrices only."""

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

OPTIMISERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "constant")

# Decayed: W, W_up, kernel, qkv_kernel, weight, head. Not decayed: b*, R, scale, skip, norm and embedding parameters.
_MATRIX = re.compile(r"(W\w*|(?!recurrent)\w*kernel|weight|head)")
_NEVER = re.compile(r"norm|embed", re.IGNORECASE)


class LearningRateState(NamedTuple):
    """Updates so far, and the learning rate of the last one (read by `learning_rate`)."""

    count: Int[Array, ""]
    learning_rate: Float[Array, ""]


def make(
    name: str = "adamw",
    *,
    learning_rate: float,
    steps: int,
    warmup_steps: int = 0,
    schedule: str = "cosine",
    min_learning_rate: float = 0.0,
    weight_decay: float = 0.0,
    betas: Iterable | float | int = (0.9, 0.95),
    epsilon: float = 1e-8,
    clip: float | None = 1.0,
) -> optax.GradientTransformation:
    """Clip to the global norm `clip` (None, 0: no clip), AdamW or SGD, decoupled decay of matrices, warm-up, schedule.

    Equal arguments give the same object, so that runs which share them share one compiled program.
    """
    if name not in OPTIMISERS:
        raise ValueError(unknown("optimizer", name, OPTIMISERS))
    if schedule not in SCHEDULES:
        raise ValueError(unknown("schedule", schedule, SCHEDULES))
    if steps < 1:
        raise ValueError(f"steps is {steps}: at least 1 is needed")
    if not 0 <= warmup_steps <= steps:
        raise ValueError(f"warmup_steps is {warmup_steps}: it must lie between 0 and steps ({steps})")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate is {learning_rate}: it must be positive and finite")
    if not 0 <= min_learning_rate <= learning_rate:
        raise ValueError(
            f"min_learning_rate is {min_learning_rate}: it must lie between 0 and learning_rate ({learning_rate})"
        )
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay is {weight_decay}: it must be finite and 0 or more")
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon is {epsilon}: it must be positive and finite")
    if clip is not None and not clip >= 0:
        raise ValueError(f"clip is {clip}: it must be positive, or 0 for none")
    betas = tuple(betas) if isinstance(betas, Iterable) else (betas,)
    if len(betas) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas are {betas}: two numbers in [0, 1) are needed")
    return _build(
        name, learning_rate, steps, warmup_steps, schedule, min_learning_rate, weight_decay, betas, epsilon, clip or 0.0
    )


@functools.cache
def _build(name, peak, steps, warmup, schedule, floor, weight_decay, betas, epsilon, clip):
    def rate(count):
        if schedule == "cosine":
            done = jnp.clip((count - warmup) / max(steps - warmup, 1), 0.0, 1.0)
            after = floor + (peak - floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        else:
            after = jnp.full((), peak)
        ramp = jnp.minimum((count + 1) / max(warmup, 1), 1.0)  # never 0: the first step moves too
        return (ramp * after).astype(jnp.float32)

    return optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        optax.scale_by_adam(b1=betas[0], b2=betas[1], eps=epsilon) if name == "adamw" else optax.identity(),
        optax.add_decayed_weights(weight_decay, mask=decay_mask) if weight_decay else optax.identity(),
        _scale_by_learning_rate(rate),
    )


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
