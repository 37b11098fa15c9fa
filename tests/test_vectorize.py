"""Vectorised runs: each is what it would be alone, whatever its neighbours do."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from tests.stand_in import Recall, model
from xlstm_jax import metrics, optim, train, vectorize
from xlstm_jax.run import Run

STEPS = 12
COUNTS = dict(steps=STEPS, batch_size=4, eval_every=6, save_every=6, log_every=3, steps_per_dispatch=3)
RUNS = [(0, 3e-2, 0.1), (1, 1e-2, 0.1), (2, 3e-2, 0.2)]  # seed, learning rate, weight decay
TASK = Recall(carries_state=True)


def settings(rate, decay, **other):
    return optim.settings(learning_rate=rate, weight_decay=decay, steps=STEPS, warmup_steps=2, **other)


def members(folder, runs=RUNS, pruned=None):
    made = []
    for seed, rate, decay in runs:
        params = nnx.split(model(seed, dropout=0.1))[1]
        own = settings(rate, decay), folder / str(seed), {"id": str(seed)}
        made.append(vectorize.Member(params, seed, *own, pruned=lambda seed=seed: seed == pruned))
    return made


def together(folder, runs=RUNS, pruned=None):
    graphdef = nnx.split(model(dropout=0.1))[0]
    return vectorize.fit(members(folder, runs, pruned), graphdef, TASK, progress=False, **COUNTS)


def alone(folder, seed, rate, decay, **options):
    tx = optim.make(learning_rate=rate, weight_decay=decay, steps=STEPS, warmup_steps=2)
    made = model(seed, dropout=0.1)
    options |= COUNTS | {"record": {"id": folder.name}}
    return train.fit(made, TASK, tx, seed=seed, workdir=folder, progress=False, **options)


def numbers(row):
    return {k: v for k, v in row.items() if isinstance(v, int | float) and k not in ("seconds", "runs_together")}


def assert_same(folder, other):
    """Equal lines in equal order; the numbers to 1e-5, as batched products round in another order."""
    mine, theirs = (metrics.read(f / "metrics.jsonl") for f in (folder, other))
    assert [(r["step"], r["split"]) for r in mine] == [(r["step"], r["split"]) for r in theirs] and len(mine) == 7
    for a, b in zip(mine, theirs):
        np.testing.assert_allclose(list(numbers(a).values()), list(numbers(b).values()), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, together(folder)


def test_each_run_is_what_it_is_alone(whole, tmp_path):
    folder, results = whole
    for index in (0, 2):
        seed, rate, decay = RUNS[index]
        found = alone(tmp_path / str(seed), seed, rate, decay)
        assert_same(folder / str(seed), tmp_path / str(seed))
        assert numbers(results[index]).keys() == numbers(found).keys()
        for name, value in numbers(found).items():
            assert results[index][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        for file in ("config.json", "result.json"):
            mine, theirs = (json.loads((f / str(seed) / file).read_text()) for f in (folder, tmp_path))
            assert mine.keys() - {"runs_together"} == theirs.keys()
        assert (folder / str(seed) / "checkpoints" / str(STEPS)).is_dir()
    assert {r["runs_together"] for r in results} == {3}


def test_a_checkpoint_of_a_group_resumes_alone(whole, tmp_path):
    """The checkpoint is that of `train.fit`, which ends at once."""
    folder, results = whole
    seed, rate, decay = RUNS[1]
    (folder / "1/result.json").unlink()
    assert alone(folder / "1", seed, rate, decay)["test_loss"] == pytest.approx(results[1]["test_loss"], rel=1e-5)


def test_a_killed_group_goes_on_each_run_from_its_own_checkpoint(whole, tmp_path, monkeypatch):
    folder, _ = whole
    save, saved = Run.save, []

    def save_some(run, step, state):
        if len(saved) == 2:  # two of three have their first checkpoint
            raise KeyboardInterrupt
        save(run, step, state)
        saved.append(step)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", save_some)
        with pytest.raises(KeyboardInterrupt):
            together(tmp_path)
    assert saved == [6, 6] and not (tmp_path / "2/checkpoints/6").exists()
    together(tmp_path)
    for seed in "012":
        assert (tmp_path / seed / "metrics.jsonl").read_text() == (folder / seed / "metrics.jsonl").read_text()


def test_runs_that_diverge_or_are_pruned_stop_alone(whole, tmp_path):
    folder, results = whole
    found = together(tmp_path, [RUNS[0], (7, 1e38, 0.1), RUNS[2]], pruned=2)
    assert isinstance(found[1], train.Diverged) and "diverged at step" in str(found[1])
    assert not (tmp_path / "7/result.json").exists()
    assert numbers(found[0]) == numbers(results[0]) and "pruned" not in found[0]
    (kept,) = (row for row in metrics.read(folder / "2/metrics.jsonl") if row["step"] == 6 and row["split"] == "valid")
    assert (found[2]["pruned"], found[2]["steps"], found[2]["valid_loss"]) == (6, 6, kept["loss"])
    assert not any(name.startswith("test_") for name in found[2])
    assert json.loads((tmp_path / "2/result.json").read_text()) == found[2]
    assert metrics.read(tmp_path / "2/metrics.jsonl")[-1] == kept


def test_a_run_alone_is_pruned_too(whole, tmp_path):
    found = alone(tmp_path / "0", *RUNS[0], pruned=lambda: True)
    assert (found["pruned"], found["steps"]) == (6, 6) and not any(name.startswith("test_") for name in found)
    assert found == json.loads((tmp_path / "0/result.json").read_text())


def test_the_axis_of_runs_lies_on_the_devices(whole):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("runs",))
    stacked = vectorize._stack([np.float32(i) for i in range(6)], mesh)
    assert stacked.tolist() == [0, 1, 2, 3, 4, 5, 5, 5] and len(stacked.addressable_shards) == 4


def test_numbers_that_differ_are_split_from_what_is_shared():
    first, second = settings(0.1, 0.1, betas=(0.9, 0.99)), settings(0.1, 0.2, betas=(0.8, 0.99))
    shared, own = vectorize.split_numbers([first, second])
    assert own == {"weight_decay": [0.1, 0.2], "betas": [(0.9, 0.99), (0.8, 0.99)]}
    assert shared.weight_decay is None and shared.learning_rate == 0.1
    for wrong, name in ((settings(0.1, 0.0), "weight_decay"), (settings(0.1, 0.1, schedule="constant"), "schedule")):
        with pytest.raises(ValueError, match=f"{name} is .*: these are two programs"):
            vectorize.split_numbers([first, wrong])
