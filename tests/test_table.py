"""The table: numbers into markdown, CSV, LaTeX and a picture, and what it refuses."""

import json
import math
import shutil
from pathlib import Path

import pytest

from experiments import aggregation, curves, formats, rows, table
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


RESULTS = [  # rate 0.1 validates best for seed 1, rate 0.01 for seeds 0 and 2, and in the mean
    {"id": f"{rate}-{seed}", "overrides": {"optimizer.learning_rate": rate, "seed": seed}, "valid": valid, "test": test}
    | {"config": {"model": "lstm", "task": "parity", "steps": 10}}
    for rate, seed, valid, test in (
        (0.1, 0, 0.1, 0.8),
        (0.1, 1, 0.9, 0.6),
        (0.1, 2, 0.1, 1.0),
        (0.01, 0, 0.6, 0.5),
        (0.01, 1, 0.6, 0.7),
        (0.01, 2, 0.7, 0.3),
    )
]
PLACE = {"row": "model", "rows": {"lstm": "LSTM"}, "column": "task", "columns": {"parity": "Parity"}, "metric": "test"}


@pytest.mark.parametrize(
    "rule,value,spread,runs",
    [
        ({"aggregate": "mean"}, 0.5, None, [0.5, 0.7, 0.3]),
        ({"aggregate": "mean_std"}, 0.5, 0.2, [0.5, 0.7, 0.3]),
        ({"aggregate": "median_mad"}, 0.5, 0.2, [0.5, 0.7, 0.3]),
        ({"aggregate": "mean", "select_per": "seed"}, (0.5 + 0.6 + 0.3) / 3, None, [0.5, 0.6, 0.3]),
        ({"aggregate": "mean", "select_over": []}, 0.65, None, [0.8, 0.6, 1.0, 0.5, 0.7, 0.3]),
        ({"aggregate": "max"}, 1.0, None, [0.8, 0.6, 1.0]),  # the setting of the best valid run
        ({"aggregate": "max", "select": None}, 1.0, None, [0.8, 0.6, 1.0, 0.5, 0.7, 0.3]),
        ({"aggregate": "min", "select": None}, 0.3, None, [0.8, 0.6, 1.0, 0.5, 0.7, 0.3]),
        ({"aggregate": "best_of", "best_of": 2, "select_per": "seed"}, 0.6, None, [0.5, 0.6]),
        ({"aggregate": "best_of", "best_of": 2, "lower_is_better": True}, 0.6, None, [0.8, 0.6]),
    ],
)
def test_rules_of_the_papers(rule, value, spread, runs):
    rule = {name: each for name, each in ({"select": "valid"} | rule).items() if each is not None}
    found = table.cells(PLACE | rule, RESULTS)["lstm", "parity"]
    assert found.value == pytest.approx(value) and found.runs == pytest.approx(runs)
    assert found.spread == (None if spread is None else pytest.approx(spread))


def test_rows_and_columns_of_several_fields():
    fields = "task", "folder", "steps"  # no run has a folder
    column = {"column": fields, "columns": {"parity/10": "Parity, 10 steps"}, "aggregate": "max"}
    (place,) = table.cells(PLACE | column, RESULTS)
    assert place == ("lstm", "parity/10")


def test_without_select_a_mean_over_settings_is_refused():
    with pytest.raises(ValueError, match="no 'select': runs of one cell differ in optimizer.learning_rate, and mean"):
        table.cells(PLACE | {"aggregate": "mean"}, RESULTS)


