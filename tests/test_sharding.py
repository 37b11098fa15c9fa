"""Eight fake devices: any mesh gives one device's loss and gradients, with nothing exchanged inside a loop over time.

`python -m tests.test_sharding` goes through more models and meshes than the suite has time for.
"""

import os

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.hlo import collectives
from xlstm_jax import models, sharding, train
from xlstm_jax.tasks.task import Batch

B, T = 8, 16
MESHES = {
    "lstm_block": [dict(data=8), dict(data=2, fsdp=4), dict(fsdp=4, tensor=2)],
    "slstm_block": [dict(fsdp=8), dict(fsdp=2, tensor=4)],
    "xlstm[1:0]": [dict(data=2, tensor=4), dict(fsdp=2, seq=4), dict(data=2, tensor=2, seq=2)],
    "xlstm[1:1]": [dict(data=2, fsdp=2, tensor=2), dict(fsdp=4, seq=2)],
    "xlstm_large": [dict(fsdp=2, tensor=2, seq=2), dict(fsdp=8)],
    "min_gru_block": [dict(tensor=2, seq=4)],
}


@jax.tree_util.register_static
class Words:
    """Random tokens with resets, at any step the same."""

    name, vocab_size, num_classes, chance, carries_state = "words", 32, 32, 0.0, False

    def batch(self, split, seed, step, batch_size):
        keys = jax.random.split(jax.random.key(7), 3)
        inputs, targets, begins = (jax.random.randint(key, (batch_size, T), 0, 32) for key in keys)
        return Batch(inputs, targets, jnp.ones((batch_size, T)), None, begins < 2)


def step(name, sizes=None, layers=2):
    """The compiled train step, what it gives, and where its new parameters lie; descent at rate 1 shows the gradient."""
    options = {} if "lstm_block" == name or "min" in name else dict(num_heads=4, chunk_size=4)
    tx = optax.sgd(1.0)
    with sharding.use(sizes and sharding.make_mesh(sizes)):
        model = models.LM(32, backbone=name, dim=64, num_layers=layers, rngs=nnx.Rngs(0), **options)
        state = train.init_state(model, Words(), tx, B, 0)
        graphdef = nnx.graphdef(model)
        program = jax.jit(lambda s: train.train_step(s, graphdef=graphdef, task=Words(), tx=tx, batch_size=B))
        compiled = program.lower(state).compile()
        new, row = compiled(state)
    gradients = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), state.params, new.params)
    return compiled.as_text(), row, gradients, new


def compare(name, sizes, expected):
    text, row, gradients, new = step(name, sizes)
    _, one_row, one, _ = expected
    np.testing.assert_allclose(row.loss, one_row.loss, rtol=1e-5)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(one))
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * scale)
    found = collectives(text)
    assert found and not [c for c in found if c.in_time_loop], (name, sizes)
    return new


def divided(new):
    return {axis for a in jax.tree.leaves(new) for part in a.sharding.spec for axis in np.ravel(part) if axis}


@pytest.mark.parametrize(
    "name, sizes",
    [("lstm_block", dict(data=2, fsdp=4)), ("xlstm[1:1]", dict(data=2, fsdp=2, tensor=2))],
    ids=lambda a: a if isinstance(a, str) else "",
)
def test_a_mesh_gives_one_devices_step(name, sizes, monkeypatch, capfd):
    monkeypatch.setattr(sharding, "SMALLEST", 64)
    new = compare(name, sizes, step(name))
    assert divided(new) == set(sizes) - {"data"}
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


def all_meshes():
    sharding.SMALLEST = 64
    for name, meshes in MESHES.items():
        expected = step(name)
        for sizes in meshes:
            compare(name, sizes, expected)
            print(name, sizes, "as on one device", flush=True)


if __name__ == "__main__":
    all_meshes()
