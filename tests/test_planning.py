"""The plan of a sweep: groups, programs, time, memory, states; and groups that run together."""

import io
import json

import pytest
from rich.console import Console

from experiments import formats, overview, planning, rows, sweep, throughput, vectorize
from experiments.planning import ROOT
from xlstm_jax import metrics

CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=None):
    config = ConfigDict()
    config.kind = "tagger"
    config.model = dict(backbone="lstm", dim=8, num_layers=1)
    config.task = dict(name="parity", num_eval=4, train_lengths=(3, 4), eval_lengths=(3, 4))
    config.optimizer = dict(name="adamw", learning_rate=0.01, weight_decay=0.1)
    config.steps, config.batch_size, config.seed = 2, 2, 0
    return config.lock()

def sweep(arg=None):
    for backbone in ("lstm", "gru"):
        for rate in (0.1, 0.01):
            for seed in (0, 1):
                yield {"model.backbone": backbone, "optimizer.learning_rate": rate, "seed": seed, "task.num_eval": 4}

def expected_seconds(arg, overrides):
    return 10 if overrides.get("model.backbone") == "lstm" else 20
"""


@pytest.fixture
def source(tmp_path):
    (tmp_path / "c.py").write_text(CONFIG)
    return str(tmp_path / "c.py")


def finish(workdir, plan, run, **more):
    row = {"id": run.id, "overrides": run.overrides, "seconds": 30.0, "wall_seconds": 30.0}
    rows.append(workdir, row | {"config": plan.config(run).to_dict()} | more)


def test_groups_are_what_one_program_can_do(source):
    plan = planning.load(source)
    found = vectorize.groups(plan, plan.runs)
    assert [[plan.runs.index(run) for run in group] for group in found] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [len(group) for group in vectorize.groups(plan, plan.runs, most=3)] == [3, 1, 3, 1]
    base = plan.base
    same = {"seed": 3, "optimizer.learning_rate": 0.5}
    for changes, equal in ((same, True), ({"optimizer.weight_decay": 0.0}, False), ({"steps": 3}, False)):
        assert (vectorize.program(planning.override(base, changes)) == vectorize.program(base)) is equal
    assert vectorize.program(planning.override(base, same), together=False) != vectorize.program(base, together=False)


def test_a_metric_that_no_run_will_have_is_told_by_the_plan_and_before_the_first_run(source, tmp_path, capsys):
    made = dict(title="T", row="seed", rows={"0": "0"}, column="steps", columns={"2": "2"}, aggregate="mean")
    for wrong, message in (
        ({"metric": "test_acuracy"}, "unknown TABLE metric 'test_acuracy'; nearest: test_accuracy"),
        ({"metric": "test_loss", "select": "valid_los"}, "unknown TABLE select 'valid_los'; nearest: valid_loss"),
    ):
        with open(source, "a") as file:
            file.write(f"\nTABLE = {made | wrong}\n")
        for action in ("plan", "run"):
            assert sweep.main([action, f"--config={source}", f"--workdir={tmp_path / 'w'}"]) == 2
            error = capsys.readouterr().err
            assert message in error and error.count("\n") == 1 and not (tmp_path / "w").exists()


def test_the_plan_counts_programs_time_and_memory(source, tmp_path):
    plan, workdir = planning.load(source), tmp_path / "w"
    rows.prepare(workdir, plan)
    finish(workdir, plan, plan.runs[0])
    rows.error_file(workdir, plan.runs[1]).parent.mkdir()
    rows.error_file(workdir, plan.runs[1]).write_text("why")
    found = overview.plan(plan, workdir, together=True)
    assert found["states"] == {"done": 1, "running": 0, "failed": 1, "missing": 6}
    assert found["programs"] == 2 and overview.plan(plan, workdir, together=False, memory=False)["programs"] == 3
    assert found["constant"] == {"task.num_eval": 4}
    assert found["runs"][0]["seconds"] == 30.0 and found["runs"][4]["seconds"] == 60.0  # 20, and the first took 3 x 10
    assert found["seconds"] == 2 * 30 + 4 * 60  # the failed run waits for --retry
    lstm, gru = found["groups"]
    assert (lstm["runs"], lstm["left"], gru["left"]) == (4, 2, 4)
    # parameters and gradients, Adam's two moments, two counts and the learning rate: 4 bytes each
    assert lstm["bytes_a_run"] == 4 * (4 * lstm["parameters"] + 3) and lstm["bytes"] == 2 * lstm["bytes_a_run"]
    assert found["bytes"] == max(lstm["bytes"], gru["bytes"])
    out = io.StringIO()
    overview.show(found, Console(file=out))
    text = out.getvalue()
    assert all(run.id in text for run in plan.runs) and "backbone=gru, learning_rate=0.01, seed=1" in text
    assert "programs to compile: 2" in text and "all runs: task.num_eval=4" in text and "about 5:00" in text
    assert "failed runs are not counted in these" in text


def test_the_plan_of_many_runs_is_one_line_each_and_json(source, tmp_path, capsys):
    with open(source, "a") as file:
        file.write("\ndef sweep(arg=None): return [{'seed': n, 'model.dim': 8 * (1 + n // 100)} for n in range(200)]\n")
    argv = ["plan", f"--config={source}", f"--workdir={tmp_path / 'w'}"]
    assert sweep.main(argv, run_one=lambda *_: None) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.split()[1:2] == ["missing"]]
    assert len(lines) == 200 and len({len(line) for line in lines}) == 1
    assert sweep.main([*argv, "--json", "--vectorize=on"], run_one=lambda *_: None) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["runs"]) == 200 and found["programs"] == 2 and not (tmp_path / "w").exists()


def test_a_wrong_option_of_any_run_is_named_by_the_plan(source, tmp_path, capsys):
    with open(source, "a") as file:
        file.write("\ndef sweep(arg=None): return [{'seed': 0}, {'task.name': 'partiy'}]\n")
    assert sweep.main(["plan", f"--config={source}", f"--workdir={tmp_path / 'w'}"]) == 2
    error = capsys.readouterr().err
    assert "run partiy-" in error and "nearest: parity" in error and error.count("\n") == 1


@pytest.mark.parametrize("arguments", (["--vectorize=onn"], ["--vectorize=on", "--index=0"]))
def test_wrong_vectorize_ends_in_one_line(source, tmp_path, capsys, arguments):
    assert sweep.main(["run", f"--config={source}", f"--workdir={tmp_path / 'w'}", *arguments]) == 2
    error = capsys.readouterr().err
    assert "vectorize" in error and error.count("\n") == 1 and not (tmp_path / "w").exists()


def test_groups_run_once_fail_alone_and_shrink_when_memory_is_short(source, tmp_path, capsys):
    plan, workdir, calls = planning.load(source), tmp_path / "w", []
    rows.prepare(workdir, plan)
    finish(workdir, plan, plan.runs[1])

    def run_group(configs, folders):
        calls.append([folder.name for folder in folders])
        if len(configs) > 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: no memory")
        wrong = ValueError("no good")
        return [wrong if c.model.backbone == "gru" and c.seed else {"steps": c.steps, "seconds": 1.0} for c in configs]

    with rows.claim(workdir, plan.runs[3]):  # another process is at it
        vectorize.launch_groups(plan, workdir, console=Console(), run_group=run_group)
    assert [len(names) for names in calls] == [2, 4, 2, 2]
    assert "out of memory" in capsys.readouterr().out
    done = rows.read(workdir)
    states = [rows.state(workdir, run, done) for run in plan.runs]
    assert states == ["done", "done", "done", "missing", "done", "failed", "done", "failed"]
    assert rows.error_file(workdir, plan.runs[5]).read_text().strip().endswith("ValueError: no good")


def test_a_group_really_runs(source, tmp_path):
    """From the command line, as a worker does its share: one program for two seeds and two learning rates."""
    with open(source, "a") as file:
        file.write("\nrows = sweep\ndef sweep(arg=None): return list(rows(arg))[:4]\n")
    argv = ["run", f"--config={source}", f"--workdir={tmp_path / 'w'}", "--vectorize=on"]
    plan = planning.load(source)
    rows.prepare(tmp_path / "w", plan)
    assert sweep.main([*argv, "--worker=0/1"]) == 0
    done = rows.read(tmp_path / "w")
    assert list(done) == [run.id for run in plan.runs] and {row["runs_together"] for row in done.values()} == {4}
    for run in plan.runs:
        row, folder = done[run.id], tmp_path / "w/runs" / run.id
        assert row["config"]["optimizer"]["learning_rate"] == run.overrides["optimizer.learning_rate"]
        assert json.loads((folder / "result.json").read_text())["test_accuracy"] == row["test_accuracy"]
        assert [line["step"] for line in metrics.read(folder / "metrics.jsonl")] == [2, 2, 2]
    losses = [row["test_loss"] for row in done.values()]
    assert len(set(losses)) == len(losses)
    before = (tmp_path / "w/results.jsonl").read_bytes()
    assert sweep.main(argv) == 0 and (tmp_path / "w/results.jsonl").read_bytes() == before


def test_throughput_writes_rows_and_a_table(source, tmp_path, capsys, monkeypatch):
    """Of one vectorised run and one alone; the measurement itself is that of a stand-in."""
    calls = []
    monkeypatch.setattr(throughput.vectorize, "together", lambda configs, *_, **__: calls.append(len(configs)) or [])
    monkeypatch.setattr(throughput.train, "run", lambda config, *_, **__: calls.append(config.seed) or {})
    monkeypatch.setattr(throughput.jax.config, "update", lambda *_: None)
    page, marks = tmp_path / "page.md", "before\n<!-- throughput -->\nold\n<!-- /throughput -->\nafter\n"
    argv = [f"--config={source}", "--runs=1,2", "--steps=2", f"--out={tmp_path / 'out'}", f"--page={page}"]
    page.write_text("no marks")
    assert throughput.main(argv) == 2 and "needs one line <!-- throughput -->" in capsys.readouterr().err
    page.write_text(marks)
    assert throughput.main(argv) == 0 and calls == [0, 1, 1, 1, 0, 1, 2, 3, 2, 2]
    found = metrics.read(tmp_path / "out/rows.jsonl")
    assert [(row["runs"], row["vectorized"]) for row in found] == [(1, False), (1, True), (2, False), (2, True)]
    assert page.read_text() == marks.replace("old\n", throughput.markdown(found))
    text = throughput.markdown([row | {"again": row["runs"] * 2.0 ** (not row["vectorized"])} for row in found])
    assert [line.split("|")[2:4] for line in text.splitlines()[2:4]] == [[" 2.00 ", " 1.00 "], [" 4.00 ", " 2.00 "]]
    assert throughput.main(["--runs=1,x"]) == 2 and "numbers of runs" in capsys.readouterr().err


def test_the_page_of_sweeps_has_the_table_of_the_committed_rows():
    text, rows = (ROOT / "docs/sweeps.md").read_text(), metrics.read(ROOT / "results/throughput/rows.jsonl")
    assert formats.between_marks(text, "throughput", throughput.markdown(rows)) == text
