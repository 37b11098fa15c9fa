"""A model and a task as small as the contract allows, so that the trainer's tests need no other part of the package.

As a script it trains them: python tests/stand_in.py WORKDIR [STEPS] (the test of resuming kills it).
"""

import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from xlstm_jax import optim, train
from xlstm_jax.tasks.task import Batch


class TinyRNN(nnx.Module):
    """Embedding, h = tanh(W[token] + h R + b), head."""

    def __init__(self, vocab_size, num_classes, dim, dropout=0.0, *, rngs):
        self.dim, self.dropout = dim, dropout
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (vocab_size, dim)))
        self.R = nnx.Param(jax.random.normal(rngs.params(), (dim, dim)) / dim**0.5)
        self.b = nnx.Param(jnp.zeros(dim))
        self.W = nnx.Param(jax.random.normal(rngs.params(), (dim, num_classes)) / dim**0.5)

    def initial_state(self, batch_size):
        return (jnp.zeros((batch_size, self.dim)),)

    def step(self, token, state, reset=None):
        h = state[0] if reset is None else jnp.where(reset[:, None], 0, state[0])
        h = jnp.tanh(self.embedding[token] + h @ self.R + self.b[None])
        return h @ self.W, (h,)

    def __call__(self, tokens, state=None, mask=None, reset=None, *, key=None):
        state = self.initial_state(tokens.shape[0]) if state is None else state
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        reset = jnp.zeros(tokens.shape, bool) if reset is None else reset

        def body(state, now):
            token, keep, reset = now
            logits, new = self.step(token, state, reset)
            return (jnp.where(keep[:, None], new[0], state[0]),), logits

        state, logits = jax.lax.scan(body, state, (tokens.T, mask.T, reset.T))
        logits = logits.swapaxes(0, 1)
        if key is not None and self.dropout:
            logits = logits * jax.random.bernoulli(key, 1 - self.dropout, logits.shape) / (1 - self.dropout)
        return logits, state


@dataclass(frozen=True)
class Recall:
    """Say the token before this one: 3 1 2 -> . 3 1. With `carries_state` the first answer lies in the last batch."""

    vocab_size: int = 4
    length: int = 6
    carries_state: bool = False
    bad_step: int = -1  # weights of this training batch are NaN

    name = "recall"
    chance = 0.25

    @property
    def num_classes(self):
        return self.vocab_size

    def batch(self, split, seed, step, batch_size):
        offset = {"train": 0, "valid": 1, "test": 2}[split]

        def tokens(step):  # a hash of (seed, split, step, row, column): cheap to compile
            place = jnp.asarray(step, jnp.int32) * 64 + jnp.arange(batch_size)[:, None]
            word = (place * 64 + jnp.arange(self.length)[None, :]).astype(jnp.uint32) + jnp.uint32(offset * 7919)
            word = (word ^ jnp.asarray(seed, jnp.int32).astype(jnp.uint32)) * jnp.uint32(2654435761)
            word = (word ^ (word >> 15)) * jnp.uint32(2246822519)
            return ((word ^ (word >> 13)) % jnp.uint32(self.vocab_size)).astype(jnp.int32)

        now, before = tokens(step), tokens(step - 1)
        targets = jnp.concatenate([before[:, -1:], now[:, :-1]], axis=1)
        weights = jnp.ones(now.shape, jnp.float32).at[:, 0].set(1.0 if self.carries_state else 0.0)
        if split == "train":
            weights = jnp.where(step == self.bad_step, jnp.nan, weights)
        return Batch(now, targets, weights, None, None)

    def num_batches(self, split, batch_size):
        return 32 // batch_size

    def metrics(self, sums):
        return {"loss": sums["nll"] / sums["weight"], "accuracy": sums["correct"] / sums["weight"]}


def model(seed=0, dim=16, dropout=0.0):
    return TinyRNN(4, 4, dim, dropout, rngs=nnx.Rngs(seed))


if __name__ == "__main__":
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    train.fit(
        model(dropout=0.1),
        Recall(carries_state=True),
        optim.make(learning_rate=1e-2, steps=steps, warmup_steps=5, weight_decay=0.1),
        steps=steps,
        batch_size=4,
        eval_every=25,
        save_every=20,
        log_every=7,
        eval_batch_size=8,
        workdir=sys.argv[1],
        steps_per_dispatch=3,
    )
