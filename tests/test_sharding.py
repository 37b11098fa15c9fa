"""Eight fake devices: any mesh gives one device's loss and gradients, with nothing exchanged inside a loop over time.

`python -m tests.test_sharding [--out=results/sharding/eight_devices.jsonl]` goes through more models and every
combination of axes, as the suite does if asked (-m long); with --out the rows that are there already are passed over.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.hlo import collectives
from xlstm_jax import metrics, models, sharding, train
from xlstm_jax.kernels import time_sharded
from xlstm_jax.kernels.linear import linear_recurrence, log_linear_recurrence
from xlstm_jax.kernels.mlstm import MLSTMState, mlstm
from xlstm_jax.tasks.task import Batch

B, T = 8, 16
REMATERIALIZED = "Involuntary full rematerialization"
SIZES = {1: (8,), 2: (2, 4), 3: (2, 2, 2)}
EVERY = [  # each of data, fsdp, tensor, seq alone, in pairs and in threes
    dict(zip(axes, SIZES[n])) for n in SIZES for axes in itertools.combinations(("data", "fsdp", "tensor", "seq"), n)
]
MESHES = {
    **dict.fromkeys(("lstm", "slstm_block", "xlstm[1:0]", "xlstm[1:1]"), EVERY),
    "lstm_block": [dict(data=8), dict(data=2, fsdp=4), dict(fsdp=4, tensor=2)],
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


def step(name, sizes=None, layers=2, rows=B, parts=1):
    """The train step's program, metrics, gradient (as the trace without a memory) and new state.

    Every leaf of the state, before the step and after it, is where `sharding.state_specs` says.
    """
    options = {} if name.startswith(("lstm", "min")) else dict(num_heads=8, chunk_size=4)
    tx = optax.trace(decay=0.0)
    with sharding.use(sizes and sharding.make_mesh(sizes)):
        model = models.LM(32, backbone=name, dim=64, num_layers=layers, rngs=nnx.Rngs(0), **options)
        state = train.init_state(model, Words(), tx, rows, 0)
        static = dict(graphdef=nnx.graphdef(model), options=train.StepOptions(accumulate=parts))
        program = jax.jit(lambda s: train.train_step(s, task=Words(), tx=tx, batch_size=rows, **static))
        compiled = program.lower(state).compile()
        new, row = compiled(state)
        for each in (state, new) if sizes else ():
            assert misplaced(each, model) == []
    return compiled.as_text(), row, jax.device_get(new.opt_state.trace), new


def misplaced(state, model):
    """The leaves, by name, that are divided otherwise than their spec says."""
    mesh, leaves = jax.sharding.get_mesh(), jax.tree_util.tree_leaves_with_path(state)
    specs = jax.tree.leaves(sharding.state_specs(state, model, mesh.shape))
    return [
        jax.tree_util.keystr(path)
        for (path, leaf), spec in zip(leaves, specs, strict=True)
        if not leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)
    ]


def compare(name, sizes, expected, **options):
    """The new state, the program's collectives, and differences, relative to the largest value."""
    text, row, gradients, new = step(name, sizes, **options)
    _, one_row, one, _ = expected
    scale = max(np.abs(g).max() for g in jax.tree.leaves(one))
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / scale), gradients, one)
    found = collectives(text)
    assert found and not [c for c in found if c.in_time_loop], (name, sizes)
    loss = abs(float(row.loss) - float(one_row.loss)) / float(one_row.loss)
    gradient = max(jax.tree.leaves(apart))
    assert loss <= 1e-5 and gradient <= 1e-5, (name, sizes, loss, gradient)
    return new, found, dict(loss_difference=loss, gradient_difference=gradient)


def divided(new):
    return {axis for a in jax.tree.leaves(new) for part in a.sharding.spec for axis in np.ravel(part) if axis}


