"""The sweep: what is missing gets done once, whatever stops it in between."""

import fcntl
import io
import json
import sys
import threading
from pathlib import Path

import jax
import pytest
from rich.console import Console

from experiments import rows, runner, status, sweep
from experiments.launchers import local
from experiments.planning import Run, load
from xlstm_jax import metrics

CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=None):
    return ConfigDict({"steps": int(arg or 10), "seed": 0, "model": {"backbone": "a"}}).lock()

def sweep(arg=None):
    for seed in (0, 1):
        for backbone in ("a", "b"):
            yield {"model.backbone": backbone, "seed": seed}
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "c.py").write_text(CONFIG)
    return str(tmp_path / "c.py")


SCORES = {"a0": 0.7, "b0": 0.8, "a1": 0.6, "b1": 0.5}


class Trainer:
    """Stands in for `experiments.train.run`: counts its calls, fails or is interrupted where told."""

    def __init__(self, fail=(), interrupt=()):
        self.calls, self.fail, self.interrupt = [], fail, interrupt

    def __call__(self, config, folder, progress=True):
        name = f"{config.model.backbone}{config.seed}"
        self.calls.append(name)
        if name in self.interrupt:
            raise KeyboardInterrupt
        if name in self.fail:
            raise ValueError(f"{name} cannot\nbe trained")
        return {"id": Path(folder).name, "steps": config.steps, "seconds": 1.0, "valid_accuracy": SCORES[name]}


def start(action, config, workdir, *arguments, trainer=None):
    argv = [action, f"--config={config}", f"--workdir={workdir}", *arguments]
    return sweep.main(argv, run_one=trainer or Trainer())


def test_every_run_once_and_seeds_together(config, tmp_path):
    trainer = Trainer()
    assert start("run", config, tmp_path / "w", trainer=trainer) == 0
    assert trainer.calls == ["a0", "a1", "b0", "b1"]
    again = Trainer()
    assert start("run", config, tmp_path / "w", trainer=again) == 0
    assert again.calls == []
    found = metrics.read(tmp_path / "w" / "results.jsonl")
    assert [row["overrides"] for row in found] == [
        {"model.backbone": backbone, "seed": seed} for backbone in "ab" for seed in (0, 1)
    ]


def test_programs_of_earlier_runs_are_dropped_before_the_process_has_too_many_maps(config, tmp_path, monkeypatch):
    held, left = [], []

    class Compiling(Trainer):
        def __call__(self, config, folder, progress=True):
            left.append(held[0]._cache_size() if held else 0)
            held[:] = [jax.jit(lambda x: x + 1)]
            held[0](1.0)
            return super().__call__(config, folder, progress)

    monkeypatch.setattr(runner, "MAPS", tmp_path / "maps")
    for lines, cached in ((16_000, 1), (16_001, 0)):
        (tmp_path / "maps").write_text("\n" * lines)
        held.clear(), left.clear()
        assert start("run", config, tmp_path / str(lines), trainer=Compiling()) == 0
        assert left == [0, cached, cached, cached]


def test_a_failed_run_is_recorded_and_repeated_and_the_others_go_on(config, tmp_path, capsys):
    trainer = Trainer(fail=["a1"])
    assert start("run", config, tmp_path / "w", trainer=trainer) == 1
    assert trainer.calls == ["a0", "a1", "b0", "b1"]
    run = next(r for r in load(config).runs if r.overrides == {"model.backbone": "a", "seed": 1})
    error = tmp_path / "w" / "runs" / run.id / "error.txt"
    assert "a1 cannot" in error.read_text()
    out = capsys.readouterr().out
    assert f"failed   {run.id}" in out and "3 of 4 runs done" in out
    assert "--retry=failed" in out
    trainer = Trainer()
    assert start("run", config, tmp_path / "w", trainer=trainer) == 1
    assert trainer.calls == [] and error.exists()
    assert start("run", config, tmp_path / "w", "--retry=failed", trainer=trainer) == 0
    assert trainer.calls == ["a1"] and not error.exists()
    assert "a1 cannot" in error.with_name("error-1.txt").read_text()


def test_an_interrupted_sweep_goes_on(config, tmp_path, capsys):
    assert start("run", config, tmp_path / "w", trainer=Trainer(interrupt=["b0"])) == 130
    assert "the same command goes on" in capsys.readouterr().err
    trainer = Trainer()
    assert start("run", config, tmp_path / "w", trainer=trainer) == 0
    assert trainer.calls == ["b0", "b1"]


