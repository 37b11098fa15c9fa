"""The gradient-flow lab against explicit products of Jacobians, bounds from theory, and known maps."""

import inspect
import json
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array, Float, Int

from experiments import gradient_flow
from xlstm_jax import analysis, cells, models
from xlstm_jax.cells.base import Cell

B, T, D = 2, 4, 4


class CountingState(NamedTuple):
    h: Float[Array, "B D"]
    steps: Int[Array, " B"]


class LinearCell(Cell):
    """h_t = A h_{t-1} + x_t, with a counter beside it: any cell under the contract, gates or none, will do."""

    def __init__(self, A):
        self.A = nnx.Param(A)

    def initial_state(self, batch_size):
        return CountingState(jnp.zeros((batch_size, len(self.A))), jnp.zeros(batch_size, int))

    def __call__(self, xs, state=None, mask=None, reset=None, *, key=None):
        def body(state, x):
            h = state.h @ self.A[...].T + x
            return CountingState(h, state.steps + 1), h

        state = self.initial_state(xs.shape[0]) if state is None else state
        state, ys = jax.lax.scan(body, state, jnp.swapaxes(xs, 0, 1))
        return jnp.swapaxes(ys, 0, 1), state


def make(name, width=D, **options):
    return cells.CELLS[name](3, width, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)


def noise(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape))


def elman(scale):
    """R is `scale` times an orthogonal matrix."""
    return make("elman", 8, recurrent_init=f"orthogonal({scale})", form="scan")


def last_output(ys):
    return jnp.sum(ys[:, -1] * jnp.arange(1.0, 1 + ys.shape[-1])[None])


def compiled(function, cell, xs, *rest):
    """function(cell, xs, *rest) as one program: step by step it is a hundred."""
    return jax.jit(lambda xs: function(cell, xs, *rest))(xs)


def norms_of(cell, xs):
    return analysis.gradient_norms(analysis.state_gradients(cell, xs, last_output))


@pytest.mark.parametrize("name", ["lstm", "slstm", "mlstm"])
def test_state_gradients_are_products_of_jacobians(x64, name):
    cell, xs = make(name, form={"mlstm": "recurrent"}.get(name, "scan"), num_heads=2), noise(B, T, 3)
    gradients = compiled(analysis.state_gradients, cell, xs, last_output)
    got = np.concatenate([np.reshape(gradients[field], (B, T, -1)) for field in cell.initial_state(1)._fields], axis=-1)

    jacobian, step = jax.jit(analysis.state_jacobian), jax.jit(lambda cell, x, state: cell.step(x, state))
    states, jacobians = [cell.initial_state(B)], []
    for t in range(T):
        jacobians.append(jacobian(cell, xs[:, t : t + 1], states[t]))
        states.append(step(cell, xs[:, t], states[t])[1])
    last = jax.jit(jax.grad(lambda state: last_output(cell.step(xs[:, -1], state)[0][:, None])))(states[-2])
    want = np.concatenate([np.reshape(leaf, (B, -1)) for leaf in last], axis=-1)
    for t in reversed(range(T)):
        np.testing.assert_allclose(got[:, t], want, rtol=1e-10, atol=1e-12)
        want = np.einsum("bi,bij->bj", want, jacobians[t - 1])
    if name == "lstm":  # and over a span
        whole = jacobians[3] @ jacobians[2] @ jacobians[1] @ jacobians[0]
        np.testing.assert_allclose(jacobian(cell, xs), whole, rtol=1e-10, atol=1e-12)


def test_vanishing(x64):
    """|J| <= 0.5 |tanh'| <= 0.5, so k steps back at most 0.5^k is left; no singular value is above 0.5."""
    cell, xs = elman(0.5), noise(B, 40, 3)
    norms = np.asarray(compiled(norms_of, cell, xs)["state"])
    assert np.all(norms[:, :-1] <= 0.5 * norms[:, 1:])
    assert np.all(norms[:, 0] <= 0.5**40 * np.linalg.norm(np.arange(1, 9))) and np.all(norms > 0)
    spectrum = analysis.state_jacobian_spectrum(cell, xs[:, :1])
    assert spectrum.singular_values.shape == (B, 8) and spectrum.singular_values.max() <= 0.5 + 1e-12
    assert np.all(spectrum.eigenvalue_moduli[:, 0] <= spectrum.singular_values[:, 0] + 1e-12)
    assert np.all(compiled(analysis.lyapunov_exponents, cell, xs) <= math.log(0.5) + 1e-12)


