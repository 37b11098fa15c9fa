"""Random search and TPE behind the sweep: ids, spaces, resuming, what is refused."""

import itertools
import json
import statistics

import pytest

from experiments import planning, pruning, rows, search, status, sweep, table
from xlstm_jax import metrics

CONFIG = """
from ml_collections import ConfigDict
from experiments.search import choice, log_uniform, uniform

def get_config(arg=None):
    optimizer = {"learning_rate": 0.1, "weight_decay": 0.0}
    return ConfigDict({"steps": 10, "seed": 0, "model": {"backbone": "a"}, "optimizer": optimizer}).lock()

def sweep(arg=None):
    yield {"model.backbone": "a"}
    yield {"model.backbone": "b"}

def search(arg=None):
    rates = {"optimizer.learning_rate": log_uniform(1e-4, 1e-1), "optimizer.weight_decay": uniform(0, 0.5)}
    return rates | {"seed": choice(0, 1, 2)}

TABLE = dict(
    title="T", row="model.backbone", rows={"a": "A", "b": "B"}, column="steps", columns={"10": "10"},
    metric="test_loss", select="valid_loss", aggregate="min", lower_is_better=True,
)
"""

EVALUATED = """
plain = get_config

def get_config(arg=None):
    config = plain(arg).unlock()
    config.eval_every = 4
    return config.lock()
"""


@pytest.fixture
def source(tmp_path):
    (tmp_path / "c.py").write_text(CONFIG)
    return str(tmp_path / "c.py")


def start(source, workdir, *words, calls=None):
    def run_one(config, folder, progress=True):
        rate = config.optimizer.learning_rate
        (calls if calls is not None else []).append(rate)
        return {"steps": 10, "seconds": 1.0, "valid_loss": abs(rate - 0.01), "test_loss": rate}

    return sweep.main(["run", f"--config={source}", f"--workdir={workdir}", *words], run_one=run_one)


def test_random_draws_are_the_same_for_every_row_and_stay_when_more_are_asked_for(source):
    few, many = (planning.load(f"{source}@random,{trials},7") for trials in (5, 40))
    assert len(few.runs) == 10 and len({run.id for run in many.runs}) == 80
    assert {run.id for run in few.runs} < {run.id for run in many.runs}
    drawn = [{k: v for k, v in run.overrides.items() if k != "model.backbone"} for run in many.runs]
    assert drawn[:40] == drawn[40:]
    rates = [each["optimizer.learning_rate"] for each in drawn[:40]]
    assert all(1e-4 <= rate <= 1e-1 for rate in rates) and 5 < sum(rate < 3e-3 for rate in rates) < 35
    assert {each["seed"] for each in drawn} == {0, 1, 2}
    other = planning.load(f"{source}@random,5,8")
    assert not {run.id for run in other.runs} & {run.id for run in few.runs}


def test_a_random_search_is_run_once_and_goes_on(source, tmp_path, capsys):
    first, second = [], []
    assert start(source, tmp_path / "w", "--search=random", "--trials=3", calls=first) == 0
    assert start(source, tmp_path / "w", "--search=random", "--trials=5", calls=second) == 0
    assert len(first) == 6 and len(second) == 4 and not set(first) & set(second)
    assert {row["overrides"]["model.backbone"] for row in rows.read(tmp_path / "w").values()} == {"a", "b"}
    capsys.readouterr()
    assert sweep.main(["status", f"--config={source}@random,5,0", f"--workdir={tmp_path / 'w'}"]) == 0
    assert "10 done, 0 running" in capsys.readouterr().out


def test_equal_draws_are_one_run():
    found = search.random_rows({"seed": search.choice(0, 1)}, search.Search("random", 30, 0), [{"a": 1}])
    assert sorted(row["seed"] for row in found) == [0, 1]


def test_tpe_comes_near_the_best_and_a_killed_search_goes_on(source, tmp_path, capsys):
    pytest.importorskip("optuna")
    calls, more = [], []
    assert sweep.main(["status", f"--config={source}@tpe,8,0", f"--workdir={tmp_path / 'w'}"]) == 0
    assert "the search has proposed no run yet" in capsys.readouterr().out
    assert start(source, tmp_path / "w", "--search=tpe", "--trials=8", calls=calls) == 0
    file = tmp_path / "w" / search.PROPOSED
    assert len(calls) == 16 and len(file.read_text().splitlines()) == 16
    with open(file, "a") as lines:
        lines.write('{"row": 0, "dra')
    assert start(source, tmp_path / "w", "--search=tpe", "--trials=14", calls=more) == 0
    assert len(more) == 12 and len(rows.read(tmp_path / "w")) == 28
    assert all(json.loads(line) for line in file.read_text().splitlines())
    assert min(abs(rate - 0.01) for rate in calls + more) < 5e-3


