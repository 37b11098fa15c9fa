"""The optimiser: schedule, decay mask, arguments that cannot be meant."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xlstm_jax import optim

SETTINGS = {"learning_rate": 1e-2, "steps": 10}


def rates(steps, **settings):
    tx = optim.make(**(SETTINGS | {"steps": steps} | settings))
    params = {"W": jnp.ones((2, 2))}
    state, found = tx.init(params), []
    for _ in range(steps):
        _, state = tx.update(params, state, params)
        found.append(float(optim.learning_rate(state)))
    return np.asarray(found)


def test_warm_up_then_cosine_to_the_minimum():
    found = rates(100, warmup_steps=4, min_learning_rate=1e-3)
    np.testing.assert_allclose(found[:5], [2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2], rtol=1e-3)
    assert np.all(np.diff(found[5:]) < 0)
    np.testing.assert_allclose(found[52], 5.5e-3, rtol=1e-3)
    np.testing.assert_allclose(found[-1], 1e-3, rtol=1e-2)


def test_constant_schedule():
    np.testing.assert_allclose(rates(6, warmup_steps=2, schedule="constant"), [5e-3] + [1e-2] * 5, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "decays"),
    [
        ("backbone.blocks.0.mixer.W", True),
        ("head.kernel", True),
        ("mixer.conv.kernel", True),
        ("backbone.blocks.0.mixer.R", False),
        ("mixer.recurrent_kernel", False),
        ("mixer.b", False),
        ("mixer.b_hn", False),
        ("mixer.f.bias", False),
        ("norm.scale", False),
        ("norm.weight", False),
        ("mixer.skip", False),
        ("embedding.embedding", False),
        ("embedding.kernel", False),
    ],
)
def test_only_matrices_decay(name, decays):
    assert optim.decays(name) is decays


def test_decay_is_decoupled_and_masked():
    tx = optim.make(**SETTINGS, schedule="constant", weight_decay=0.5)
    params = {"W": jnp.ones((2, 2)), "R": jnp.ones((2, 2)), "b": jnp.ones(2)}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["W"], 1 - 1e-2 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(new["R"], 1)
    np.testing.assert_array_equal(new["b"], 1)


def test_clip_is_to_the_global_norm():
    tx = optim.make("sgd", learning_rate=1.0, steps=1, schedule="constant", clip=1.0)
    params = {"W": jnp.zeros(1), "b": jnp.zeros(1)}
    updates, _ = tx.update({"W": jnp.full(1, 3.0), "b": jnp.full(1, 4.0)}, tx.init(params), params)
    np.testing.assert_allclose([updates["W"][0], updates["b"][0]], [-0.6, -0.8], rtol=1e-6)


def test_exponential_then_linear_cooldown_to_zero():
    found = rates(20, warmup_steps=4, cooldown_steps=6, schedule="exponential", min_learning_rate=1e-3)
    decay = 1e-2 * 0.1 ** (np.arange(11) / 10)  # counts 4 .. 14
    np.testing.assert_allclose(found[:4], 1e-2 * np.arange(1, 5) / 4, rtol=1e-5)
    np.testing.assert_allclose(found[4:15], decay, rtol=1e-5)
    np.testing.assert_allclose(found[14:], 1e-3 * np.arange(6, 0, -1) / 6, rtol=1e-5)


def test_warm_up_stable_decay():
    found = rates(12, warmup_steps=2, cooldown_steps=5, schedule="wsd", min_learning_rate=2e-3)
    np.testing.assert_allclose(found[:8], [5e-3] + [1e-2] * 7, rtol=1e-5)
    np.testing.assert_allclose(found[7:], 2e-3 + 8e-3 * np.arange(5, 0, -1) / 5, rtol=1e-5)


def updates(name, gradients, params, **settings):
    """The updates at a constant learning rate of 1, without a clip, one for each of the gradients."""
    settings = {"learning_rate": 1.0, "steps": 9, "schedule": "constant", "clip": None} | settings
    tx, found = optim.make(name, **settings), []
    state = tx.init(params)
    for each in gradients:
        new, state = tx.update(each, state, params)
        found.append(new)
    return found


def test_lion_against_numpy():
    draws = np.random.default_rng(0).normal(size=(3, 4, 3)).astype(np.float32)
    params, momentum = {"W": jnp.full((4, 3), 2.0)}, np.zeros((4, 3))
    for found, g in zip(updates("lion", [{"W": g} for g in draws], params, weight_decay=0.1), draws, strict=True):
        np.testing.assert_allclose(found["W"], -np.sign(0.9 * momentum + 0.1 * g) - 0.1 * 2, rtol=1e-5)
        momentum = 0.99 * momentum + 0.01 * g


def test_sgd_with_momentum_against_numpy():
    found = updates("sgd", [{"b": jnp.ones(2)}, {"b": jnp.zeros(2)}], {"b": jnp.zeros(2)}, momentum=0.9)
    np.testing.assert_allclose([each["b"][0] for each in found], [-1, -0.9], rtol=1e-6)
    np.testing.assert_array_equal(updates("sgd", [{"b": jnp.ones(2)}] * 2, {"b": jnp.zeros(2)})[1]["b"], -1)


def quintic(x):
    """Five steps of Muon's iteration towards the nearest orthogonal matrix."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def test_muon_makes_each_matrix_orthogonal_by_itself_and_leaves_the_rest_to_adamw():
    shapes = {
        "layers.0.up.kernel": (2, 3, 5),  # two stacked layers
        "layers.0.q.kernel": (2, 4, 3, 3),  # of four heads
        "layers.0.W": (2, 3, 4, 5),  # four gates
        "layers.0.R": (2, 2, 5, 4, 5),
        "layers.0.conv.kernel": (2, 4, 6),
        "layers.0.b": (2, 4, 5),
        "head.kernel": (3, 7),
        "embedding.embedding": (7, 3),
    }
    rng = np.random.default_rng(0)
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    gradients = [{name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} for _ in "12"]
    _, found = updates("muon", gradients, params, weight_decay=0.1, betas=(0.8, 0.9))
    _, adamw = updates("adamw", gradients, params, weight_decay=0.1, betas=(0.8, 0.9))
    for name in list(shapes)[4:]:
        np.testing.assert_allclose(found[name], adamw[name], rtol=1e-6)
    mean = [{name: g[name].astype(np.float64) for name in g} for g in gradients]
    for name in list(shapes)[:4]:
        first, second = (g[name] for g in mean)
        m = 0.95 * (0.95 * 0.05 * first + 0.05 * second) / (1 - 0.95**3) + 0.05 * second / (1 - 0.95**2)
        gates = name[-1] in "WR"
        m = m if not gates else np.moveaxis(m, -2, 0)
        expected = np.empty_like(m)
        for place in np.ndindex(m.shape[:-2]):
            expected[place] = quintic(m[place]) if m.shape[-2] <= m.shape[-1] else quintic(m[place].T).T
        expected = 0.2 * max(m.shape[-2:]) ** 0.5 * (expected if not gates else np.moveaxis(expected, 0, -2))
        np.testing.assert_allclose(found[name], -expected - 0.1 * optim.decays(name), rtol=2e-4, atol=2e-4)


