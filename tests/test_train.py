"""The trainer: it learns, dispatches do not matter, the carry continues, a NaN stops it; what the script refuses."""

import json
import subprocess
import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from experiments import demo, generate, gradient_flow, sweep, table
from experiments import train as script
from experiments.build import abstract_model, build_task, chosen_forms, resolve
from tests.configs import tiny
from tests.stand_in import Recall, model
from xlstm_jax import metrics, models, optim, train
from xlstm_jax.checkpoint import Checkpoints
from xlstm_jax.evaluate import evaluate, token_scores
from xlstm_jax.tasks import make
from xlstm_jax.tasks.parity import Parity

SETTINGS = {"batch_size": 4, "eval_batch_size": 8, "log_every": 5, "steps_per_dispatch": 5, "progress": False}


def optimizer():
    """One for all tests, so that they share compiled programs."""
    return optim.make(learning_rate=3e-2, steps=150, warmup_steps=3, weight_decay=0.01)


def fit(steps, task=None, *, dropout=0.0, **settings):
    """(trained model, result)"""
    trained = model(dropout=dropout)
    return trained, train.fit(trained, task or Recall(), optimizer(), steps=steps, **(SETTINGS | settings))


def same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def test_learns_and_writes_its_record(tmp_path):
    work = metrics.Work(flops=1e6, peak=1e12, serial_layers=2)
    trained, result = fit(100, workdir=tmp_path, eval_every=50, save_every=40, record={"id": "one"}, work=work)
    assert result["test_accuracy"] > 0.9
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result.keys() >= {"id", "steps", "seed", "parameters", "seconds", "valid_loss", "test_loss"}
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows if r["split"] == "train"] == list(range(5, 101, 5))
    assert [(r["step"], r["split"]) for r in rows if r["split"] != "train"] == [
        (50, "valid"), (100, "valid"), (100, "test"),
    ]  # fmt: skip
    assert rows[0].keys() == {"step", "split", "loss", "accuracy", "grad_norm", "learning_rate"}
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["100", "80"]
    timing = metrics.read(tmp_path / "timing.jsonl")[0]
    assert timing.keys() == {
        "step", "seconds", "goodput", "spent", "steps_per_second", "tokens_per_second", "serial_steps_per_second",
        "flops_per_second", "mfu",
    }  # fmt: skip
    assert timing["mfu"] == pytest.approx(timing["tokens_per_second"] * 1e6 / 1e12, rel=1e-3)
    assert metrics.Work().speeds(2.0, (3, 5)) == {"steps_per_second": 2.0, "tokens_per_second": 30.0}
    assert metrics.Work(serial_layers=7).speeds(2.0, (3, 5))["serial_steps_per_second"] == 70.0
    assert evaluate(trained, Recall(), "test", 8)["accuracy"] == result["test_accuracy"]