def test_what_falls_behind_the_median_is_pruned(source, tmp_path, capsys):
    pytest.importorskip("optuna")
    with open(source, "a") as file:
        file.write("\ndef sweep(arg=None): return [{'model.backbone': 'a'}]\n")
    ended, words = {}, ("--search=random", "--trials=12", "--prune=median")

    def run_one(config, folder, progress=True, pruned=None):
        loss = config.optimizer.learning_rate
        with metrics.Lines(folder / "metrics.jsonl") as lines:
            for step in (4, 8):
                lines.write(step=step, split="valid", loss=loss)
                if pruned():
                    ended[loss] = step
                    return {"steps": step, "seconds": 1.0, "pruned": step, "valid_loss": loss}
        return {"steps": 10, "seconds": 1.0, "valid_loss": loss, "test_loss": loss}

    argv = ["run", f"--config={source}", f"--workdir={tmp_path / 'w'}", *words]
    assert sweep.main(argv, run_one=run_one) == 2
    assert "--prune needs evaluations before the last step" in capsys.readouterr().err
    with open(source, "a") as file:
        file.write(EVALUATED)
    assert sweep.main(argv, run_one=run_one) == 0
    done = list(rows.read(tmp_path / "w").values())
    losses = [row["valid_loss"] for row in done]
    wanted, reached = {}, {4: [], 8: []}
    for loss, step in itertools.product(losses, reached):
        if loss not in wanted:
            if len(reached[step]) >= 5 and loss > statistics.median(reached[step]):
                wanted[loss] = step
            reached[step].append(loss)
    assert ended == wanted and 0 < len(ended) < 7
    plan = planning.load(f"{source}@random,12,0,median")
    (cell,) = table.cells(plan.module.TABLE, [row | {"config": {"steps": 10}} for row in done]).values()
    assert len(cell.runs) == 1 and cell.value == min(losses)
    seen = status.snapshot(plan, tmp_path / "w")
    assert f"{len(ended)} of them pruned" in status.summary(plan, tmp_path / "w", seen, 1)


@pytest.mark.parametrize(
    "mine,others,wanted",
    [
        ({4: 2.0}, [{4: 1.0}] * 4, False),  # too few to compare with
        ({4: 2.0}, [{4: 1.0}] * 5, True),
        ({4: 1.0}, [{4: 1.0}] * 5, False),
        ({4: 0.5, 8: 2.0}, [{4: 1.0, 8: 1.0}] * 5, False),  # the best that it has reached counts
        ({4: 2.0, 8: 2.0}, [{4: 1.0}] * 5, False),  # none of them has got as far
        ({4: 2.0}, [{4: float("nan")}] * 9, False),
        ({4: float("nan")}, [{4: 1.0}] * 5, True),
        ({}, [{4: 1.0}] * 5, False),
    ],
)
def test_the_median_is_that_of_the_others_at_this_step(mine, others, wanted):
    optuna = pytest.importorskip("optuna")
    assert pruning.behind(optuna, mine, others, lower=True) == wanted


def test_tpe_is_told_how_far_a_run_came():
    optuna = pytest.importorskip("optuna")
    space, states = {"rate": search.uniform(0, 1)}, optuna.trial.TrialState
    for (value, pruned), state in (
        ((0.5, None), states.COMPLETE),
        ((0.5, 40), states.PRUNED),
        ((float("nan"), 40), states.FAIL),
        ((None, None), states.FAIL),
    ):
        trial = search._trial(optuna, {"rate": 0.1}, space, value, pruned)
        assert trial.state == state
        assert trial.intermediate_values == ({40: 0.5} if state == states.PRUNED else {})


def test_tpe_without_optuna_or_a_metric_ends_in_one_line(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    assert start(source, tmp_path / "w", "--search=tpe") == 2
    assert "need Optuna: pip install 'xlstm_jax[search]'" in capsys.readouterr().err
    with open(source, "a") as file:
        file.write("\ndel TABLE['select']\n")
    assert start(source, tmp_path / "v", "--search=tpe") == 2
    assert "needs TABLE['select']" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words,message",
    [
        ("@radnom,3,0", "unknown search 'radnom'; nearest: random"),
        ("@random,3", "wanted is random,TRIALS,SEED"),
        ("@random,0,0", "at least 1 trial"),
        ("@random,3,0,mean", "unknown pruner 'mean'; nearest: median"),
    ],
)
def test_wrong_searches(source, words, message):
    with pytest.raises(ValueError, match=message):
        planning.load(source + words)


@pytest.mark.parametrize(
    "space,message",
    [
        ("{}", "a dictionary of fields"),
        ("{'seed': 3}", "seed is 3: uniform, log_uniform or choice is needed"),
        ("{'model.backbone': choice('a')}", "both set model.backbone"),
        ("{'sede': choice(0)}", "unknown field 'sede'; nearest: seed"),
        ("{'steps': uniform(1, 2)}", "is of type float"),
        ("{'seed': uniform(2, 1)}", r"uniform\(2, 1\): two finite bounds"),
        ("{'seed': log_uniform(0, 1)}", "the lower bound must be positive"),
        ("{'seed': choice()}", "at least one value"),
    ],
)
def test_wrong_spaces(source, space, message):
    with open(source, "a") as file:
        file.write(f"\ndef search(arg=None): return {space}\n")
    with pytest.raises(ValueError, match=message) as error:
        planning.load(f"{source}@random,2,0")
    assert "\n" not in str(error.value)


def test_a_config_without_a_space(source):
    with open(source, "a") as file:
        file.write("\ndel search\n")
    with pytest.raises(ValueError, match=r"no search\(arg\)"):
        planning.load(f"{source}@random,2,0")


def test_a_source_is_taken_apart():
    assert planning.parts("a@b/c.py:x,y@random,2,0") == ("a@b/c.py", "x,y", "random,2,0")
    assert planning.parts("c.py") == ("c.py", None, "")
