"""The elementwise linear recurrence in its forms, and the cells made of it against loops of their papers' equations."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xlstm_jax.cells.linear import RGLRU, MinGRU, MinLSTM, root_one_minus_square
from xlstm_jax.kernels.linear import linear_recurrence, log_linear_recurrence

B, T, D = 3, 11, 4
FORMS = ("scan", "associative", "log")


def recurrence(form, chunk_size=4, **flags):
    """The form as a function of a, b >= 0 and the state."""
    if form == "log":
        return lambda a, b, state: log_linear_recurrence(jnp.log(a), jnp.log(b), state, chunk_size=chunk_size, **flags)
    return lambda a, b, state: linear_recurrence(a, b, state, form=form, chunk_size=chunk_size, **flags)


def draw(seed):
    """a in (0, 1) and b > 0, a state of any sign with a row of zeros, and flags: any mask, one row without a step."""
    keys = jax.random.split(jax.random.key(seed), 5)
    a, b = jax.random.uniform(keys[0], (B, T, D)), jnp.exp(jax.random.normal(keys[1], (B, T, D)))
    state = jax.random.normal(keys[2], (B, D)).at[0].set(0)
    mask = jax.random.bernoulli(keys[3], 0.7, (B, T)).at[B - 1].set(False)
    return (a, b, state), dict(mask=mask, reset=jax.random.bernoulli(keys[4], 0.2, (B, T)))


def test_forms_agree(x64):
    """With flags and without, T = 11 being no multiple of the chunk: values and gradients of a, b and the state."""
    arguments, flags = draw(0)
    weights = jax.random.normal(jax.random.key(1), (B, T, D))

    def everything(form, chunk_size):
        def loss(arguments, flags):
            hs, last = recurrence(form, chunk_size, **flags)(*arguments)
            return jnp.sum(weights * hs) + jnp.sum(jnp.sin(last)), (hs, last)

        both = lambda arguments: [jax.value_and_grad(loss, has_aux=True)(arguments, f) for f in (flags, {})]  # noqa: E731
        return jax.jit(both)(arguments)

    want = everything("scan", 1)
    for form, chunk_size in (("associative", 1), ("associative", 4), ("log", 4), ("associative", 100)):
        for got, expected in zip(jax.tree.leaves(everything(form, chunk_size)), jax.tree.leaves(want)):
            np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10, err_msg=f"{form} {chunk_size}")


@pytest.mark.parametrize("form", FORMS)
def test_flags_are_exact(form):
    """Nothing of what is before a reset, not even a NaN, nor of a later step; a masked step copies bit for bit."""
    (a, b, state), _ = draw(2)
    mask, reset = jnp.ones((B, T), bool).at[:, 5:9].set(False), jnp.zeros((B, T), bool).at[:, 6].set(True)
    run = recurrence(form, mask=mask, reset=reset)
    nothing = recurrence(form, mask=jnp.zeros((B, T), bool))

    @jax.jit
    def everything(a, b, state):
        late = jax.grad(lambda *args: jnp.sum(run(*args)[1]), argnums=(0, 1, 2))(a, b, state)
        early = jax.grad(lambda *args: jnp.sum(run(*args)[0][:, :4]), argnums=(0, 1))(a, b, state)
        bad = run(a, b.at[:, 2].set(jnp.nan), jnp.full_like(state, jnp.nan))
        return late, early, bad, nothing(a, b, state)[1]

    late, early, (hs, last), copied = everything(a, b, state)
    assert np.all(np.isfinite(last)) and np.all(np.isfinite(hs[:, 5:])) and np.all(np.asarray(hs[:, 5:9]) == 0)
    np.testing.assert_allclose(hs[:, 9], b[:, 9], rtol=1e-6)
    assert all(np.all(np.asarray(g[:, :9]) == 0) and np.all(np.asarray(g[:, 10]) != 0) for g in late[:2])
    assert np.all(np.asarray(late[2]) == 0) and all(np.all(np.asarray(g[:, 4:]) == 0) for g in early)
    assert np.array_equal(copied, state)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_where_the_state_or_a_step_is_zero(x64, form):
    """h_2 = a_2 (a_1 h_0 + b_1) + b_2, in logs too: d/d log a = a d/da is finite and right where b or a vanish."""
    log_a, log_b = (jnp.log(jnp.array(x, jnp.float64))[None, :, None] for x in ([0.0, 0.5], [3.0, 0.0]))

    def last(log_a, log_b, state):
        if form == "log":
            return log_linear_recurrence(log_a, log_b, state)[1].sum()
        return linear_recurrence(jnp.exp(log_a), jnp.exp(log_b), state, form=form)[1].sum()

    got = jax.jit(jax.grad(last, argnums=(0, 1, 2)))(log_a, log_b, jnp.zeros((1, 1)))
    for g, want in zip(got, ([0.0, 1.5], [1.5, 0.0], [0.0])):
        np.testing.assert_allclose(np.ravel(g), want, atol=1e-15)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gru_step(cell, x, h, pre):
    z, candidate = pre
    return (1 - sigmoid(z)) * h + sigmoid(z) * candidate_value(cell, candidate)


def lstm_step(cell, x, h, pre):
    f, i, candidate = sigmoid(pre[0]), sigmoid(pre[1]), candidate_value(cell, pre[2])
    return f / (f + i) * h + i / (f + i) * candidate


def candidate_value(cell, candidate):
    return np.where(candidate >= 0, candidate + 0.5, sigmoid(candidate)) if cell.log_space else candidate


def lru_step(cell, x, h, pre):
    a = sigmoid(-np.asarray(cell.Lambda[...])) ** (8 * sigmoid(pre[0]))
    return a * h + np.sqrt(1 - a**2) * sigmoid(pre[1]) * x


CELLS = {
    "min_gru": (lambda **o: MinGRU(3, 4, **o), gru_step),
    "min_gru_plain": (lambda **o: MinGRU(3, 4, log_space=False, **o), gru_step),
    "min_lstm": (lambda **o: MinLSTM(3, 4, **o), lstm_step),
    "min_lstm_plain": (lambda **o: MinLSTM(3, 4, log_space=False, use_bias=False, **o), lstm_step),
    "rglru": (lambda **o: RGLRU(4, 4, num_heads=2, **o), lru_step),
    "rglru_projected": (lambda **o: RGLRU(3, 4, num_heads=1, **o), lru_step),
}


@pytest.mark.parametrize("name", CELLS)
def test_cells_are_their_papers_equations(x64, name):
    """A loop over steps and heads, with masked steps and resets."""
    make, step = CELLS[name]
    cell = make(param_dtype=jnp.float64, chunk_size=4, rngs=nnx.Rngs(0))
    keys = jax.random.split(jax.random.key(1), 5)
    xs = jax.random.normal(keys[0], (2, 9, cell.in_features), jnp.float64)
    mask, reset = jax.random.bernoulli(keys[1], 0.7, (2, 9)), jax.random.bernoulli(keys[2], 0.2, (2, 9))
    state = cell.State(jax.random.normal(keys[3], (2, 4), jnp.float64))
    if cell.b is not None:
        cell.b[...] = cell.b[...] + jax.random.normal(keys[4], cell.b.shape)
    got, last = jax.jit(lambda cell, *args: cell(*args))(cell, xs, state, mask, reset)

    projection = getattr(cell, "projection", None)
    inputs = np.asarray(xs) if projection is None else np.asarray(xs) @ np.asarray(projection.kernel[...])
    W, h, N = np.asarray(cell.W[...]), np.array(state.h), cell.num_heads
    E, F = W.shape[0], 4 // N
    ys = np.zeros((2, 9, 4))
    for row in range(2):
        for t in range(9):
            x = inputs[row, t]
            pre = np.zeros((W.shape[1], 4)) if cell.b is None else np.array(cell.b[...])
            for n in range(N):
                own = slice(n * F, (n + 1) * F)
                pre[:, own] += np.einsum("e,egf->gf", x[n * E : (n + 1) * E], W[:, :, own])
            h[row] = 0 if reset[row, t] else h[row]
            if mask[row, t]:
                h[row] = ys[row, t] = step(cell, x, h[row], pre)
    np.testing.assert_allclose(got, ys, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(last.h, h, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["min_gru", "min_lstm", "rglru"])
def test_extreme_gates_are_finite(name):
    """All parameters at +-30 and +-1000: values and gradients, across resets, in every form."""
    make, _ = CELLS[name]
    keys = jax.random.split(jax.random.key(0), 9)
    reset = jax.random.bernoulli(keys[1], 0.2, (2, 24))
    cells = [make(form=form, chunk_size=8, rngs=nnx.Rngs(0)) for form in (FORMS[:2] if name == "rglru" else FORMS)]
    xs = jax.random.normal(keys[0], (2, 24, cells[0].in_features))
    params = nnx.state(cells[0])
    leaves, treedef = jax.tree.flatten(params)
    signs = [jnp.sign(jax.random.normal(key, leaf.shape)) for key, leaf in zip(keys[2:], leaves)]

    def loss(params, xs, graphdef):
        ys, state = nnx.merge(graphdef, params)(xs, reset=reset)
        return jnp.sum(ys**2) + jnp.sum(state.h)

    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    run = jax.jit(lambda params, xs: [gradient(params, xs, nnx.graphdef(cell)) for cell in cells])
    for size in (30.0, 1000.0):
        got = run(jax.tree.unflatten(treedef, [size * sign for sign in signs]), xs)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(got)), size


def test_the_root_has_its_true_gradient_where_a_is_near_one():
    """sqrt(1 - a^2) -> sqrt(2 s r), log a = -s r, r = sigmoid(p): its gradient by p is half of it, and 0 in the end."""
    p = jnp.array([-20.0, -60.0, -80.0, -1000.0])
    root = lambda p: root_one_minus_square(-0.1 * jax.nn.sigmoid(p))  # noqa: E731
    value, slope = jax.jit(jax.vmap(jax.value_and_grad(root)))(p)
    np.testing.assert_allclose(value, np.sqrt(0.2 * np.exp(np.float64(p))), rtol=1e-5)
    np.testing.assert_allclose(slope, value / 2, rtol=1e-5)


def test_initial_values():
    cell = RGLRU(256, 256, rngs=nnx.Rngs(0))
    assert cell.W.shape == (64, 2, 256) and cell.projection is None and cell.Lambda.shape == (256,)
    decay = np.exp(-8 * np.log1p(np.exp(np.float64(cell.Lambda[...]))))  # a^c
    assert 0.8999 < decay.min() < 0.905 and 0.994 < decay.max() < 0.9991
    np.testing.assert_allclose(np.quantile(decay, [0.25, 0.5, 0.75]), [0.925, 0.95, 0.974], atol=0.01)
    assert 0.9 / 8 < float(jnp.std(cell.W[...])) < 1.1 / 8  # 1 / sqrt(inputs of a head)
    assert RGLRU(3, 8, rngs=nnx.Rngs(0)).projection.kernel.shape == (3, 8)
    assert np.array_equal(MinLSTM(3, 2, forget_bias=2.5, rngs=nnx.Rngs(0)).b[...], [[2.5] * 2, [0] * 2, [0] * 2])
    assert MinGRU(3, 2, use_bias=False, rngs=nnx.Rngs(0)).b is None
    assert np.all(MinGRU(3, 2, bias_init=0.5, rngs=nnx.Rngs(0)).b[...] == 0.5)


XS = jnp.ones((2, 5, 3))
BAD = {
    "form": (lambda: MinGRU(3, 4, form="fused", rngs=nnx.Rngs(0)), "unknown form of MinGRU 'fused'"),
    "log of negative": (
        lambda: MinLSTM(3, 4, log_space=False, form="log", rngs=nnx.Rngs(0)),
        "form='log' needs log_space=True",
    ),
    "log of RG-LRU": (lambda: RGLRU(4, 4, form="log", rngs=nnx.Rngs(0)), "unknown form of RGLRU 'log'"),
    "heads": (lambda: RGLRU(3, 6, num_heads=4, rngs=nnx.Rngs(0)), "num_heads=4 must divide features=6"),
    "heads of inputs": (lambda: MinGRU(3, 4, num_heads=2, rngs=nnx.Rngs(0)), "num_heads=2 must divide in_features=3"),
    "no heads": (lambda: MinGRU(3, 4, num_heads=0, rngs=nnx.Rngs(0)), "num_heads is 0: an integer"),
    "width": (lambda: MinLSTM(3, 0, rngs=nnx.Rngs(0)), "features is 0: an integer of at least 1"),
    "width of inputs": (lambda: RGLRU(0, 4, rngs=nnx.Rngs(0)), "in_features is 0: an integer of at least 1"),
    "decay": (
        lambda: RGLRU(4, 4, decay_range=(0.9, 1.0), rngs=nnx.Rngs(0)),
        r"decay_range must be .* not \(0.9, 1",
    ),
    "initialiser": (lambda: MinGRU(3, 4, kernel_init="glorto", rngs=nnx.Rngs(0)), "unknown initialiser 'glorto'"),
    "chunk": (lambda: MinGRU(3, 4, chunk_size=0, rngs=nnx.Rngs(0)), "chunk_size is 0: an integer"),
    "state of another cell": (
        lambda: unchecked(MinGRU.__call__)(
            MinGRU(3, 4, rngs=nnx.Rngs(0)), XS, MinLSTM(3, 4, rngs=nnx.Rngs(0)).initial_state(2)
        ),
        "must be a MinGRUState, not a MinLSTMState",
    ),
    "state of another width": (
        lambda: MinGRU(3, 4, rngs=nnx.Rngs(0))(XS, MinGRU(3, 5, rngs=nnx.Rngs(0)).initial_state(2)),
        r"state.h must be float32 of the shape \(2, 4\) for these inputs, not float32 \(2, 5\)",
    ),
    "kernel form": (lambda: recurrence("log2")(XS, XS, XS[:, 0]), "unknown form of a linear recurrence 'log2'"),
    "kernel state": (
        lambda: recurrence("scan")(XS, XS, XS[:, 0, :2]),
        r"state must have the shape \(2, 3\), not \(2, 2",
    ),
    "kernel shapes": (lambda: recurrence("scan")(XS, XS[:, :4], XS[:, 0]), r"not \(2, 5, 3\) and \(2, 4, 3\)"),
}


def unchecked(function):
    """The function as users have it, without the run-time annotations that pytest adds."""
    return inspect.unwrap(function)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_says_what_is_wrong(case, monkeypatch):
    build, message = BAD[case]
    for name in ("linear_recurrence", "log_linear_recurrence"):
        for module in ("xlstm_jax.cells.linear", __name__):
            monkeypatch.setattr(f"{module}.{name}", unchecked(globals()[name]))
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)
