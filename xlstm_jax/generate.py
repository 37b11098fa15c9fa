"""Sampling: the prompt in one whole-sequence call, then one token a step in one compiled scan."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key


def sample(
    logits: Float[Array, "B K"], key: Key[Array, ""], temperature: float | Float[Array, ""] = 1.0, top_k: int = 0
) -> Int[Array, " B"]:
    """Draw from softmax(logits / temperature), among the `top_k` largest if top_k > 0; temperature 0: the largest."""
    if top_k:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    greedy = jnp.argmax(logits, axis=-1)
    drawn = jax.random.categorical(key, logits / jnp.where(temperature > 0, temperature, 1.0), axis=-1)
    return jnp.where(temperature > 0, drawn, greedy)


@functools.partial(jax.jit, static_argnames=("graphdef", "length", "top_k"))
def _generate(params, prompt, key, temperature, *, graphdef, length, top_k):
    model = nnx.merge(graphdef, params)
    logits, state = model(prompt)
    if top_k > logits.shape[-1]:
        raise ValueError(f"top_k is {top_k}: there are {logits.shape[-1]} tokens")

    def step(loop, key):
        logits, state = loop
        token = sample(logits, key, temperature, top_k).astype(prompt.dtype)
        return model.step(token, state), token

    _, tokens = jax.lax.scan(step, (logits[:, -1], state), jax.random.split(key, length))
    return tokens.T


def generate(
    model: nnx.Module,
    prompt: Int[Array, "B T"],
    length: int,
    key: Key[Array, ""],
    temperature: float = 1.0,
    top_k: int = 0,
) -> Int[Array, "B length"]:
    """`length` tokens that follow the prompt, row by row."""
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(f"the prompt has shape {prompt.shape}: (rows, tokens) with at least one token is needed")
    if length < 1:
        raise ValueError(f"length is {length}: at least 1 is needed")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}: it must be positive, or 0 for the likeliest token")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}: it must be positive, or 0 for all tokens")
    graphdef, params = nnx.split(model)
    return _generate(params, prompt, key, jnp.float32(temperature), graphdef=graphdef, length=length, top_k=top_k)