@pytest.mark.parametrize(
    "name, sizes",
    [("lstm", dict(data=2, fsdp=4)), ("xlstm[1:1]", dict(fsdp=2, tensor=2, seq=2))],
    ids=lambda a: a if isinstance(a, str) else "",
)
def test_a_mesh_gives_one_devices_step(name, sizes, monkeypatch, capfd):
    monkeypatch.setattr(sharding, "SMALLEST", 64)
    new, *_ = compare(name, sizes, step(name))
    assert divided(new) == set(sizes) - {"data", "seq"}
    assert REMATERIALIZED not in capfd.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize(
    "name, sizes",
    [(name, sizes) for name in MESHES for sizes in MESHES[name]],
    ids=lambda a: a if isinstance(a, str) else ",".join(f"{axis}{size}" for axis, size in a.items()),
)
def test_every_mesh_gives_one_devices_step(name, sizes, monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST", 64)
    on_mesh(name, sizes)


def test_micro_batches_are_summed_over_the_devices_once_a_step(monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST", 64)
    sizes, rows = dict(data=2, fsdp=4), 32
    whole = step("lstm", sizes, layers=1, rows=rows)
    new, found, _ = compare("lstm", sizes, whole, layers=1, rows=rows, parts=4)
    assert divided(new) == {"fsdp"} and {c.count for c in found} == {1}  # none in the loop over the micro-batches
    counts = [sum(c.kind == "all-reduce" for c in each) for each in (found, collectives(whole[0]))]
    assert 0 < counts[0] <= counts[1]


def test_an_exchange_inside_a_loop_is_seen():
    """What the loops here avoid: a recurrent weight that is divided and not gathered before the loop."""
    mesh = sharding.make_mesh(dict(fsdp=8))
    R, h = (jax.device_put(np.ones((8, 8), np.float32), NamedSharding(mesh, P(axis))) for axis in ("fsdp", None))

    def loop(R, h):
        with jax.named_scope("time"):
            return jax.lax.scan(lambda h, _: (jnp.tanh(h @ R), None), h, length=T)[0]

    found = collectives(jax.jit(loop).lower(R, h).compile().as_text())
    assert [(c.in_time_loop, c.count, c.group) for c in found if c.count > 1] == [(True, T, 8)]


MLSTM_SHAPE = (2, 32, 2, 4)  # B, T, H, K


def mlstm_inputs():
    rng = np.random.default_rng(0)
    B, T, H, K = MLSTM_SHAPE
    q, k, v = (rng.normal(size=MLSTM_SHAPE).astype(np.float32) for _ in "qkv")
    i, f = (rng.normal(size=(B, T, H)).astype(np.float32) + shift for shift in (0, 2))
    C, n = (rng.normal(size=shape).astype(np.float32) for shape in ((B, H, K, K), (B, H, K)))
    state = MLSTMState(C, n, rng.normal(size=(B, H)).astype(np.float32))
    reset = np.zeros((B, T), bool)
    reset[0, [9, 17]] = True  # in the second row the state crosses all stretches
    return (q, k, v, i, f, state), jnp.asarray(reset), jnp.asarray(rng.random((B, T)) < 0.8)


def value_and_gradient(function, inputs, sizes):
    """Of a weighted sum of all that the function returns, under a mesh or without."""

    def loss(inputs):
        leaves = jax.tree.leaves(function(*inputs))
        return sum(jnp.sum(jnp.sin(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape) * a) for a in leaves), leaves

    with sharding.use(sizes and sharding.make_mesh(sizes)):
        program = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(inputs).compile()
        return program.as_text(), jax.device_get(program(inputs))


def check_time_sharded(function, inputs, few):
    """By gathered states where `few` is at least the number of devices, else in rounds."""
    (_, one), (text, divided) = (value_and_gradient(function, inputs, sizes) for sizes in (None, dict(seq=8)))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(divided), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=2e-5 * max(np.abs(a).max(), 1))
    found = collectives(text)
    assert not [c for c in found if c.in_time_loop]
    assert ("collective-permute" in {c.kind for c in found}) == (few < 8)


@pytest.mark.parametrize("few", [1, 16])
def test_mlstm_over_divided_time(few, monkeypatch):
    monkeypatch.setattr(time_sharded, "FEW", few)
    inputs, reset, mask = mlstm_inputs()
    check_time_sharded(lambda *a: mlstm(*a, chunk_size=4, reset=reset, mask=mask), inputs, few)


def linear_inputs():
    rng = np.random.default_rng(1)
    a, b = (rng.uniform(0.1, 1, (2, 16, 3)).astype(np.float32) for _ in "ab")
    reset = np.zeros((2, 16), bool)
    reset[0, [5, 9]] = True
    return (a, b, rng.normal(size=(2, 3)).astype(np.float32)), jnp.asarray(reset)


def test_linear_recurrence_over_divided_time(monkeypatch):
    monkeypatch.setattr(time_sharded, "FEW", 1)
    inputs, reset = linear_inputs()
    check_time_sharded(lambda *a: linear_recurrence(*a, chunk_size=2, reset=reset), inputs, 1)


@pytest.mark.parametrize(
    "sizes, words",
    [
        (dict(data=3), "mesh data=3 does not fit 8 devices: it needs 3"),
        (dict(data=-1, tensor=3), "does not fit 8 devices: it needs a multiple of 3"),
        (dict(data=-1, fsdp=-1), "only one can take what is left"),
        (dict(tensr=2), "unknown mesh axis 'tensr'; nearest: tensor"),
        (dict(data=0), "mesh axis data is 0: a positive int"),
    ],
)
def test_a_mesh_that_cannot_be(sizes, words):
    with pytest.raises(ValueError, match=words):
        sharding.make_mesh(sizes)


@pytest.mark.parametrize(
    "sizes, words",
    [
        (dict(data=8), r"batch_size=12 does not divide over data x fsdp = 8: take a multiple, such as 8"),
        (dict(runs=8), "mesh axis runs is 8: one run is not divided over it"),
        (dict(seq=8), r"seq_len=20 does not divide over seq=8"),
        (dict(tensor=8), r"num_heads=4 of .*mixer.* does not divide over tensor=8: it can be 1, 2, 4"),
    ],
)
def test_what_does_not_divide(sizes, words):
    options = dict(backbone="xlstm[1:0]", dim=64, num_layers=2, num_heads=4)
    model = nnx.eval_shape(lambda: models.LM(32, rngs=nnx.Rngs(0), **options))
    seq_len = 20 if "seq" in sizes else None
    with pytest.raises(ValueError, match=words):
        sharding.check(sharding.make_mesh(sizes), batch_sizes={"batch_size": 12}, seq_len=seq_len, model=model)


def test_the_rules_speak_of_every_large_weight():
    sizes = dict(runs=1, data=1, fsdp=4, tensor=2, seq=1)
    for name in ("xlstm[1:1]", "lstm_block"):
        options = dict(backbone=name, dim=512, num_layers=4) | ({} if name == "lstm_block" else dict(num_heads=4))
        model = nnx.eval_shape(lambda: models.LM(512, rngs=nnx.Rngs(0), **options))  # noqa: B023
        for parameter, (shape, spec) in sharding.parameter_specs(model, sizes).items():
            one = shape[1:] if parameter.startswith("backbone") else shape
            assert "fsdp" in str(spec) or np.prod(one) < sharding.SMALLEST, (parameter, shape, spec)
    assert sharding.stored_spec("mixer.cell.R", (4, 128, 4, 128), sizes) == P("tensor", "fsdp", None, None)
    assert sharding.used_spec("mixer.R", (1, 512, 4, 512), sizes) == P(None, None, None, None)  # a dense LSTM is whole


@contextlib.contextmanager
def standard_error():
    """A list that holds, after the block, what it and the compiler wrote to stderr."""
    kept, said = os.dup(2), []
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said.append(file.read().decode())


@functools.cache
def on_one_device(name):
    return step(name)


def on_mesh(name, sizes):
    """The row of a model on a mesh, which gives one device's step without the compiler's warning."""
    expected, began = on_one_device(name), time.monotonic()
    with standard_error() as said:
        _, collected, found = compare(name, sizes, expected)
    assert REMATERIALIZED not in said[0], (name, sizes, said)
    kinds = sorted({c.kind for c in collected})
    counts = {kind: sum(c.count for c in collected if c.kind == kind) for kind in kinds}
    found |= {"collectives": counts, "in_time_loops": 0, "rematerialization_warnings": 0}
    return {"model": name, "mesh": sizes} | found | {"seconds": round(time.monotonic() - began, 1)}


def all_meshes(out=None):
    inputs, reset = linear_inputs()
    check_time_sharded(lambda *a: log_linear_recurrence(*a, chunk_size=2, reset=reset), inputs, 16)
    inputs, reset, mask = mlstm_inputs()
    for options in (dict(form="recurrent"), dict(input_gate="sigmoid", normalize=False), dict(input_gate="sigmoid")):
        check_time_sharded(lambda *a: mlstm(*a, chunk_size=4, reset=reset, mask=mask, **options), inputs, 16)  # noqa: B023
        print("time divided:", options, "as on one device", flush=True)
    sharding.SMALLEST = 64
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out and out.exists() else []
    done = [(row["model"], row["mesh"]) for row in rows]
    about = {key: metrics.environment()[key] for key in ("commit", "versions", "device")} | {"dtype": "float32"}
    for name, meshes in MESHES.items():
        for sizes in meshes:
            if (name, sizes) in done:
                continue
            row = on_mesh(name, sizes)
            print(name, sizes, "as on one device", row, flush=True)
            if out:
                out.parent.mkdir(parents=True, exist_ok=True)
                with open(out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row | about) + "\n")
    for name, sizes in (("xlstm[1:1]", dict(data=2, fsdp=2, tensor=2)), ("xlstm[1:0]", dict(fsdp=2, tensor=2, seq=2))):
        compare(name, sizes, step(name), parts=2)
        print(name, sizes, "as on one device, in two micro-batches", flush=True)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path)
    all_meshes(arguments.parse_args().out)
