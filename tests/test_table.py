"""The table: numbers into markdown, CSV, LaTeX and a picture, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest

from experiments import rows, table
from experiments.build import resolve
from experiments.planning import load

ROOT = Path(__file__).parents[1]

CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=None):
    return ConfigDict({"steps": 1000, "seed": 0, "model": {"backbone": "lstm"}, "task": {"name": "parity"},
                       "optimizer": {"learning_rate": 0.1}}).lock()

def sweep(arg=None):
    for backbone in ("lstm", "mlstm"):
        for rate in (0.1, 0.01):
            for seed in (0, 1):
                yield {"model.backbone": backbone, "optimizer.learning_rate": rate, "seed": seed}

TABLE = dict(
    title="Title", row="model.backbone", rows={"lstm": "LSTM", "mlstm": "mLSTM"}, column="task.name",
    columns={"parity": "Parity_1"}, metric="test_score", select="valid_score", aggregate="mean", range=(0, 1),
    paper=dict(name="paper", source="Fig. 4", values={("lstm", "parity"): 1.0}, missing="in an image only"),
    references=[dict(name="other", source="Tab. 3", values={("mlstm", "parity"): "≥ 0.90"})],
    baselines={"chance": {"parity": 0.0}},
    differences="Here: {config[steps]:,} steps, rates {swept[optimizer.learning_rate]}.",
)
"""


@pytest.fixture
def sweep(tmp_path):
    (tmp_path / "c.py").write_text(CONFIG)
    return load(str(tmp_path / "c.py"))


@pytest.fixture
def filled(sweep, tmp_path):
    """LSTM: rate 0.1 has the better validation score; mLSTM: one run only."""
    rows.prepare(tmp_path / "w", sweep)
    for run in sweep.runs[:5]:
        good = run.overrides["optimizer.learning_rate"] == 0.1
        value = (0.8 if good else 0.95) + 0.1 * run.overrides["seed"]
        if run.overrides["model.backbone"] == "mlstm":
            value = -0.001
        result = {"id": run.id, "overrides": run.overrides, "test_score": value, "valid_score": float(good)}
        rows.append(tmp_path / "w", result | {"config": sweep.config(run).to_dict()})
    return tmp_path / "w"


def test_cells_take_the_mean_over_seeds_of_the_setting_that_validates_best(sweep, filled):
    found = table.cells(sweep.module.TABLE, list(rows.read(filled).values()))
    assert found["lstm", "parity"].value == pytest.approx(0.85)
    assert found["lstm", "parity"].runs == pytest.approx([0.8, 0.9])
    assert found["mlstm", "parity"].runs == [-0.001]


@pytest.mark.parametrize("aggregate,value", [("mean", 0.85), ("median", 0.85), ("max", 0.9), ("min", 0.8)])
def test_aggregates(sweep, filled, aggregate, value):
    found = table.cells(sweep.module.TABLE | {"aggregate": aggregate}, list(rows.read(filled).values()))
    assert found["lstm", "parity"].value == pytest.approx(value)


def test_four_files(sweep, filled):
    text = table.write(sweep, filled)
    assert text == (filled / "table.md").read_text()
    lines = text.splitlines()
    assert "|        |            Parity_1 | paper |" in lines
    assert "| LSTM   | 0.85 (0.80–0.90; 2) |  1.00 |" in lines
    assert "| mLSTM  |                0.00 |     – |" in lines
    assert "| chance |                0.00 |     – |" in lines
    assert "| mLSTM, other |   ≥ 0.90 |" in lines
    assert "- Paper: Fig. 4. –: in an image only." in lines
    assert "- Protocol. Here: 1,000 steps, rates 0.1, 0.01." in lines
    first, lstm, *_ = (filled / "table.csv").read_text().splitlines()
    assert first == "row,column,test_score,min,max,runs,paper,other"
    assert lstm.startswith("lstm,parity,0.85") and lstm.endswith(",2,1.0,")
    latex = (filled / "table.tex").read_text()
    assert r" & Parity\_1 & paper \\" in latex and r"LSTM & 0.85 (0.80--0.90; 2) & 1.00 \\" in latex
    assert (filled / "table.png").read_bytes()[:4] == b"\x89PNG" and (filled / "table.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    "change,message",
    [
        ({"metric": "test_scores"}, "unknown TABLE metric 'test_scores'; nearest: test_score"),
        ({"row": "model.name"}, "TABLE names the field 'model.name'"),
        ({"aggregate": "maen"}, "unknown TABLE aggregate 'maen'; nearest: mean"),
        ({"rows": {"gru": "GRU"}}, "no result row belongs to this table"),
    ],
)
def test_a_wrong_table_ends_in_one_line(sweep, filled, capsys, tmp_path, change, message):
    with open(tmp_path / "c.py", "a") as file:
        file.write(f"\nTABLE |= {change!r}\n")
    assert table.main([f"--config={tmp_path / 'c.py'}", f"--workdir={filled}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_no_rows_no_table_or_another_sweep_end_in_one_line(sweep, filled, capsys, tmp_path):
    arguments = [f"--config={tmp_path / 'c.py'}", f"--workdir={tmp_path / 'empty'}"]
    assert table.main(arguments) == 2
    assert "run `experiments.sweep run` with the same config first" in capsys.readouterr().err
    assert table.main([arguments[0], f"--workdir={filled}", "--config.steps=7"]) == 2
    assert "steps: 1000 there, 7 here" in capsys.readouterr().err
    (tmp_path / "c.py").write_text(CONFIG.replace("TABLE =", "OTHER ="))
    assert table.main(arguments) == 2
    assert "has no TABLE" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted((ROOT / "results").rglob("sweep.json")), ids=lambda p: "-".join(p.parts[-3:-1]))
def test_the_committed_rows_fit_their_config_and_make_the_committed_table(file, tmp_path, monkeypatch):
    folder = file.parent
    monkeypatch.chdir(ROOT)
    for name in ("sweep.json", "results.jsonl"):
        shutil.copy(folder / name, tmp_path)
    source = json.loads((folder / "sweep.json").read_text())["source"]
    assert table.main([f"--config={source}", f"--workdir={tmp_path}"]) == 0
    for name in ("table.md", "table.csv"):
        assert (tmp_path / name).read_text() == (folder / name).read_text()
    sweep, done = load(source), rows.read(folder)
    assert {run.id: (run.overrides, resolve(sweep.config(run))) for run in sweep.runs} == {
        name: (row["overrides"], row["config"]) for name, row in done.items()
    }