def test_a_line_cut_by_a_kill_is_repaired_and_no_row_doubles(config, tmp_path, capsys):
    start("run", config, tmp_path / "w")
    file = tmp_path / "w" / "results.jsonl"
    whole = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(whole[:3]) + whole[3][:20])
    said = f"{file}: its last line was cut, 20 bytes of a row, and is left out; nothing else is lost\n"
    trainer = Trainer()
    capsys.readouterr()
    for action in ("status", "plan", "run"):
        assert start(action, config, tmp_path / "w", trainer=trainer) == 0
        assert capsys.readouterr().err == said
    assert start("status", config, tmp_path / "w") == 0 and not capsys.readouterr().err
    assert trainer.calls == ["b1"]
    assert len(file.read_bytes().splitlines()) == 4
    before = file.read_bytes()
    rows.append(tmp_path / "w", json.loads(before.splitlines()[0]))
    assert file.read_bytes() == before


def test_a_run_of_another_process_is_left_alone(config, tmp_path):
    plan, workdir = load(config), tmp_path / "w"
    rows.prepare(workdir, plan)
    with open(workdir / "locks" / plan.runs[0].id, "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert rows.state(workdir, plan.runs[0], {}) == "running"
        trainer = Trainer()
        assert start("run", config, workdir, trainer=trainer) == 1
        assert trainer.calls == ["a1", "b0", "b1"]
    assert rows.state(workdir, plan.runs[0], {}) == "missing"


def test_a_glance_at_the_state_takes_no_run_away(config, tmp_path):
    plan, workdir = load(config), tmp_path / "w"
    rows.prepare(workdir, plan)
    with open(workdir / "locks" / plan.runs[0].id, "w") as watcher:
        fcntl.flock(watcher, fcntl.LOCK_SH)
        assert rows.state(workdir, plan.runs[0], {}) == "missing"
        threading.Timer(0.01, fcntl.flock, (watcher, fcntl.LOCK_UN)).start()
        with rows.claim(workdir, plan.runs[0]) as mine:
            assert mine and rows.state(workdir, plan.runs[0], {}) == "running"


def test_index_runs_one(config, tmp_path, capsys):
    trainer = Trainer()
    assert start("run", config, tmp_path / "w", "--index=1", trainer=trainer) == 0
    assert trainer.calls == ["b0"]
    assert start("run", config, tmp_path / "w", "--index=4") == 2
    assert "runs 0 to 3" in capsys.readouterr().err


def test_plan_and_status_start_nothing(config, tmp_path, capsys):
    workdir, trainer = tmp_path / "w", Trainer()
    assert start("plan", config, workdir, trainer=trainer) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    runs = load(config).runs
    lines = sorted((line[0], line[1], line[-1]) for line in lines if line[1:2] == ["missing"])
    assert lines == [(str(i), "missing", run.id) for i, run in enumerate(runs)]
    assert not workdir.exists()
    start("run", config, workdir, trainer=Trainer(fail=["b1"]))
    capsys.readouterr()
    assert start("status", config, workdir, trainer=trainer) == 0
    head, *lines, last = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head == ["#", "state", "run", "step", "steps/s", "seconds", "valid_accuracy"]
    assert lines[0] == ["0", "done", runs[0].id, "10/10", "1", "0.7000"]
    assert lines[1] == ["1", "done", runs[1].id, "10/10", "1", "0.8000", "*"]
    assert lines[3][:3] == ["3", "failed", runs[3].id] and len(lines) == 4
    assert " ".join(last) == f"3 done, 0 running, 1 failed, 0 missing; best valid_accuracy 0.8000 ({runs[1].id})"
    assert trainer.calls == []
    values = dict(zip((run.id for run in runs), (float("nan"), 0.5, 0.4)))
    found = status.best(load(config), {name: {"valid_accuracy": value} for name, value in values.items()})
    assert found == (runs[1].id, "valid_accuracy", 0.5)


def test_the_folder_of_another_config_is_refused_and_keeps_all(config, tmp_path, capsys):
    start("run", config, tmp_path / "w")
    before = {p: p.read_bytes() for p in (tmp_path / "w").rglob("*") if p.is_file()}
    for message in ("steps: 10 there, 20 here", "has results and no sweep.json"):
        for action in ("run", "status", "plan"):
            capsys.readouterr()
            assert start(action, config + ":20", tmp_path / "w") == 2
            error = capsys.readouterr().err
            assert message in error and error.count("\n") == 1
        (tmp_path / "w" / "sweep.json").unlink(missing_ok=True)
    del before[tmp_path / "w" / "sweep.json"]
    assert before == {p: p.read_bytes() for p in (tmp_path / "w").rglob("*") if p.is_file()}


@pytest.mark.parametrize("name,content", [("w", "a file"), ("w/sweep.json", "no json")])
def test_unusable_folders_are_refused(config, tmp_path, capsys, name, content):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    assert start("run", config, tmp_path / "w") == 2
    error = capsys.readouterr().err
    assert "choose another folder" in error and error.count("\n") == 1
    assert (tmp_path / name).read_text() == content


def test_wrong_arguments_end_in_one_line(config, tmp_path, capsys):
    for arguments in (["--launcher=slrum"], ["--workerz=2"], ["--index=x"]):
        assert start("run", config, tmp_path / "w", *arguments) == 2
        error = capsys.readouterr().err
        assert arguments[0].partition("=")[2] in error and error.count("\n") == 1
    assert start("rnu", config, tmp_path / "w") == 2
    assert "rnu" in capsys.readouterr().err and not (tmp_path / "w").exists()


def test_a_line_that_is_no_result_row_is_named(config, tmp_path, capsys):
    start("run", config, tmp_path / "w")
    file = tmp_path / "w" / "results.jsonl"
    for line, message in (('{"id": 1}', "line 1 is no result row"), ('{"id', "line 1 is no JSON")):
        file.write_text(line + "\n")
        capsys.readouterr()
        assert start("status", config, tmp_path / "w") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and file.read_text() == line + "\n"


def test_wrong_fields_are_refused_before_anything_starts(config, tmp_path, capsys):
    assert start("run", config, tmp_path / "w", "--config.stepz=3") == 2
    assert "unknown field 'stepz'; nearest: steps" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


WORKER = """
import sys
from pathlib import Path
from rich.console import Console
from experiments import runner
from experiments.planning import load

def run_one(config, folder, progress):
    if config.seed == 1 and config.model.backbone == "b":
        raise ValueError("no")
    return {"steps": config.steps, "seconds": 0.1}

index, workers = map(int, sys.argv[3].removeprefix("--worker=").split("/"))
runner.inline(load(sys.argv[1]), Path(sys.argv[2]), run_one, console=Console(), worker=(index, workers))
"""


def test_local_workers_share_the_runs(config, tmp_path, monkeypatch):
    monkeypatch.setattr(status, "POLL", 0.05)
    (tmp_path / "worker.py").write_text(WORKER)
    plan, workdir = load(config), tmp_path / "w"
    rows.prepare(workdir, plan)
    out = io.StringIO()
    command = [sys.executable, str(tmp_path / "worker.py"), config, str(workdir)]
    local.run(plan, workdir, command, {"workers": 2}, Console(file=out), title="sweep")
    logs = "".join(p.read_text() for p in (workdir / "logs").iterdir())
    assert len(rows.read(workdir)) == 3, logs
    assert logs.count("failed: ValueError: no") == 1
    assert "runs done" in out.getvalue() and "left" in out.getvalue()
    assert [line.split()[0] for line in runner.failures(plan, workdir)] == ["failed"]


def test_workers_begin_with_different_settings():
    runs = [Run(f"{b}{s}", {"model.backbone": b, "seed": s}) for b in "abc" for s in (0, 1)]
    orders = [[run.id for run in runner.in_order(runs, index, 2)] for index in (0, 1)]
    assert orders == [["a0", "a1", "c0", "c1", "b0", "b1"], ["b0", "b1", "c0", "c1", "a0", "a1"]]


def test_time_left_follows_what_the_runs_took(config):
    plan = load(config)
    first, *others = plan.runs
    assert runner.seconds_left(plan, others, {}) is None
    assert runner.seconds_left(plan, others, {first.id: {"wall_seconds": 10.0}}) == 30.0
    assert [runner.clock_or_unknown(s) for s in (None, 65.0, 3_700.0)] == [
        "an unknown time",
        "about 1:05",
        "about 1:01:40",
    ]
