"""Initialisers by name: a number, a name, a name with arguments ("normal(0.02)"), or any function of jax's kind.

Matrices   orthogonal(scale), glorot, lecun, identity(scale), normal(std), uniform(bound), zeros, constant(value)
Biases     constant(value) or just a number, zeros, and along the units of a head
           chrono(T)             log of uniform draws from [1, T - 1] (Tallec and Ollivier 2018, arXiv:1804.11188):
                                 the gate forgets over times that are spread up to T; the input gate gets the negative
           powerlaw(block, num_blocks)   5 - 12 (j / (E - 1))^p, p = 0.3 + 1.3 block / (num_blocks - 1), for unit j of a
                                 head of width E: from 5 to -7 (Beck et al. 2024, arXiv:2405.04517, released code)
           linspace(start, stop) from start to stop over the units
"""

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .names import unknown

Initializer = jax.nn.initializers.Initializer


def initializer(init: Initializer | str | float) -> Initializer:
    """An initialiser by name or number, or the function as it is; equal names give the same function."""
    if callable(init):
        return init
    if isinstance(init, Real) and math.isfinite(init):
        return named("constant", (float(init),))
    if not isinstance(init, str):
        raise ValueError(
            f"initialiser {init!r} should be a finite number, a name such as 'normal(0.02)', or a function"
        )
    match = re.fullmatch(r"(\w+)(?:\((.*)\))?", init.strip())
    if match is None or match[1] not in INITIALIZERS:
        raise ValueError(unknown("initialiser", match[1] if match else init, INITIALIZERS))
    try:
        arguments = tuple(float(x) for x in match[2].split(",")) if match[2] else ()
        if not all(map(math.isfinite, arguments)):
            raise ValueError(f"{arguments} are not all finite")
        return named(match[1], arguments)
    except (TypeError, ValueError):
        raise ValueError(f"initialiser {init!r} should be {match[1]}({INITIALIZERS[match[1]][0]})") from None


@lru_cache
def named(name: str, arguments: tuple[float, ...]) -> Initializer:
    """One function a name and arguments, so that modules that are built alike are equal."""
    return INITIALIZERS[name][1](*arguments)


def identity(scale: float = 1.0) -> Initializer:
    """scale I (Le, Jaitly and Hinton 2015, arXiv:1504.00941), at the centre of a convolution's kernel."""

    def init(key, shape, dtype=jnp.float32):
        *kernel, rows, columns = shape
        centre = tuple((size - 1) // 2 for size in kernel)
        return jnp.zeros(shape, dtype).at[centre].set(scale * jnp.eye(rows, columns, dtype=dtype))

    return init


@dataclass(frozen=True)
class Chrono:
    """log U[1, longest - 1]; a class, so that a cell sees that its input gate is to get the negative."""

    longest: float

    def __post_init__(self):
        if not 2 < self.longest < math.inf:
            raise ValueError(f"longest must be a number of steps above 2, not {self.longest}")

    def __call__(self, key, shape, dtype=jnp.float32):
        return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, self.longest - 1.0))


def linspace(start: float, stop: float) -> Initializer:
    """From start to stop along the last axis."""

    def init(key, shape, dtype=jnp.float32):
        return jnp.broadcast_to(jnp.linspace(start, stop, shape[-1], dtype=dtype), shape)

    return init


def powerlaw(block: float = 0, num_blocks: float = 1) -> Initializer:
    """The sLSTM's forget bias along the last axis; `block` counts from 0."""
    p = 0.3 + 1.3 * block / max(num_blocks - 1, 1)

    def init(key, shape, dtype=jnp.float32):
        E = shape[-1]
        return jnp.broadcast_to((5 - 12 * (jnp.arange(E) / max(E - 1, 1)) ** p).astype(dtype), shape)

    return init


@lru_cache
def small_init(dim: int) -> Initializer:
    """N(0, 2 / (5 dim)) (Nguyen and Salazar 2019)."""
    return jax.nn.initializers.normal(math.sqrt(2 / (5 * dim)))


@lru_cache
def wang_init(dim: int, num_blocks: int) -> Initializer:
    """N(0, std = 2 / (num_blocks sqrt(dim))), for the projection that ends a residual branch."""
    return jax.nn.initializers.normal(2 / (num_blocks * math.sqrt(dim)))


def uniform(bound: float) -> Initializer:
    """U[-bound, bound]."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


INITIALIZERS = {  # name: (its arguments, function)
    "orthogonal": ("scale=1", lambda scale=1.0: jax.nn.initializers.orthogonal(scale)),
    "glorot": ("", lambda: jax.nn.initializers.glorot_uniform()),
    "lecun": ("", lambda: jax.nn.initializers.lecun_normal()),
    "identity": ("scale=1", identity),
    "normal": ("std=0.01", lambda std=0.01: jax.nn.initializers.normal(std)),
    "uniform": ("bound", uniform),
    "zeros": ("", lambda: jax.nn.initializers.zeros),
    "constant": ("value", lambda value: jax.nn.initializers.constant(value)),
    "chrono": ("longest > 2", Chrono),
    "powerlaw": ("block=0, num_blocks=1", powerlaw),
    "linspace": ("start, stop", linspace),
}


def per_gate(init: Initializer, key: Array, shape: tuple[int, ...], dtype) -> Float[Array, "..."]:
    """(..., D_in, G, D) with each gate's matrix (..., D_in, D) drawn on its own, in float32 or wider."""
    *lead, G, D = shape
    wide = jnp.promote_types(dtype, jnp.float32)
    keys = jax.random.split(key, G)
    return jnp.stack([init(k, (*lead, D), wide) for k in keys], axis=-2).astype(dtype)