def test_muon_of_plain_matrices_is_optax_s():
    params = {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}
    gradients = {"kernel": jnp.arange(15.0).reshape(3, 5) ** 0.5, "bias": jnp.arange(5.0)}
    tx = optax.contrib.muon(1.0, beta=0.95, adam_b2=0.95, consistent_rms=0.2)
    expected, _ = tx.update(gradients, tx.init(params), params)
    found = updates("muon", [gradients], params)[0]
    np.testing.assert_allclose(found["kernel"], expected["kernel"], rtol=1e-5)


def test_equal_arguments_share_one_program():
    assert optim.make(**SETTINGS, betas=(0.9, 0.99)) is optim.make(**SETTINGS, betas=(0.9, 0.99))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "adanw"}, "unknown optimizer 'adanw'; nearest: adamw"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'; nearest: cosine"),
        ({"learning_rate": -1e-3}, "learning_rate is -0.001: it must be positive"),
        ({"warmup_steps": 11}, r"warmup_steps is 11: it must lie between 0 and steps \(10\)"),
        ({"min_learning_rate": 1.0}, "min_learning_rate is 1.0: it must lie between 0 and learning_rate"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"betas": (0.9, 1.0)}, "two numbers in"),
        ({"steps": 0}, "steps is 0"),
        ({"cooldown_steps": 11, "schedule": "wsd"}, "cooldown_steps is 11: it must lie between 0 and steps - warmup"),
        ({"cooldown_steps": 2}, "cooldown_steps is 2: cosine has none, only exponential and wsd have"),
        ({"schedule": "wsd"}, "cooldown_steps is 0: wsd needs at least 1"),
        ({"schedule": "exponential"}, "min_learning_rate is 0: the schedule exponential needs a positive one"),
        ({"momentum": 0.9}, "momentum is 0.9: adamw has none, only muon and sgd have"),
        ({"name": "sgd", "betas": (0.9, 0.9)}, "sgd has none, only adamw and lion and muon have"),
        ({"name": "muon", "momentum": 1.0}, r"momentum is 1.0: it must lie in \[0, 1\)"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message) as error:
        optim.make(**(SETTINGS | change))
    assert "\n" not in str(error.value)