def test_steps_a_dispatch_change_nothing(tmp_path):
    one, _ = fit(23, dropout=0.2, steps_per_dispatch=1, workdir=tmp_path / "1")
    five, _ = fit(23, dropout=0.2, steps_per_dispatch=5, workdir=tmp_path / "5")
    for a, b in zip(jax.tree.leaves(nnx.state(one)), jax.tree.leaves(nnx.state(five)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # two programs: equal up to rounding
    rows, others = (metrics.read(tmp_path / folder / "metrics.jsonl") for folder in "15")
    for row, other in zip(rows, others, strict=True):
        assert row.pop("split") == other.pop("split") and row == pytest.approx(other, rel=1e-4)


def test_a_finished_run_only_evaluates_again(tmp_path):
    _, first = fit(6, workdir=tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    _, second = fit(6, workdir=tmp_path)
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert before == (tmp_path / "metrics.jsonl").read_text()


def test_the_next_dispatch_starts_before_the_last_is_read_and_takes_its_memory(monkeypatch):
    calls, states, dispatch, get = [], [], train._dispatch, jax.device_get

    def started(state, *args, **options):
        calls.append("start")
        states.append(state)
        return dispatch(state, *args, **options)

    def read(x):
        calls.extend(["read"] * isinstance(x, train.StepMetrics))
        return get(x)

    monkeypatch.setattr(train, "_dispatch", started)
    monkeypatch.setattr(jax, "device_get", read)
    fit(20)
    assert calls == ["start", "start", "read", "start", "read", "start", "read", "read"]
    assert all(x.is_deleted() for state in states for x in jax.tree.leaves(state))


def test_seeds_share_one_program():
    fit(5, seed=1)
    compiled = train._dispatch._cache_size()
    fit(5, seed=2)
    assert train._dispatch._cache_size() == compiled


def test_the_state_continues_and_its_gradient_is_cut():
    task, tx, tiny_model = Recall(carries_state=True), optimizer(), model()
    graphdef, params = nnx.split(tiny_model)
    state = train.init_state(tiny_model, task, tx, 4, seed=0)
    np.testing.assert_array_equal(state.carry[0], 0)
    step = jax.jit(lambda s: train.train_step(s, graphdef=graphdef, task=task, tx=tx, batch_size=4))
    first, _ = step(state)
    carry = jax.jit(lambda: tiny_model(task.batch("train", 0, 0, 4).inputs)[1][0])()
    np.testing.assert_allclose(first.carry[0], carry, rtol=1e-6)
    _, row = step(first)

    @jax.jit
    @jax.value_and_grad
    def loss(params, carry):
        merged = nnx.merge(graphdef, params)
        return train.loss_and_accuracy(merged, task.batch("train", 0, 1, 4), carry, None)[0]

    expected, grads = loss(first.params, first.carry)
    np.testing.assert_allclose(row.loss, expected, rtol=1e-6)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(row.grad_norm, norm, rtol=1e-5)
    assert abs(float(loss(first.params, state.carry)[0] - expected)) > 1e-3  # an empty state would differ


def test_carried_state_lets_the_first_answer_be_learned():
    _, result = fit(150, Recall(carries_state=True))
    assert result["test_accuracy"] > 0.95  # without the state: at most (5 + 1/4) / 6


def test_a_nan_stops_the_run_and_names_the_last_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "check", lambda *_: None)  # as if the batch were in order
    with pytest.raises(train.Diverged) as error:
        fit(20, Recall(bad_step=12), workdir=tmp_path, save_every=5, log_every=1)
    message = str(error.value)
    assert "diverged at step 13: loss nan" in message and "gradient norm nan" in message
    assert str(tmp_path / "checkpoints" / "10") in message and "\n" not in message
    assert [r["step"] for r in metrics.read(tmp_path / "metrics.jsonl")] == list(range(1, 13))
    assert not (tmp_path / "result.json").exists()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest() == 10


@dataclass(frozen=True)
class Mislabelled(Recall):
    """A label that does not exist, in batch 3 of one split."""

    split: str = "train"

    def batch(self, split, seed, step, batch_size):
        drawn = super().batch(split, seed, step, batch_size)
        return drawn._replace(targets=jnp.where((step == 3) & (split == self.split), 9, drawn.targets))


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_wrong_label_in_a_later_batch_is_named_and_not_the_learning_rate(tmp_path, split):
    with pytest.raises(ValueError, match=rf"targets hold 9, outside 0 .. 3 .*batch 3 of the {split} split") as error:
        fit(10, Mislabelled(split=split), workdir=tmp_path)
    assert "learning_rate" not in str(error.value) and not (tmp_path / "result.json").exists()


def test_ar_and_tar_add_their_terms_to_the_loss(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(256)) * 2)
    task = make("byte_lm", corpus=f"file:{tmp_path / 'text'}", seq_len=6, ar=2, tar=3.0)
    lm, tx = models.LM(256, backbone="elman", dim=4, num_layers=1, rngs=nnx.Rngs(0)), optimizer()
    state = train.init_state(lm, task, tx, 2, seed=0)

    @jax.jit
    def outputs_and_losses(batch):
        ys = lm.backbone(lm.embedding(batch.inputs), None, None, batch.reset)[0]
        return ys, *(train.loss_and_accuracy(lm, batch, None, None, *each)[0] for each in ((), (2.0, 3.0)))

    batches = [task.batch("train", 0, step, 2) for step in (0, 1)]
    reset = np.array(batches[1].reset)
    reset[1, 3] = True
    ys, plain, both = outputs_and_losses(batches[1]._replace(reset=jnp.asarray(reset)))
    ys = np.asarray(ys, np.float64)
    steps = (ys[:, 1:] - ys[:, :-1])[~reset[:, 1:]]
    np.testing.assert_allclose(both - plain, 2 * np.mean(ys**2) + 3 * np.mean(steps**2), rtol=1e-4)
    _, row = jax.jit(lambda s: train.train_step(s, graphdef=nnx.split(lm)[0], task=task, tx=tx, batch_size=2))(state)
    np.testing.assert_allclose(row.loss, outputs_and_losses(batches[0])[2], rtol=1e-5)
    with pytest.raises(ValueError, match="byte_lm: tar must be finite and at least 0, not -1.0"):
        make("byte_lm", tar=-1.0)


def test_a_bad_step_leaves_the_state_as_it_was():
    task, tx, tiny_model = Recall(bad_step=0), optimizer(), model()
    graphdef, params = nnx.split(tiny_model)
    state = train.init_state(tiny_model, task, tx, 4, seed=0)
    step = jax.jit(lambda s: train.train_step(s, graphdef=graphdef, task=task, tx=tx, batch_size=4))
    new, row = step(state)
    assert not row.good
    same(new, state)


def test_token_scores_against_numpy():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    targets = np.asarray([[0, 4, 2], [1, 1, 3]])
    nll, correct = token_scores(jnp.asarray(logits), jnp.asarray(targets))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(
        nll, -np.log(np.take_along_axis(probabilities, targets[..., None], -1)[..., 0]), rtol=1e-5
    )
    np.testing.assert_array_equal(correct, logits.argmax(-1) == targets)


@pytest.mark.parametrize("name", ["steps", "batch_size", "log_every", "steps_per_dispatch", "eval_batch_size"])
def test_counts_must_be_positive(name):
    settings = {"tx": optimizer(), "steps": 3, **SETTINGS, name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0: at least 1"):
        train.fit(model(), Recall(), **settings)


def test_another_model_or_seed_in_the_folder_is_refused(tmp_path):
    fit(4, workdir=tmp_path)
    with pytest.raises(ValueError, match="seed 0, not 1"):
        fit(4, workdir=tmp_path, seed=1)
    with pytest.raises(ValueError, match="is another model: .* differ"):
        train.fit(model(dim=8), Recall(), optimizer(), steps=4, workdir=tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match="checkpoint of step 4, but steps is 3"):
        fit(3, workdir=tmp_path)


@pytest.mark.parametrize("damage", ["emptied", "cut"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    fit(4, workdir=tmp_path)
    for path in (tmp_path / "checkpoints/4").rglob("*"):
        if path.is_file() and (damage == "emptied" or path.name == "_METADATA"):
            path.unlink() if damage == "emptied" else path.write_text("{")
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="checkpoints/4 is damaged .*: remove that folder to go on") as error:
        fit(4, workdir=tmp_path)
    assert "\n" not in str(error.value) and (tmp_path / "metrics.jsonl").read_text() == before


def test_a_damaged_checkpoint_is_one_line_on_stderr(tmp_path, request):
    script.run(config(), tmp_path / "run", progress=False)
    (tmp_path / "run/result.json").unlink()
    for path in (tmp_path / "run/checkpoints").glob("*/default/d/*"):
        path.write_bytes(path.read_bytes()[:60])
    command = [sys.executable, "-m", "experiments.train", TINY, f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=request.config.rootpath, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: checkpoint ") and "checkpoints/20 is damaged" in done.stderr


def test_an_evaluation_without_batches_is_refused():
    with pytest.raises(ValueError, match="recall: the test split has no batch of 64 rows"):
        evaluate(model(), Recall(), "test", 64)


def test_what_weighs_nothing_counts_for_nothing():
    batch, tiny_model = Recall().batch("train", 0, 0, 4), model()
    other = batch._replace(targets=batch.targets.at[:, 0].set(0))
    loss, (_, accuracy, _) = train.loss_and_accuracy(tiny_model, batch, None, None)
    assert not np.array_equal(batch.targets, other.targets)
    assert (loss, accuracy) == (lambda found: (found[0], found[1][1]))(
        train.loss_and_accuracy(tiny_model, other, None, None)
    )


# The command line


def config(**changes):
    """tests/configs/tiny.py with fields changed, "section__field" for nested ones, whatever the type."""
    plain = tiny.get_config().to_dict()
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            plain[section][field] = value
        else:
            plain[section] = value
    return ConfigDict(plain).lock()


@pytest.mark.parametrize("already", [None, "/mine"])
def test_compiled_programs_are_kept_unless_the_user_says_where(tmp_path, monkeypatch, already):
    """In a folder that cannot be made nothing is kept, and nothing fails."""
    (tmp_path / "file").touch()
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = [getattr(jax.config, name) for name in names]
    try:
        for place, kept in ((tmp_path / "file", None), (tmp_path / "cache", tmp_path / "cache/jax")):
            monkeypatch.setenv("XLSTM_JAX_CACHE", str(place))
            jax.config.update(names[0], already)
            script.use_compilation_cache()
            assert jax.config.jax_compilation_cache_dir == (already or (kept and str(kept)))
            assert kept is None or kept.is_dir() == (already is None)
    finally:
        for name, value in zip(names, before):
            jax.config.update(name, value)


@pytest.fixture
def no_cache(monkeypatch):
    monkeypatch.setattr(script, "use_compilation_cache", lambda: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task__name": "party"}, "unknown config.task.name 'party'; nearest: parity"),
        ({"model__backbone": "lsmt"}, "config.model: .*lstm"),
        ({"model__dropout": 2.0}, "dropout is 2.0"),
        ({"model__dim": -4}, "dim is -4"),
        ({"model__dimm": 8}, "unknown field 'config.model.dimm'; nearest: config.model.dim"),
        ({"model__context": 2}, "config.model: context is no option of this model, only of others"),
        ({"model__dim": "wide"}, r"config.model.dim is 'wide' \(str\): int is needed"),
        ({"model__form": "fuzed"}, "config.model: unknown form of Elman 'fuzed'"),
        ({"model__backbone": "slstm", "model__num_heads": 3}, "num_heads=3 must divide features=8"),
        ({"model__dtype": "float33"}, "config.model: unknown floating dtype 'float33'; nearest: float32"),
        ({"task__num_evall": 8}, "'config.task.num_evall'; nearest: config.task.num_eval"),
        ({"optimizer__learning_rat": 1.0}, "nearest: config.optimizer.learning_rate"),
        ({"optimizer__learning_rate": -1.0}, "config.optimizer: learning_rate is -1.0"),
        ({"optimizer__clip": "x"}, r"config.optimizer.clip is 'x' \(str\): float or None is needed"),
        ({"optimizer__name": "adam2"}, "config.optimizer: unknown optimizer 'adam2'; nearest: adamw"),
        ({"optimizer__warmup_steps": 21}, "config.optimizer: warmup_steps is 21"),
        ({"kind": "tager"}, "unknown config.kind 'tager'; nearest: tagger"),
        ({"steps": 0}, "config.steps is 0: at least 1"),
        ({"steps": 1.5}, r"config.steps is 1.5 \(float\): an int is needed"),
        ({"batch_size": -4}, "config.batch_size is -4"),
        ({"save_every": -1}, "config.save_every is -1: at least 0"),
        ({"seed": 2**31}, "config.seed is 2147483648: at most 2147483647"),
        ({"step": 3}, "unknown field 'config.step'; nearest: config.steps"),
        ({"model": 3}, "config.model is 3: a dictionary"),
        ({"precision": "bfloat15"}, "config: unknown precision 'bfloat15'; nearest: bfloat16"),
        (
            {"precision": "bfloat16", "model__dtype": "float32"},
            "config.precision is 'bfloat16', but config.model.dtype",
        ),
        ({"accumulate": 3}, r"config: accumulate is 3: .* \(batch_size is 8\)"),
        ({"ema": "half"}, r"config.ema is 'half' \(str\): float is needed"),
        ({"keep_last": 0}, "config.keep_last is 0: at least 1"),
    ],
)
def test_a_wrong_config_is_named_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        script.run(config(**changes), tmp_path / "run", progress=False)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_run_row_repeat_and_another_config(tmp_path, no_cache):
    row = script.run(config(), tmp_path / "run", progress=False)
    assert row.keys() >= {"id", "config", "seed", "steps", "parameters", "versions", "commit", "device", "seconds"}
    assert row.keys() >= {"valid_accuracy", "test_scaled_accuracy"} and row["id"] == "run"
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert record["parameters"] == row["parameters"] and record["config"] == resolve(config())
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert script.run(config(), tmp_path / "run", progress=False) == row
    with pytest.raises(
        ValueError, match="another config's run: model.dim is 8 there, 12 here; seed is 0 there, 1 here"
    ):
        script.run(config(model__dim=12, seed=1), tmp_path / "run", progress=False)
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_the_recorded_forms_are_those_of_a_step():
    """A step sees the rows of a micro-batch: the bytes that are stated are theirs."""

    def forms(**changes):
        plain = resolve(config(model__memory_budget=10**6, **changes))
        task = build_task(plain)
        return chosen_forms(*abstract_model(plain, task), task, plain)

    assert forms(batch_size=8, accumulate=2) == forms(batch_size=4) != forms(batch_size=8)


def test_precision_and_forms_are_recorded_and_another_format_refused(tmp_path, no_cache):
    run = tmp_path / "run"
    steps = dict(ema=0.9, accumulate=2, on_bad_step="skip", spike=5, keep_every=10)
    changed = config(precision="bfloat16", model__form="auto", **steps)
    script.run(changed, run, progress=False, profile=2)
    record = json.loads((run / "config.json").read_text())
    assert record["forms"] == ["fused: the kernels are for TPUs and GPUs, and this program is for a cpu"]
    assert record["precision"].items() >= {"dtype": "bfloat16", "param_dtype": "float32"}.items()
    assert sorted(int(p.name) for p in (run / "checkpoints").iterdir()) == [10, 15, 20]
    assert any(path.is_file() for path in (run / "profile").rglob("*"))
    spent = metrics.read(run / "timing.jsonl")[-1]
    assert spent["spent"].keys() == {"start_up", "compile", "checkpoint", "evaluation"} and 0 <= spent["goodput"] < 1
    (run / "result.json").unlink()
    metrics.write_json(run / "config.json", record | {"format": 1})
    with pytest.raises(ValueError, match="holds checkpoints of format 1, this version reads 2: go on with"):
        script.run(changed, run, progress=False)


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made: Not a directory"):
        script.run(config(), tmp_path / "file/run", progress=False)
    with pytest.raises(ValueError, match="cannot be made: File exists"):
        script.run(config(), tmp_path / "file", progress=False)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="a run without config.json"):
        script.run(config(), tmp_path / "foreign", progress=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"config": {', "is no JSON"), ("[]", "is no JSON object"), ("{}", "holds no config")],
)
def test_a_damaged_record_is_named_and_kept(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"config.json.*{message}.*: restore it or choose another folder"):
        script.run(config(), tmp_path, progress=False)
    assert (tmp_path / "config.json").read_text() == content


@pytest.mark.parametrize("number,where", [(0, "train"), (1, "valid"), (2, "test")])
def test_a_label_outside_the_vocabulary_stops_the_run_before_it_starts(tmp_path, no_cache, monkeypatch, number, where):
    batch = Parity.batch

    def shifted(task, split, *args):
        drawn = batch(task, split, *args)
        return drawn._replace(targets=drawn.targets + (split == where))

    monkeypatch.setattr(Parity, "batch", shifted)
    message = rf"parity: targets hold 3, outside 0 .. 2 .*batch 0 of the {where} split"
    with pytest.raises(ValueError, match=message):
        script.run(config(task__num_eval=24 + number), tmp_path / "run", progress=False)  # a task of its own: no cache
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"lock"}


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(script.os, "access", lambda *_: False)  # the tests may run as root
    with pytest.raises(ValueError, match="cannot be written"):
        script.run(config(), tmp_path, progress=False)


TINY = "--config=tests/configs/tiny.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([TINY, "--config.stepz=3"], "steps"),
        ([TINY, "--config.+optimizer.betas=3"], "config.optimizer: betas are (3,): two numbers"),
        ([TINY, "--workdir="], "argument --workdir: it is empty: name a folder"),
        ([TINY, "--workdir=gs://b/a"], "gs://b/a is not a folder: name the one where it is mounted, such as /mnt/b/a"),
        ([TINY, "--workdir=runs/xlstm[1:1]"], "checkpoints cannot be kept under a name with '[', '*' or '?'"),
        ([TINY, "--config.optimizer.learning_rate=nan"], "config.optimizer: learning_rate is nan: it must be positive"),
        ([TINY, "--config.+optimizer.epsilon=-1.0"], "config.optimizer: epsilon is -1.0"),
        ([TINY, "--config.optimizer.weight_decay=inf"], "config.optimizer: weight_decay is inf"),
        ([TINY, "--config.model.backbone=xlstm[1:x]"], "xlstm[a:b] for any a and b"),
        ([TINY, "--config.+model.dtype=bfloat"], "bfloat"),
        ([TINY, "--config.model.dimm=3"], "model.dim"),
        ([TINY, "--config.steps=abc"], "abc"),
        ([TINY, "--config.steps=1.5"], "int"),
        ([TINY, "--config.steps"], "config.steps"),
        ([TINY + ":nonsense"], "tiny.py takes no argument or lm"),
        (["--config=tests/configs/absent.py"], "absent.py"),
        ([], "required: --config"),
        ([TINY, "--wrkdir=x"], "wrkdir"),
        ([TINY, "steps=3"], "unknown argument 'steps=3'"),
        ([TINY, "--config.task.name=party"], "nearest: parity"),
        ([TINY, "--config.+model.foo=3"], "unknown field 'config.model.foo'"),
        ([TINY, "--config.+modle.foo=3"], "unknown section 'modle'; nearest: model"),
        ([TINY, "--config.+task.num_evall=8"], "nearest: config.task.num_eval"),
        ([TINY, "--config.model.backbone=mlstm", "--config.+model.num_heads=3"], "num_heads=3 must divide"),
        ([TINY + ":lm", "--config.+task.corpus=file:absent.txt"], "cannot read corpus file absent.txt"),
        ([TINY + ":lm", "--config.task.seq_len=0"], "seq_len must be at least 1"),
    ],
)
def test_a_wrong_command_line_ends_in_one_line_and_code_2(arguments, message, tmp_path, monkeypatch, capsys, request):
    monkeypatch.chdir(request.config.rootpath)
    assert script.main([f"--workdir={tmp_path / 'run'}", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_workdir_is_asked_for(monkeypatch, capsys, request):
    monkeypatch.chdir(request.config.rootpath)
    assert script.main([TINY]) == 2
    assert "required: --workdir" in capsys.readouterr().err


def test_a_finished_run_says_so_and_garbage_is_named_and_kept(tmp_path, no_cache, monkeypatch, capsys, request):
    monkeypatch.chdir(request.config.rootpath)
    arguments = [TINY, f"--workdir={tmp_path}"]
    assert script.main(arguments) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert "tiny.py" in first and "model elman" in first and str(tmp_path) in first
    assert "finished: 20 steps" in last and "already" not in last
    assert script.main(arguments) == 0
    _, last = capsys.readouterr().out.splitlines()
    assert f"already finished, nothing was trained; {tmp_path}/result.json" in last
    kept = {name: (tmp_path / name).read_bytes() for name in ("result.json", "timing.jsonl", "metrics.jsonl")}
    for name, content in (
        ("result.json", kept["result.json"][:30]),
        ("result.json", b"{}"),
        ("metrics.jsonl", b"\xff\x00garbage\n"),
        ("metrics.jsonl", b"3\n"),
        ("timing.jsonl", b'{"step": 3}\n'),
        ("config.json", b"\xff\x00"),
    ):
        (tmp_path / name).write_bytes(content)
        assert script.main(arguments) == 2
        error = capsys.readouterr().err
        assert name in error and error.count("\n") == 1 and (tmp_path / name).read_bytes() == content
        if name == "result.json":
            (tmp_path / name).unlink()
        elif name in kept:
            (tmp_path / name).write_bytes(kept[name])


@pytest.mark.parametrize("main", [script.main, demo.main, generate.main, gradient_flow.main, sweep.main, table.main])
def test_help_is_the_whole_docstring(main, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    lines = sys.modules[main.__module__].__doc__.splitlines()
    shown = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert all(line in shown for line in lines)


def test_divergence_is_code_1(tmp_path, monkeypatch, capsys, request):
    def diverge(*_, **__):
        raise train.Diverged("diverged at step 3: loss nan")

    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.setattr(script, "run", diverge)
    assert script.main([f"--workdir={tmp_path / 'run'}", TINY]) == 1
    assert capsys.readouterr().err == "error: diverged at step 3: loss nan\n"
