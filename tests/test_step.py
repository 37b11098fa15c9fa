"""What a step does beside a plain update: micro-batches, z-loss, averaged weights, bad steps."""

import json
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.stand_in import Recall, model
from xlstm_jax import metrics, models, optim, train
from xlstm_jax.checkpoint import Checkpoints
from xlstm_jax.evaluate import evaluate
from xlstm_jax.run import Run
from xlstm_jax.tasks.task import Batch

TX = optim.make(learning_rate=3e-2, steps=30)


def ragged(rows=4, length=5):
    """A batch with masks, resets and uneven weights, so that its micro-batches weigh differently."""
    rng = np.random.default_rng(0)
    tokens, targets = (jnp.asarray(rng.integers(0, 7, (rows, length)), jnp.int32) for _ in range(2))
    mask = jnp.asarray(rng.random((rows, length)) < 0.7)
    reset = jnp.asarray(rng.random((rows, length)) < 0.2)
    return Batch(tokens, targets, jnp.where(mask, jnp.asarray(rng.random((rows, length))), 0), mask, reset)


def test_micro_batches_are_the_undivided_batch_in_float64(x64):
    lm = models.LM(
        7, backbone="elman", dim=4, num_layers=2, tie_weights=True, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    graphdef, params = nnx.split(lm)
    carry = jax.tree.map(lambda x: x + 0.1, lm.initial_state(4))  # two stacked layers: the rows are its second axis
    terms = dict(ar=2.0, tar=3.0, z_loss=0.1)

    @jax.jit
    def both(params, carry):
        return [
            train.gradients(params, graphdef, ragged(), carry, jax.random.key(0), parts, **terms) for parts in (1, 2)
        ]

    whole, parts = both(params, carry)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
    batch, carried = ragged(), carry
    logits, _ = lm(batch.inputs, carried, batch.mask, batch.reset)
    weights = np.asarray(batch.weights / batch.weights.sum())
    z = 0.1 * np.sum(np.log(np.exp(np.asarray(logits)).sum(-1)) ** 2 * weights)
    trained, (reported, *_) = train.loss_and_accuracy(lm, batch, carried, None, **terms)
    np.testing.assert_allclose(trained - reported, z, rtol=1e-10)
    np.testing.assert_allclose(reported, whole[1][0], rtol=1e-12)


def fit(workdir, *, task=None, stop=None, steps=30, tx=TX, **settings):
    """(model, result) of a run; killed after the checkpoint of step `stop`."""
    save = Run.save

    def save_and_stop(run, step, state):
        save(run, step, state)
        if step == stop:
            raise KeyboardInterrupt

    settings = {"save_every": 10, "log_every": 3, "steps_per_dispatch": 4, "batch_size": 4} | settings
    trained = model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save", save_and_stop)
        result = train.fit(trained, task or Recall(), tx, steps=steps, workdir=workdir, progress=False, **settings)
    return trained, result


def stopped_equals_whole(tmp_path, **settings):
    """The metrics of both runs, byte for byte, and the model of the whole one."""
    trained, _ = fit(tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "stopped", stop=20, **settings)
    again, _ = fit(tmp_path / "stopped", **settings)
    for a, b in zip(jax.tree.leaves(nnx.state(trained)), jax.tree.leaves(nnx.state(again)), strict=True):
        np.testing.assert_array_equal(a, b)
    whole, stopped = (tmp_path / name / "metrics.jsonl" for name in ("whole", "stopped"))
    assert whole.read_text() == stopped.read_text()
    return trained, metrics.read(whole)


def test_all_at_once_resumes_exactly_and_evaluates_the_average(tmp_path):
    options = train.StepOptions(accumulate=2, z_loss=0.01, ema=0.9)
    task = Recall(carries_state=True)
    trained, rows = stopped_equals_whole(tmp_path, task=task, options=options)
    state = train.init_state(model(), task, TX, 4, 0, options)
    step = jax.jit(
        lambda s: train.train_step(s, graphdef=nnx.graphdef(trained), task=task, tx=TX, batch_size=4, options=options)
    )
    average = jax.tree.map(np.asarray, state.params)
    for n in range(30):
        state, _ = step(state)
        decay = min(0.9, (1 + n) / (10 + n))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * np.asarray(p), average, state.params)
    for a, b in zip(jax.tree.leaves(nnx.state(trained)), jax.tree.leaves(average), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3)
    assert [row["split"] for row in rows[-2:]] == ["valid", "test"]