def test_a_cell_says_its_runs_its_spread_and_what_is_reduced():
    entries = {"aggregate": "mean_std", "select": "valid", "title": "T", "protocol": {"steps": [10, 100], "seed": 0}}
    found = table.cells(PLACE | entries, [r | {"overrides": r["overrides"] | {"model": "lstm"}} for r in RESULTS])
    (cell,) = found.values()
    assert cell.reduced == ("seed 0 or 1 or 2 (paper: 0)",) and cell.over == ("optimizer.learning_rate",)
    assert formats.ours(entries, cell) == "0.50 ± 0.20 (3)†"
    assert table.protocols(PLACE | entries, found) == ["†, reduced (all cells): seed 0 or 1 or 2 (paper: 0)."]
    assert table.protocols(PLACE | entries, {("lstm", "parity"): cell._replace(reduced=())}) == [
        "As the paper: all cells."
    ]
    assert formats.comma_separated(PLACE | entries, found).splitlines()[1].endswith(",3,seed 0 or 1 or 2 (paper: 0)")
    assert r"0.50 $\pm$ 0.20 (3)$\dagger$" in formats.latex(PLACE | entries, found, [])
    said = aggregation.words(PLACE | entries, list(cell.over))
    assert (
        said == "mean ± standard deviation over the seeds (number of runs); learning_rate chosen by valid for each cell"
    )


def test_one_run_a_cell_says_among_how_many_settings_it_was_chosen():
    entries = PLACE | {"aggregate": "mean", "select": "valid_score"}
    runs = [row | {"valid_score": row["valid"]} for row in RESULTS if row["overrides"]["seed"] == 0]
    chosen, alone = (list(table.cells(entries, each).values()) for each in (runs, runs[:1]))
    said = "one run a cell, the best of 2 settings (learning_rate) by score on the validation split"
    assert aggregation.single(entries, chosen) == said
    assert aggregation.single(entries, [*chosen, *alone]) == f"{said}, where there are several"
    assert aggregation.single(entries, alone) == "one run a cell"


def test_a_protocol_may_be_that_of_a_column():
    for paper, differing in (({"parity": 100}, ("steps 10 (paper: 100)",)), ({"majority": 100}, ())):
        found = table.cells(PLACE | {"aggregate": "max", "protocol": {"steps": paper}}, RESULTS)
        assert found["lstm", "parity"].reduced == differing