def test_exploding(x64):
    """While |h| < e, each step stretches every direction by at least 2 (1 - e^2)."""
    cell, xs = elman(2.0), 1e-9 * noise(B, 20, 3)
    norms, ys = jax.jit(lambda xs: (norms_of(cell, xs)["h"], cell(xs)[0]))(xs)
    norms, largest = np.asarray(norms), np.abs(ys).max()
    assert largest < 0.01  # the linear regime
    assert np.all(norms[:, :-1] >= 2 * (1 - largest**2) * norms[:, 1:])
    assert np.all(norms[:, 0] >= 1.99**19 * norms[:, -1])


def test_the_lstm_keeps_what_its_forget_gate_keeps(x64):
    """Without R, dL/dc_t = f_t dL/dc_{t+1}: the error carousel. f lies within sigmoid(bias +- w)."""
    xs, kept = noise(B, 100, 3), {}
    for bias in (0.0, 10.0):
        cell = make("lstm", recurrent_init="zeros", forget_bias=bias, form="scan")
        gradient = np.asarray(compiled(analysis.state_gradients, cell, xs, last_output)["c"])
        log_f = np.asarray(compiled(analysis.log_forget, cell, xs))
        kept[bias] = gradient / gradient[:, -1:]
        product = np.exp(np.cumsum(log_f[:, -2::-1], axis=1)[:, ::-1])
        np.testing.assert_allclose(kept[bias][:, :-1], product, rtol=1e-9)
    w = np.abs(np.asarray(xs) @ np.asarray(cell.W[:, 1])).max()
    assert np.all(kept[10.0][:, 0] >= jax.nn.sigmoid(10 - w) ** 99) and np.all(
        kept[0.0][:, 0] <= jax.nn.sigmoid(w) ** 99
    )
    assert kept[10.0].min() > 0.5 > 1e-3 > kept[0.0][:, 0].max()


def test_known_spectrum(x64):
    A = jnp.asarray([[3.0, 0.0, 4.0], [0.0, 0.5, 0.0], [0.0, 0.0, 1e-3]])
    cell, xs = LinearCell(A), noise(B, 5, 3)
    np.testing.assert_allclose(compiled(analysis.state_jacobian, cell, xs[:, :1]), np.stack([A, A]), rtol=1e-12)
    for steps in (1, 5):
        spectrum, power = analysis.state_jacobian_spectrum(cell, xs[:, :steps]), np.linalg.matrix_power(A, steps)
        np.testing.assert_allclose(spectrum.singular_values[1], np.linalg.svd(power)[1], rtol=1e-9, atol=1e-12)
        moduli = [each**steps for each in (3.0, 0.5, 1e-3)]
        np.testing.assert_allclose(spectrum.eigenvalue_moduli[1], moduli, rtol=1e-9, atol=1e-12)
    turned = LinearCell(jnp.asarray(np.diag([0.5, 3.0, 1e-3])))
    exponents = compiled(analysis.lyapunov_exponents, turned, noise(B, 300, 3))
    np.testing.assert_allclose(exponents, np.tile(np.log([[3.0, 0.5, 1e-3]]), (B, 1)), rtol=1e-12)
    gradients = compiled(analysis.state_gradients, cell, xs, last_output)
    assert gradients.keys() == {"h"}  # the counter has no gradient
    want = np.arange(1.0, 4) @ np.linalg.matrix_power(A, 4)
    np.testing.assert_allclose(gradients["h"][1, 1], want, rtol=1e-12)


def test_rows_are_told_from_repeated_layers(x64):
    """A stack that repeats its layers has states (repeats, B, ...)."""
    layers = [cells.LSTM(D, D, param_dtype=jnp.float64, form="scan", rngs=nnx.Rngs(seed)) for seed in (0, 1)]
    stack, xs = cells.Stack(layers, pattern=("lstm", "lstm")), noise(B, 3, D)
    mask, reset = jnp.array([[True, False, True]] * B), jnp.array([[False, False, True], [False, True, False]])
    rows = jax.jit(lambda xs, mask, reset: analysis.state_gradients(stack, xs, last_output, None, mask, reset))
    found, flipped = rows(xs, mask, reset), rows(*(each[::-1] for each in (xs, mask, reset)))
    assert found.keys() == {"0.c", "0.h"} and found["0.c"].shape == (B, 3, 2, D)
    for field in found:
        np.testing.assert_allclose(found[field], flipped[field][::-1], rtol=1e-12)
        assert np.all(found[field][0] == 0) and np.all(found[field][1, :2] == 0)  # nothing crosses a reset
    assert np.all(found["0.c"][1, 2] != 0)
    jacobian = jax.jit(lambda xs: analysis.state_jacobian(stack, xs))
    assert jacobian(xs).shape == (B, 4 * D, 4 * D)
    np.testing.assert_allclose(jacobian(xs), jacobian(xs[::-1])[::-1], rtol=1e-12)