def test_the_best_weights_are_kept_through_a_resumption(tmp_path):
    """Half-way the descent turns into an ascent: the last weights are not the best ones."""
    options = train.StepOptions(keep_best="loss")
    settings = dict(options=options, eval_every=5, tx=optax.sgd(lambda n: jnp.where(n < 15, 0.3, -0.3)))
    trained, rows = stopped_equals_whole(tmp_path, **settings)
    result = json.loads((tmp_path / "stopped" / "result.json").read_text())
    valid = {row["step"]: row["loss"] for row in rows if row["split"] == "valid"}
    best = min(valid, key=lambda step: (valid[step], step))
    assert (result["best_step"], result["valid_loss"]) == (best, valid[best]) and best < 30
    found = evaluate(trained, Recall(), "test", 4)
    assert result["test_loss"] == found["loss"] == rows[-1]["loss"]
    with Checkpoints(tmp_path / "whole" / "checkpoints") as checkpoints:
        kept = checkpoints.restore_part(30, "best.params", nnx.state(trained))
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(nnx.state(trained)), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="keep_best"):
        fit(tmp_path / "none", options=options._replace(keep_best="los"), eval_every=5)
    with pytest.raises(ValueError, match="eval_every is 0"):
        fit(tmp_path / "none", options=options)


@dataclass(frozen=True)
class Broken(Recall):
    """The weights of some batches are NaN."""

    bad: tuple[int, ...] = ()

    def batch(self, split, seed, step, batch_size):
        drawn = super().batch(split, seed, step, batch_size)
        hit = (jnp.asarray(self.bad, jnp.int32) == step).any() & (split == "train")
        return drawn._replace(weights=jnp.where(hit, jnp.nan, drawn.weights))


def counted(rows):
    return [row["bad_steps"] for row in rows if row["split"] == "train"]


def test_bad_steps_are_skipped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "check", lambda *_: None)
    options, task = train.StepOptions(on_bad_step="skip"), Broken(bad=(7, 8, 23))
    _, rows = stopped_equals_whole(tmp_path, task=task, options=options)
    assert counted(rows)[0] == 0 and counted(rows)[-1] == 3 and all(np.isfinite(row["loss"]) for row in rows)
    with pytest.raises(train.Diverged, match=r"at step 9 \(2 bad steps in a row\)"):
        fit(tmp_path / "limit", task=task, options=options, max_bad_steps=1)


def test_a_bad_step_is_rolled_back_from_and_its_batches_are_not_seen_again(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "check", lambda *_: None)
    options, task = train.StepOptions(on_bad_step="rollback"), Broken(bad=(5, 23, 37))
    _, rows = stopped_equals_whole(tmp_path, task=task, options=options)
    steps = [row["step"] for row in rows if row["split"] == "train"]
    assert steps == sorted(set(steps)) and steps[-1] == 30
    assert counted(rows)[-1] == 3  # batch 5 at step 6, back to 0; 23 at step 18, back to 10; 37 at step 24, back to 20
    assert metrics.read(tmp_path / "whole/timing.jsonl")[-1]["spent"]["lost"] > 0
    with pytest.raises(train.Diverged, match=r"\(2 rollbacks to one checkpoint\)"):
        fit(tmp_path / "limit", task=Broken(bad=(3, 9)), options=options, max_bad_steps=1)


def test_a_spike_is_a_bad_step():
    state = train.guard.initial("skip", 3.0)
    for loss, good in [(2.0, True)] * 25 + [(7.0, False), (7.0, False), (5.0, True), (float("nan"), False)]:
        found, after, bad = train.guard.judge(state, jnp.float32(loss), jnp.isfinite(loss), 3.0)
        assert bool(found) is good
        state = after if good else bad
    assert (int(state.bad), int(state.in_a_row), int(state.good)) == (3, 1, 26)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accumulate": 3}, r"accumulate is 3: it must divide the rows of a batch \(batch_size is 4\)"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"z_loss": -1.0}, "z_loss is -1.0: it must be finite"),
        ({"ema": 1.0}, r"ema is 1.0: it must lie in \[0, 1\)"),
        ({"on_bad_step": "skipp"}, "unknown on_bad_step 'skipp'; nearest: skip"),
        ({"spike": 0.5}, "spike is 0.5: it must be finite and more than 1"),
    ],
)
def test_options_that_cannot_be_meant(change, message):
    with pytest.raises(ValueError, match=message) as error:
        train.fit(model(), Recall(), TX, steps=3, batch_size=4, options=train.PLAIN._replace(**change))
    assert "\n" not in str(error.value)