def test_four_files(sweep, filled):
    text = table.write(sweep, filled)
    assert text == (filled / "table.md").read_text()
    lines = text.splitlines()
    assert "|        |            Parity_1 | paper |" in lines
    assert "| LSTM   | 0.85 (0.80–0.90; 2) |  1.00 |" in lines
    assert "| mLSTM  |            0.00 (1) |     – |" in lines
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
        ({"rows": ["lstm", "mlstm"]}, "TABLE rows is ['lstm', 'mlstm']: a dictionary is needed"),
        ({"aggregate": "maen"}, "unknown TABLE aggregate 'maen'; nearest: mean"),
        ({"metrics": "test_score"}, "unknown TABLE entry 'metrics'; nearest: metric"),
        ({"aggregate": "best_of"}, "the rule best_of needs the number of runs, such as 3"),
        ({"select": "valid_scroe"}, "unknown TABLE metric 'valid_scroe'; nearest: valid_score"),
        ({"select_per": "sede"}, "unknown TABLE select_per 'sede'; nearest: seed"),
        ({"select_over": ["optimizer.rate"]}, "unknown TABLE select_over 'optimizer.rate'"),
        ({"protocol": {"stesp": 3}}, "TABLE names the field 'stesp', which the run"),
        ({"protocol": {"steps": {"partiy": 3}}}, "protocol of steps: unknown TABLE column 'partiy'; nearest: parity"),
        ({"rows": {"lsmt": "LSTM", "mlstm": "mLSTM"}}, "unknown TABLE row 'lsmt'; nearest: lstm"),
        ({"columns": {"partiy": "Parity"}}, "unknown TABLE column 'partiy'; nearest: parity"),
        ({"baselines": {"chance": {"partiy": 0}}}, "baselines: unknown TABLE column 'partiy'; nearest: parity"),
        (
            {"paper": {"name": "paper", "source": "", "values": {("lsmt", "parity"): 1.0}}},
            "paper: unknown TABLE row 'lsmt'; nearest: lstm",
        ),
    ],
)
def test_a_wrong_table_ends_in_one_line(sweep, filled, capsys, tmp_path, change, message):
    with open(tmp_path / "c.py", "a") as file:
        file.write(f"\nTABLE |= {change!r}\n")
    assert table.main([f"--config={tmp_path / 'c.py'}", f"--workdir={filled}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_rows_that_the_sweep_has_no_longer_are_left_out_and_counted(sweep, filled, capsys, tmp_path):
    before = [line for line in table.write(sweep, filled).splitlines() if line.startswith("|")]
    run = sweep.runs[0]
    gone = rows.read(filled)[run.id] | {"id": "gone", "overrides": run.overrides | {"seed": 2}}
    rows.append(filled, gone)
    after = table.write(sweep, filled).splitlines()
    assert [line for line in after if line.startswith("|")] == before
    assert "- Left out: 1 finished runs in the folder that the sweep has no longer." in after
    (filled / "results.jsonl").write_text(json.dumps(gone) + "\n")
    assert table.main([f"--config={tmp_path / 'c.py'}", f"--workdir={filled}"]) == 2
    assert "has 1 finished runs, none of this sweep" in capsys.readouterr().err


def test_a_cut_last_line_is_told(sweep, filled, capsys, tmp_path):
    whole = table.write(sweep, filled)
    assert not capsys.readouterr().err
    with open(filled / "results.jsonl", "a") as file:
        file.write('{"id": "lst')
    assert table.write(sweep, filled) == whole
    assert "results.jsonl: its last line was cut, 11 bytes of a row" in capsys.readouterr().err


def test_no_rows_no_table_or_another_sweep_end_in_one_line(sweep, filled, capsys, tmp_path):
    arguments = [f"--config={tmp_path / 'c.py'}", f"--workdir={tmp_path / 'empty'}"]
    assert table.main(arguments) == 2
    assert "run `experiments.sweep run` with the same config first" in capsys.readouterr().err
    assert table.main([arguments[0], f"--workdir={filled}", "--config.steps=7"]) == 2
    assert "steps: 1000 there, 7 here" in capsys.readouterr().err
    for content, message in (
        (CONFIG + "TABLE = 3", "TABLE is 3: a dictionary"),
        (CONFIG.replace("TABLE", "T"), "no TABLE"),
    ):
        (tmp_path / "c.py").write_text(content)
        assert table.main(arguments) == 2
        assert message in capsys.readouterr().err


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
    sweep, done = load(source), rows.read(folder)  # a table says which runs are not there yet
    runs = {run.id: (run.overrides, resolve(sweep.config(run))) for run in sweep.runs}
    assert done and all(runs[name] == (row["overrides"], resolve(row["config"])) for name, row in done.items())
    if "paper" in (made := sweep.module.TABLE) and ":reduced" in source:
        assert all(cell.reduced for cell in table.cells(made, list(done.values())).values())


def test_curves_are_written_from_runs_and_drawn_again_from_their_rows(tmp_path, capsys):
    sweep = load("configs/bible.py:demo,debug")
    folder = tmp_path / "runs" / sweep.runs[0].id
    folder.mkdir(parents=True)
    lines = [{"step": 10, "split": "train", "loss": math.log(2)}, {"step": 10, "split": "valid", "bits_per_byte": 3.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert curves.write(sweep, tmp_path).stat().st_size > 0
    found = [json.loads(line) for line in (tmp_path / "curves.jsonl").read_text().splitlines()]
    assert [(row["row"], row["split"], row["values"]) for row in found] == [
        ("LSTM", "train", [1.0]), ("LSTM", "valid", [3.0])
    ]  # fmt: skip
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "curves.png").unlink()
    assert curves.main(["--config=configs/bible.py:demo,debug", f"--workdir={tmp_path}"]) == 0
    assert (tmp_path / "curves.png").exists()
    (tmp_path / "curves.jsonl").unlink()
    capsys.readouterr()
    assert curves.main(["--config=configs/bible.py:demo,debug", f"--workdir={tmp_path}"]) == 2
    assert "run it first" in capsys.readouterr().err