def test_gradients_of_a_token_model():
    model = models.Tagger(7, 5, backbone="gru", dim=8, num_layers=1, rngs=nnx.Rngs(0))
    gradients = compiled(analysis.state_gradients, model, jnp.ones((B, T), int), last_output)
    assert [gradient.shape for gradient in gradients.values()] == [(B, T, 8)]


@pytest.mark.parametrize(
    "name, gate, sign", [("slstm", "f", 1), ("gru", "z", 1), ("mgu", "f", -1), ("coupled_lstm", "i", -1)]
)
def test_gate_preactivations(x64, name, gate, sign):
    """W x_t + R h_{t-1} + b with h from the outputs, and the share that the gate keeps."""
    cell, xs = (
        make(name, **({"num_heads": 2, "recurrent_init": "orthogonal"} if name == "slstm" else {})),
        noise(B, T, 3),
    )

    @jax.jit
    def run(xs):
        late = analysis.gate_preactivations(cell, xs[:, 1:], cell(xs[:, :1])[1])
        return cell(xs)[0], analysis.gate_preactivations(cell, xs), analysis.log_forget(cell, xs), late

    ys, found, log_f, late = run(xs)
    h = np.concatenate([np.zeros((B, 1, D)), ys[:, :-1]], axis=1)
    n = cell.gates.index(gate)
    N = cell.num_heads
    W, R, b = (np.asarray(leaf[...]) for leaf in (cell.W, cell.R, cell.b))
    recurrent = np.concatenate([h[..., k * D // N : (k + 1) * D // N] @ R[k, :, n] for k in range(N)], axis=-1)
    want = np.asarray(xs) @ W[:, n] + recurrent + b[n]
    np.testing.assert_allclose(found[gate], want, rtol=1e-10, atol=1e-12)
    assert not {"n", "h"} & found.keys() and ("z" in found) == (name == "gru")
    np.testing.assert_allclose(np.exp(log_f), sigmoid(sign * want), rtol=1e-10)
    np.testing.assert_allclose(late[gate], want[:, 1:])


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def lstm_gates(cell, xs, clip=np.inf, zoneout=0.0):
    """Pre-activations of i, f, o (3, B, T, D) step by step, in numpy."""
    W, R, b = (np.asarray(a[...]) for a in (cell.W, cell.R[0], cell.b))
    c, h, seen, steps = np.zeros((B, D)), np.zeros((B, D)), np.zeros((B, 3 * D)), []

    def normalized(a, gain, axes):
        return (a - a.mean(axes, keepdims=True)) / np.sqrt(a.var(axes, keepdims=True) + 1e-5) * np.asarray(gain)

    for x in np.moveaxis(np.asarray(xs), 1, 0):
        x, r = np.einsum("be,egd->bgd", x, W), np.einsum("be,egd->bgd", h, R)
        if cell.layer_norm:
            x, r = normalized(x, cell.gain_x[...], (1, 2)), normalized(r, cell.gain_r[...], (1, 2))
        i, f, z, o = np.moveaxis(x + r + b, 1, 0)
        if cell.S is not None:
            i, f, o = (a + seen @ np.asarray(cell.S[0, :, n]) for n, a in enumerate((i, f, o)))
        p_i, p_f, p_o = np.zeros((3, D)) if cell.peephole is None else np.asarray(cell.peephole[...])
        i, f, z = (np.clip(a, -clip, clip) for a in (i + p_i * c, f + p_f * c, z))
        new = sigmoid(f) * c + sigmoid(i) * np.tanh(z)
        o = np.clip(o + p_o * new, -clip, clip)
        out = normalized(new, cell.gain_c[...], -1) + np.asarray(cell.bias_c[...]) if cell.layer_norm else new
        h = zoneout * h + (1 - zoneout) * sigmoid(o) * np.tanh(out)
        c, seen = zoneout * c + (1 - zoneout) * new, sigmoid(np.concatenate([i, f, o], axis=-1))
        steps.append((i, f, o))
    return np.moveaxis(np.array(steps), 0, 2)


@pytest.mark.parametrize(
    "options", [{"peephole": True, "gate_clip": 0.9, "zoneout": 0.3}, {"layer_norm": True}, {"gate_recurrence": True}]
)
def test_gates_of_an_lstm_with_options(x64, options):
    cell, xs = make("lstm", form="scan", **options), noise(B, T, 3)
    for n, name in enumerate(("peephole", "gain_x", "gain_r", "gain_c", "bias_c")):
        if getattr(cell, name, None) is not None:
            weight = getattr(cell, name)
            weight[...] = jax.random.normal(jax.random.key(n), weight.shape)
    want = lstm_gates(cell, xs, options.get("gate_clip", np.inf), options.get("zoneout", 0.0))
    found = compiled(analysis.gate_preactivations, cell, xs)
    assert found.keys() == {"i", "f", "o"}
    for name, a in zip("ifo", want):
        np.testing.assert_allclose(found[name], a, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(np.exp(compiled(analysis.log_forget, cell, xs)), sigmoid(want[1]), rtol=1e-9)


def test_gates_of_linear_cells(x64):
    xs = noise(B, T, 3)

    def check(cell, want, keeps):
        functions = analysis.gate_preactivations, analysis.gate_saturation, analysis.log_forget
        found, saturation, log_f = jax.jit(lambda xs: [function(cell, xs) for function in functions])(xs)
        assert found.keys() == want.keys() == saturation.keys()
        for gate, a in want.items():
            np.testing.assert_allclose(found[gate], a, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(np.exp(log_f), keeps, rtol=1e-9)

    def gate(cell, xs, n):
        return np.asarray(xs) @ np.asarray(cell.W[:, n]) + np.asarray(cell.b[n])

    cell = make("min_gru")
    z = gate(cell, xs, 0)
    check(cell, {"z": z}, 1 - sigmoid(z))
    cell = make("min_lstm")
    f, i = gate(cell, xs, 0), gate(cell, xs, 1)
    check(cell, {"f": f, "i": i}, sigmoid(f) / (sigmoid(f) + sigmoid(i)))
    cell = make("rglru", num_heads=1)
    inside = np.asarray(xs) @ np.asarray(cell.projection.kernel[...])
    r, i = gate(cell, inside, 0), gate(cell, inside, 1)
    check(cell, {"r": r, "i": i}, np.exp(-8 * np.log1p(np.exp(np.asarray(cell.Lambda[...]))) * sigmoid(r)))


def test_gates_of_the_mlstm(x64):
    cell, xs = make("mlstm", num_heads=2, forget_bias="linspace(-30, 30)"), noise(B, T, 3)
    found = analysis.gate_saturation(cell, xs)
    assert found.keys() == {"f", "o"}  # an exponential gate has no ceiling
    np.testing.assert_allclose(found["f"], np.full((2, T), 0.5))  # one head closed, one open
    assert analysis.gate_saturation(make("mlstm", input_gate="sigmoid"), xs).keys() == {"i", "f", "o"}
    half_lives = analysis.half_life_of_log(analysis.log_forget(cell, xs))
    np.testing.assert_allclose(half_lives[0, 0], [math.log(2) / 30, math.log(2) * math.exp(30)], rtol=1e-9)


def test_half_life(x64):
    f = jnp.array([0.0, 0.5, 0.5 ** (1 / 500), 1.0, 1.5, -0.5])
    np.testing.assert_allclose(analysis.half_life(f), [0, 1, 500, np.inf, np.inf, np.nan], rtol=1e-9)
    np.testing.assert_allclose(analysis.half_life_of_log(-1e-20), math.log(2) * 1e20)


def test_norms_neither_underflow_nor_overflow():
    small, large = jnp.array([[[3e-30, 4e-30]]]), jnp.array([[[3e30, 4e30]]])
    norms = analysis.gradient_norms({"a": small, "b": large, "c": jnp.zeros((1, 1, 2))})
    np.testing.assert_allclose(
        [norms[name][0, 0] for name in ("a", "b", "c", "state")], [5e-30, 5e30, 0, 5e30], rtol=1e-6
    )


def refuse(message, function, *args, **options):
    with pytest.raises(ValueError, match=message):
        function(*args, **options)


def test_bad_inputs():
    lstm, xs = cells.LSTM(3, D, rngs=nnx.Rngs(0)), jnp.zeros((B, T, 3))
    gradients = inspect.unwrap(analysis.state_gradients)  # without the run-time annotations that pytest adds
    refuse(r"loss must return one number, not an array of the shape \(2, 4\)", gradients, lstm, xs, lambda ys: ys[:, 0])
    refuse("xs must be .* with T at least 1, not", gradients, lstm, xs[:, :0], jnp.sum)
    refuse(
        r"mask must be bool of the shape \(2, 4\), not bool \(2, 3\)",
        gradients,
        lstm,
        xs,
        jnp.sum,
        None,
        xs[:, 1:, 0] == 0,
    )
    refuse("reset must be bool", gradients, lstm, xs, jnp.sum, reset=xs[..., 0])
    refuse(
        r"state.c must be float32 of the shape \(2, 4\) for these inputs, not float32 \(3, 4\)",
        gradients,
        lstm,
        xs,
        jnp.sum,
        lstm.initial_state(B + 1),
    )
    both = cells.Bidirectional(lstm, cells.LSTM(3, D, rngs=nnx.Rngs(1)))
    refuse("Bidirectional has no step", gradients, both, xs, jnp.sum)
    wide = cells.MLSTM(3, 64, rngs=nnx.Rngs(0))
    for function in (analysis.state_jacobian, analysis.state_jacobian_spectrum, analysis.lyapunov_exponents):
        refuse("this MLSTM has 1092 numbers a row, .* at most 1024", function, wide, xs)
    refuse("LinearCell is no RecurrentCell", analysis.gate_preactivations, LinearCell(jnp.eye(3)), xs)
    elman = cells.Elman(3, D, rngs=nnx.Rngs(0))
    refuse("Elman has no gates", analysis.gate_preactivations, elman, xs)
    refuse("Elman has no forget gate", analysis.log_forget, elman, xs)
    refuse("has no forget gate", analysis.log_forget, cells.LSTM(3, D, forget_gate=False, rngs=nnx.Rngs(0)), xs)
    refuse("0 <= low < high <= 1, not 0.9 and 0.1", analysis.gate_saturation, lstm, xs, low=0.9, high=0.1)


def test_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gradient_flow, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(gradient_flow, "ROWS", gradient_flow.ROWS[:1])  # the GRU stands for itself
    flags = [f"--workdir={tmp_path}", "--steps=21", "--dim=4", "--batch=2", "--task=parity", "--cells=elman,gru"]
    assert gradient_flow.main(flags) == 0
    shown = capsys.readouterr().out
    assert "lag    21" in shown and shown.rstrip().endswith("gradient_flow.jsonl")
    assert (tmp_path / "gradient_flow.png").stat().st_size > 10_000
    rows = [json.loads(line) for line in (tmp_path / "gradient_flow.jsonl").read_text().splitlines()]
    assert [row["config"]["cell"] for row in rows] == ["elman", "gru"]
    assert rows[0]["precision"]["x64"] and rows[0]["lags"] == [1, 10, 20]
    assert (
        rows[0]["half_life"] is None and len(rows[-1]["half_life"]) == 5 and rows[-1]["saturation"].keys() == {"r", "z"}
    )


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--cells=lsmt", "unknown cell 'lsmt'; nearest: lstm"),
        ("--cells=conv_lstm", "--cells=conv_lstm: this laboratory feeds vectors to cells of one width"),
        ("--cells=projected_lstm", "it takes elman, lstm,"),
        ("--task=parrity", "unknown task 'parrity'; nearest: parity"),
        ("--steps=1", "--steps=1: at least 2 is needed"),
        ("--batch=0", "--batch=0: at least 1 is needed"),
        ("--stepz=3", "--stepz=3"),
    ],
)
def test_figure_refuses(tmp_path, monkeypatch, capsys, flag, message):
    monkeypatch.setattr(gradient_flow, "use_compilation_cache", lambda: None)
    assert gradient_flow.main([f"--workdir={tmp_path / 'none'}", "--steps=4", flag]) == 2
    assert message in capsys.readouterr().err


def test_a_task_asks_for_its_own_loss(x64):
    """Parity wants an answer at the last step alone: L is its cross-entropy there, without a gradient to others."""
    asked = gradient_flow.question(gradient_flow.Settings(steps=6, dim=3, batch=2, seed=0, task="parity"))
    ys = np.random.default_rng(0).normal(size=(2, asked.xs.shape[1], 3))
    logits = ys[:, -1] @ np.asarray(asked.head)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    want = -sum(log_p[row, asked.targets[row, -1]] for row in range(2))
    loss, gradient = jax.jit(jax.value_and_grad(asked.loss))(ys)
    np.testing.assert_allclose(loss, want, rtol=1e-12)
    assert not np.asarray(gradient)[:, :-1].any()
