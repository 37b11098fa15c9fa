"""Cells beside their papers' equations, written out in numpy a step and a gate at a time; extreme and low precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_jax import cells

rng = np.random.default_rng(0)
XS = rng.normal(size=(2, 5, 3))


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def drawn(cell):
    """The cell with random float64 parameters."""
    graphdef, params = nnx.split(cell)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.7), params)
    return nnx.merge(graphdef, params)


def outputs(cell, xs):
    """By one compiled program."""
    return jax.jit(lambda xs: cell(xs)[0])(jnp.asarray(xs))


def loop(step, cell, x, *state):
    """Runs step(pre, x, *state) -> state with h last; pre(gate) is W x + b and rec(gate, v) is R v."""
    out = []
    for t in range(x.shape[1]):
        state = step(x[:, t], *state)
        out.append(state[-1])
    return np.stack(out, 1)


def shares(cell, names):
    """pre(x, gate) = W x + b, rec(v, gate) = R v, in numpy."""
    W, R, b = (np.asarray(a[...]) for a in (cell.W, cell.R, cell.b))
    n = {gate: k for k, gate in enumerate(names)}
    return lambda x, g: x @ W[:, n[g]] + b[n[g]], lambda v, g: v @ R[0, :, n[g]]


def lstm_step(cell, *, i=True, f=True, o=True, coupled=False, z_act=np.tanh, c_act=np.tanh, recurrent_gates=None):
    pre, rec = shares(cell, cell.gates)
    p = None if cell.peephole is None else np.asarray(cell.peephole[...])
    sigmoids = [gate for gate in cell.gates if gate != "z"]

    def step(x, c, h):
        def gate(name, c):
            a = pre(x, name) + rec(h, name)
            return sigmoid(a if p is None else a + p[sigmoids.index(name)] * c)

        i_t = gate("i", c) if i else 1
        f_t = 1 - i_t if coupled else (gate("f", c) if f else 1)
        c = f_t * c + i_t * z_act(pre(x, "z") + rec(h, "z"))
        return c, (gate("o", c) if o else 1) * c_act(c)

    return step


ODYSSEY = {  # Greff et al. 2017, section 3
    "V": ({}, {}),
    "NIG": (dict(input_gate=False), dict(i=False)),
    "NFG": (dict(forget_gate=False), dict(f=False)),
    "NOG": (dict(output_gate=False), dict(o=False)),
    "NIAF": (dict(input_activation=False), dict(z_act=lambda a: a)),
    "NOAF": (dict(output_activation=False), dict(c_act=lambda a: a)),
    "NP": (dict(peephole=False), {}),
    "CIFG": (dict(coupled=True), dict(coupled=True)),
}


@pytest.mark.parametrize("variant", ODYSSEY)
def test_search_space_odyssey(x64, variant):
    options, changes = ODYSSEY[variant]
    cell = drawn(cells.LSTM(3, 4, rngs=nnx.Rngs(0), param_dtype=jnp.float64, **{"peephole": True} | options))
    want = loop(lstm_step(cell, **changes), cell, XS, np.zeros((2, 4)), np.zeros((2, 4)))
    np.testing.assert_allclose(outputs(cell, XS), want, rtol=1e-10, atol=1e-12)


def test_full_gate_recurrence(x64):
    cell = drawn(cells.LSTM(3, 4, gate_recurrence=True, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    pre, rec = shares(cell, cell.gates)
    S = np.asarray(cell.S[0]).reshape(3, 4, 3, 4)  # from gate, from unit, to gate, to unit

    def step(x, gates, c, h):
        def gate(n, name):
            return sigmoid(pre(x, name) + rec(h, name) + sum(gates[m] @ S[m, :, n] for m in range(3)))

        i, f, o = gate(0, "i"), gate(1, "f"), gate(2, "o")
        c = f * c + i * np.tanh(pre(x, "z") + rec(h, "z"))
        return (i, f, o), c, o * np.tanh(c)

    zero = np.zeros((2, 4))
    want = loop(step, cell, XS, (zero,) * 3, zero, zero)
    np.testing.assert_allclose(outputs(cell, XS), want, rtol=1e-10, atol=1e-12)


def test_layer_norm_lstm(x64):
    cell = drawn(cells.LayerNormLSTM(3, 4, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    W, R, b, gain_x, gain_r = (np.asarray(a[...]) for a in (cell.W, cell.R, cell.b, cell.gain_x, cell.gain_r))

    def norm(a):
        flat = a.reshape(2, -1)
        return ((flat - flat.mean(1, keepdims=True)) / np.sqrt(flat.var(1, keepdims=True) + 1e-5)).reshape(a.shape)

    def step(x, c, h):
        a = norm(np.einsum("bi,igd->bgd", x, W)) * gain_x + norm(np.einsum("bi,igd->bgd", h, R[0])) * gain_r + b
        i, f, z, o = a.swapaxes(0, 1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(z)
        return c, sigmoid(o) * np.tanh(norm(c) * np.asarray(cell.gain_c[...]) + np.asarray(cell.bias_c[...]))

    want = loop(step, cell, XS, np.zeros((2, 4)), np.zeros((2, 4)))
    np.testing.assert_allclose(outputs(cell, XS), want, rtol=1e-9, atol=1e-10)


def test_mgu_follows_the_paper(x64):
    cell = drawn(cells.MGU(3, 4, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    pre, _ = shares(cell, cell.gates)
    U_f, U_h = np.asarray(cell.R[0, :, 0]), np.asarray(cell.S[0, :, 0])

    def step(x, h):
        f = sigmoid(pre(x, "f") + h @ U_f)
        return ((1 - f) * h + f * np.tanh(pre(x, "n") + (f * h) @ U_h),)

    np.testing.assert_allclose(outputs(cell, XS), loop(step, cell, XS, np.zeros((2, 4))), rtol=1e-10, atol=1e-12)


def test_janet_follows_the_paper(x64):
    cell = drawn(cells.JANET(3, 4, beta=0.7, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    pre, rec = shares(cell, cell.gates)

    def step(x, h):
        s = pre(x, "f") + rec(h, "f")
        return (sigmoid(s) * h + (1 - sigmoid(s - 0.7)) * np.tanh(pre(x, "z") + rec(h, "z")),)

    np.testing.assert_allclose(outputs(cell, XS), loop(step, cell, XS, np.zeros((2, 4))), rtol=1e-10, atol=1e-12)


def test_conv_gru_at_a_kernel_of_one_is_a_gru_at_each_place(x64):
    conv = drawn(cells.ConvGRU(3, 4, (1,), param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    gru = cells.GRU(3, 4, reset_after=False, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    gru.W[...], gru.R[...], gru.S[...], gru.b[...] = conv.W[0], conv.R[...], conv.S[...], conv.b[...]
    xs = rng.normal(size=(2, 5, 6, 3))
    ys, run = np.asarray(outputs(conv, xs)), jax.jit(lambda xs: gru(xs)[0])
    for place in range(6):
        np.testing.assert_allclose(ys[:, :, place], run(jnp.asarray(xs[:, :, place])), rtol=1e-10, atol=1e-12)


RULES = ["elman", "lstm", "peephole_lstm", "coupled_lstm", "layer_norm_lstm", "projected_lstm", "gru", "mgu", "janet"]
RULES += ["slstm", "gru, reset before"]


@pytest.mark.parametrize("name", RULES)
def test_extreme_gates_are_finite_and_a_reset_is_exact(name):
    """Pre-activations of +-30, and nothing of what was before a reset in values or gradients after it."""
    kind, *before = name.split(",")
    options = {"projection": 8} if kind == "projected_lstm" else {"reset_after": False} if before else {}
    cell = cells.CELLS[kind](8, 8, num_heads=2, rngs=nnx.Rngs(0), **options)
    graphdef, params = nnx.split(cell)
    keys = jax.random.split(jax.random.key(0), 3)
    xs = 1e3 * jax.random.normal(keys[0], (2, 12, 8))
    params = jax.tree.map(lambda a: 30 * jnp.sign(jax.random.normal(keys[1], a.shape)), params)
    params["R"] = params["R"].replace(0.1 * jax.random.normal(keys[2], params["R"].shape))
    params["W"] = params["W"].replace(0.03 * jnp.sign(params["W"][...]))
    reset = jnp.zeros((2, 12), bool).at[:, 6].set(True)

    @jax.jit
    def run(params, xs, state):
        def loss(params, xs, state):
            ys, last = nnx.merge(graphdef, params)(xs, state, reset=reset)
            return jnp.sum(ys[:, 6:] ** 2), (ys, last)

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(params, xs, state)

    empty = cell.initial_state(2)
    (_, (ys, last)), grads = run(params, xs, empty)
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves((ys, last, grads)))
    assert all(np.all(np.asarray(a) == 0) for a in jax.tree.leaves(grads[2])) and np.all(grads[1][:, :6] == 0)
    (_, (other, _)), _ = run(params, xs.at[:, :6].multiply(-1), jax.tree.map(lambda a: a + 1, empty))
    assert np.array_equal(ys[:, 6:], other[:, 6:])


@pytest.mark.parametrize("name", ["lstm", "gru", "slstm"])
def test_bfloat16_stays_near_float32_for_a_thousand_steps(name):
    xs = jax.random.normal(jax.random.key(1), (2, 1_000, 16))
    outputs = []
    for dtype in (jnp.float32, jnp.bfloat16):
        cell = cells.CELLS[name](16, 32, dtype=dtype, recurrent_init="orthogonal", rngs=nnx.Rngs(0))
        ys, state = jax.jit(lambda cell, xs: cell(xs))(cell, xs)
        assert ys.dtype == dtype and all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))
        outputs.append(np.asarray(ys, np.float32)[:, -100:])
    want, got = outputs
    assert np.linalg.norm(got - want) < 2e-2 * np.linalg.norm(want)


@pytest.mark.parametrize("form", ["scan", "fused"])
def test_gradients_of_weights_are_summed_in_float32(form):
    """bfloat16 products over many steps and chunks: the error does not grow with their number."""
    xs = jax.random.normal(jax.random.key(1), (2, 1_024, 8))

    def gradients(dtype):
        cell = cells.LSTM(8, 8, dtype=dtype, form=form, chunk_size=8, rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(cell)
        return jax.jit(jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p)(xs)[0].astype(jnp.float32))))(params)

    want, got = gradients(jnp.float32), gradients(jnp.bfloat16)
    for name in ("W", "R", "b"):
        w, g = np.asarray(want[name][...]), np.asarray(got[name][...])
        assert g.dtype == np.float32 and np.linalg.norm(g - w) < 2e-2 * np.linalg.norm(w)


@functools.cache
def by_steps(name):
    """The cell in its scan form, and its step as a program that all examples share."""
    options = dict(num_heads=2, recurrent_init="orthogonal", param_dtype=jnp.float64, form="scan")
    cell = cells.CELLS[name](3, 4, rngs=nnx.Rngs(0), **options)
    return cell, jax.jit(lambda x, state: cell.step(x, state))


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_shape_any_mask(data):
    """fused = scan = the valid steps alone, whatever the shapes, masks, resets and chunks."""
    name = data.draw(st.sampled_from(["lstm", "gru", "mgu", "slstm"]))
    B, T, chunk = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 10))
    flags = st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=B, max_size=B).map(np.array)
    mask, reset = data.draw(flags), data.draw(flags)
    with jax.enable_x64(True):
        options = dict(num_heads=2, recurrent_init="orthogonal", param_dtype=jnp.float64, chunk_size=chunk)
        fused = cells.CELLS[name](3, 4, form="fused", rngs=nnx.Rngs(0), **options)
        scan, step = by_steps(name)
        xs, cut = jnp.asarray(rng.normal(size=(B, T, 3))), data.draw(st.integers(0, T))

        @jax.jit
        def run(xs, mask, reset):
            pieces, state = [], None
            for part in (slice(0, cut), slice(cut, T)):
                if part.start < part.stop:
                    y, state = fused(xs[:, part], state, mask[:, part], reset[:, part])
                    pieces.append(y)
            whole = [cell(xs, mask=mask, reset=reset) for cell in (fused, scan)]
            return (*whole, jnp.concatenate(pieces, axis=1))

        (ys, last), (want, last_want), pieces = run(xs, jnp.asarray(mask), jnp.asarray(reset))
        np.testing.assert_allclose(ys, want, rtol=1e-12, atol=1e-12)
        assert np.all(np.asarray(ys)[~mask] == 0)
        np.testing.assert_allclose(pieces, ys, rtol=1e-12, atol=1e-12)
        empty = scan.initial_state(1)
        for b in range(B):
            state = empty
            for t in range(T):
                state = empty if reset[b, t] else state
                if mask[b, t]:
                    y, state = step(xs[b, t][None], state)
                    np.testing.assert_allclose(ys[b, t][None], y, rtol=1e-12, atol=1e-12)
            for leaf, alone in zip(last, state):
                np.testing.assert_allclose(leaf[b], alone[0], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(last.h, last_want.h, rtol=1e-12, atol=1e-12)
