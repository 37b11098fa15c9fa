"""The form "cudnn": weights in cuDNN's order and lengths by JAX's own reference of it, and what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from contract import close
from flax import nnx
from jax.experimental import rnn

from xlstm_jax import cells
from xlstm_jax.kernels import recurrent
from xlstm_jax.kernels.choice import Target

B, T, D_IN, D = 3, 6, 2, 5


def reference(x, h, c, weights, lengths, *sizes):
    """What `jax.experimental.rnn.lstm` computes, without cuDNN."""
    parts = rnn.unpack_lstm_weights(weights, *sizes[:3], sizes[4])
    return rnn.lstm_ref(x, h, c, *parts, lengths, *sizes)


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(recurrent, "target", lambda: Target("gpu"))


def gradients(form, mask):
    xs = jax.random.normal(jax.random.key(0), (B, T, D_IN))
    graphdef, params = nnx.split(cells.LSTM(D_IN, D, form=form, bias_init="normal(1)", rngs=nnx.Rngs(0)))
    state = jax.tree.map(lambda leaf: leaf + 0.5, cells.LSTM(D_IN, D, rngs=nnx.Rngs(0)).initial_state(B))

    @partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def loss(params, xs, state):
        ys, last = nnx.merge(graphdef, params)(xs, state, mask)
        return jnp.sum(jnp.sin(ys)) + jnp.sum(last.c * last.h), (ys, last)

    return jax.jit(loss)(params, xs, state)


def test_weights_and_masks(on_a_gpu, monkeypatch):
    """A mask with holes, one that is a length, and a row that has no step."""
    monkeypatch.setattr(rnn, "lstm", reference)
    mask = jnp.array([[True, False, True, True, False, True], [True] * 4 + [False] * 2, [False] * 6])
    close(gradients("cudnn", mask), gradients("scan", mask), 1e-5)


@pytest.mark.parametrize(
    ("make", "call", "message"),
    [
        (partial(cells.PeepholeLSTM, D_IN, D), {}, "cuDNN has the plain LSTM"),
        (partial(cells.CoupledLSTM, D_IN, D), {}, "cuDNN has the plain LSTM"),
        (partial(cells.LSTM, D_IN, 4, num_heads=2), {}, "one dense matrix of the inputs and one of h: no heads"),
        (partial(cells.LSTM, D_IN, D, dtype=jnp.bfloat16), {}, "in float32, not with products in bfloat16"),
        (partial(cells.LSTM, D_IN, D), {"reset": jnp.ones((B, T), bool)}, "no resets"),
    ],
    ids=["peephole", "coupled", "heads", "bfloat16", "reset"],
)
def test_what_it_cannot_do(on_a_gpu, make, call, message):
    with pytest.raises(ValueError, match=f"form='cudnn': .*{message}.*; form='fused' would serve it"):
        jax.eval_shape(lambda xs: make(form="cudnn", rngs=nnx.Rngs(0))(xs, **call), jnp.ones((B, T, D_IN)))


def test_a_gpu_is_needed():
    with pytest.raises(ValueError, match="form='cudnn': an NVIDIA GPU is needed, and this program is for a cpu; form="):
        cells.LSTM(D_IN, D, form="cudnn", rngs=nnx.Rngs(0))(jnp.ones((B, T, D_IN)))
    with pytest.raises(ValueError, match="unknown form of GRU 'cudnn'"):
        cells.GRU(D_IN, D, form="cudnn", rngs=nnx.Rngs(0))
