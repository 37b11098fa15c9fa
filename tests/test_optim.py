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
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message) as error:
        optim.make(**(SETTINGS | change))
    assert "\n" not in str(error.value)
