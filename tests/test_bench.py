"""The benchmark: from a case to rows, page and picture; no time is asserted."""

import json

import jax
import numpy as np
import pytest

from experiments import bench
from experiments.benchmarks import bounds, cases, layers, peak, peers, record, report, suites, timing, whole
from experiments.benchmarks.cases import BOTH, FORWARD, Case
from experiments.benchmarks.suites import Contender
from experiments.benchmarks.timing import Machine, Program, TooLarge

CHECK = dict(error=0.5, tolerance=1e-9, ok=False, against="scan", sizes={})


def other(case, given):
    """A peer that computes what our plain form does."""
    plain = layers.layer(case, layers.forms(case)[layers.plain(case)], given)
    return lambda pass_: layers.program(plain, pass_, given.cotangent)


def broken(case, given):
    raise KeyError("another\nrelease")


def test_from_a_case_to_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "builders", lambda name, kind: {"other": other, "broken": broken})
    flags = ["--quick", "--rounds=2", "--peers=flax", f"--out={tmp_path}"]
    assert bench.main(["--suite=cells", "--case=lstm", *flags]) == 0
    assert bench.main(["--report", f"--out={tmp_path}"]) == 0  # beside the rows, as they are not the committed ones
    rows = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    forms = ["default", "scan", "fused 16"]
    assert [row["implementation"] for row in rows] == 2 * [*forms, record.PRODUCTS, record.LOOP, "other", "broken"]
    assert {row["case"] for row in rows} == {"lstm-2x20x8x8"} and {row["pass"] for row in rows} == {FORWARD, BOTH}
    for row in rows:
        if row["implementation"] == "broken":
            assert row["error"] == "KeyError: 'another\\nrelease'" and "milliseconds" not in row
            continue
        ms = row["milliseconds"]
        assert 0 < ms["lowest"] <= ms["lower_quartile"] <= ms["median"] <= ms["upper_quartile"] <= ms["highest"]
        assert row["rounds"] == 2 and row["best_other"] == "other" and row["ratio"]["median"] > 0
        assert row["compile_seconds"] > 0 and row["share_of_products"] > 0 and row["versions"]["jax"] and row["commit"]
        if row["library"] == record.OURS:
            assert row["gradient_check"]["ok"] and row["gradient_check"]["error"] < 1e-12
        if row["implementation"] == "other":
            assert row["ratio"] == {"median": 1, "lower_quartile": 1, "upper_quartile": 1}
        if row["library"] != record.BOUND:
            assert row["difference"] < 1e-5
    page = (tmp_path / report.PAGE).read_text()
    assert page.count("| lstm-2x20x8x8 | forward |") == 1 + 7 and "KeyError" in page and "no measurement" in page
    assert (tmp_path / report.PICTURE).read_bytes().startswith(b"\x89PNG")
    record.add(tmp_path, "cells", rows[:7])  # the same case and pass again: it takes the place of the older rows
    again = record.read(tmp_path, "cells")
    assert len(again) == 14 and again[7:] == rows[:7]
    assert "ours" in capsys.readouterr().out


def fake(monkeypatch, build, check=None):
    """One contender, which takes no time, instead of all."""
    monkeypatch.setattr(suites, "contenders", lambda case, names: [Contender(record.OURS, record.DEFAULT, build)])
    monkeypatch.setattr(suites, "check", lambda case: {record.DEFAULT: check} if check else {})


def test_a_wrong_gradient_is_told(tmp_path, monkeypatch, capsys):
    fake(monkeypatch, lambda pass_: Program(lambda: 0), CHECK)
    flags = ["--suite=mlstm", "--case=mlstm", "--quick", "--rounds=1", "--report", f"--out={tmp_path}"]
    assert bench.main(flags) == 1
    assert "gradients of default are wrong by 0.5" in capsys.readouterr().out
    assert "**wrong**: 5e-01" in (tmp_path / report.PAGE).read_text()


def test_what_does_not_fit_is_told_and_the_next_case_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "free_bytes", lambda: 1000)
    with pytest.raises(TooLarge, match=r"needs 0.0 GiB of memory, 0.0 GiB are free"):
        timing.jax_program(lambda x: x + 1, np.zeros(1000, np.float32))
    monkeypatch.undo()

    def build(pass_):
        raise TooLarge("needs 80.0 GiB of memory, 1.0 GiB are free")

    fake(monkeypatch, build)
    flags = ["--suite=decode", "--peers=none", "--quick", "--rounds=1", "--report", f"--out={tmp_path}"]
    assert bench.main(flags) == 0
    assert [row["error"].split()[2] for row in record.read(tmp_path, "decode")] == ["80.0", "80.0"]
    assert "not timed" in (tmp_path / report.PAGE).read_text() and "80.0 GiB" in capsys.readouterr().out

    def unfit(case, names):
        raise MemoryError("no room for the inputs")

    monkeypatch.setattr(suites, "contenders", unfit)
    assert bench.main(flags) == 0 and "no room for the inputs" in (tmp_path / report.PAGE).read_text()


def test_rounds_are_interleaved_and_bounded():
    calls = []

    def program(name):
        return Program(lambda: calls.append(name))

    def failing():
        raise RuntimeError("gone")

    patient = {name: program(name) for name in "ab"} | {"c": Program(failing)}
    found = timing.interleave(patient, rounds=8, seconds=100.0, progress=lambda n: calls.append("|"))
    assert len(found["a"]) == len(found["b"]) == 8 and str(found["c"]) == "gone"
    runs = "".join(name for name, before in zip(calls, [None, *calls]) if name != before)
    assert runs.startswith("ab|") and {"ab", "ba"} == set(runs.split("|")[1:])  # a trial, then any order each round
    assert len(timing.interleave({"a": program("a")}, 9, 1e-12)["a"]) == timing.LEAST_SAMPLES


def test_numbers():
    assert timing.spread([0.003, 0.001, 0.002]) == dict(
        lowest=1.0, lower_quartile=1.5, median=2.0, upper_quartile=2.5, highest=3.0
    )
    assert timing.ratio([1.0, 1.0, 4.0], [2.0, 2.0, 2.0]) == dict(median=0.5, lower_quartile=0.5, upper_quartile=1.25)
    want = (np.array([1.0, -4.0]), np.zeros(2))
    assert layers.worst(want, want) == 0
    assert layers.worst((np.array([1.0, -3.0]), np.zeros(2)), want) == 0.25
    assert layers.worst((np.array([np.nan, -4.0]), np.zeros(2)), want) == np.inf
    row = dict(target=0.4, ratio=dict(median=0.5))
    assert report.verdict(row) == "missed by 25 %" and report.verdict(row | {"target": 0.5}) == "met"


def test_operations_are_those_that_the_compiler_counts():
    (case,) = cases.choose("mlstm", "mlstm-4x512x4x64x64", False)
    inputs = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((4, 4, 512, 64),) * 3]
    given = layers.Data(tuple(np.zeros(x.shape, x.dtype) for x in inputs), None, None)
    seen = {}

    def counted(function, *args):
        seen["flops"] = jax.jit(function).lower(*args).cost_analysis()["flops"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "jax_program", counted)
        for pass_ in (FORWARD, BOTH):
            layers.products(case, pass_, given)
            assert seen["flops"] == pytest.approx(layers.flops(case, pass_), rel=0.02)


@pytest.mark.parametrize("kind, T", [("train[1:0]", 64), ("prefill", 64)])
def test_the_operations_of_a_model_are_those_of_its_products(kind, T):
    """Where there is no loop over time the compiler can count them."""
    case = Case(kind, dict(B=2, T=T, D=32, layers=2), {})
    seen = {}

    def counted(function, *args):
        seen["flops"] = jax.jit(function).lower(*args).cost_analysis()["flops"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "jax_program", counted)
        bounds.program(case, "")
    assert seen["flops"] == pytest.approx(bounds.operations(case), rel=0.02)


@pytest.mark.parametrize("suite", ["train", "decode", "sweep"])
def test_whole_models_and_their_bounds_run(suite):
    for case in cases.choose(suite, None, True):
        (pass_,) = case.targets
        builders = {contender.label: contender.build for contender in suites.contenders(case, [])}
        for label in (record.DEFAULT, record.PRODUCTS):
            program = builders[label](pass_)
            assert program.compile_seconds > 0 and program.temp_bytes > 0 and program.run() is not None


@pytest.mark.skipif(not peak.RESET.exists(), reason="the memory of a process is counted as Linux does")
def test_memory_is_that_of_a_run(tmp_path, capsys):
    """An array that is freed again counts, and one that is there before does not."""
    held, numbers = np.ones(2**23), 2**22
    assert 0.9 < peak.growth(Program(lambda: float(np.ones(numbers)[0] + held[0]))) / (8 * numbers) < 1.5
    flags = ["--suite=mlstm", "--case=mlstm-1x1024x4x64x64", "--quick", "--peers=none", f"--out={tmp_path}"]
    assert bench.main([*flags, "--memory"]) == 2
    assert "holds no rows of these cases" in capsys.readouterr().err
    (case,) = cases.choose(*(flag.partition("=")[2] for flag in flags[:2]), True)
    rows = [row_of(case, record.DEFAULT, 1.0, "x"), row_of(case, "gone", 1.0, "x") | {"library": record.OURS}]
    record.add(tmp_path, "mlstm", rows)
    assert bench.main([*flags, "--memory"]) == 0
    default, gone = record.read(tmp_path, "mlstm")
    assert "peak_bytes" in default and "peak_bytes" not in gone and "StopIteration" in capsys.readouterr().out


def test_cases_are_named_once_and_small_ones_are_small():
    names = [case.name for each in cases.SUITES.values() for case in each]
    assert len(set(names)) == len(names)
    for suite in cases.SUITES:
        for case in cases.choose(suite, None, True):
            assert set(case.targets.values()) == {None} and np.prod([*case.sizes.values()]) < 2e5
    assert [case.sizes["T"] for case in cases.choose("cells", "slstm, lstm-4x1024x64x64", False)] == [1024, 256, 512]


def test_whole_models_learn_in_one_program():
    """Two steps of two seeds, one after another and at once, are the same training."""
    case = Case("parity", dict(seeds=2, B=2, T=5, H=4, steps=2), {"steps": None})
    one, all_at_once = (build("steps").run()[0] for build in whole.forms(case).values())
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(all_at_once)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert one.step.tolist() == [2, 2] and one.seed.tolist() == [0, 1]


def row_of(case, label, seconds, run, compile_seconds=None):
    """A row as a run writes it."""
    library = record.OURS if label == record.DEFAULT else "flax"
    entry = record.Entry(library, label, Program(lambda: 0, compile_seconds), [seconds], None)
    stamp = {"suite": "mlstm", "run": run, "quick": False}
    return record.rows(stamp, case, BOTH, [entry], 1.0, Machine(1e9, 1e9))[0]


def test_growth_is_taken_within_a_run():
    short, long, most = report.GROWTH
    a, b = cases.choose("mlstm", f"{short},{long}", False)
    rows = [
        *(row_of(a, record.DEFAULT, 0.1, "x", 2.0), row_of(b, record.DEFAULT, 1.2, "x", 3.0)),
        *(row_of(a, "other", 0.1, "x", 4.0), row_of(b, "other", 9.0, "x", 50.0)),
    ]
    (line,) = report.growth(rows)
    assert "12.0 times" in line and "missed by 33 %" in line and most == 9
    assert "ours 2 s, then 3 s; other 4 s, then 50 s" in line
    for apart in (rows[:1], [rows[0], rows[1] | {"run": "y"}]):
        (line,) = report.growth(apart)
        assert "not in one run" in line and f"--case={short},{long}" in line
    assert report.growth([row | {"case": "mlstm-2x2048x4x64x64"} for row in rows]) == []


def test_a_peer_that_a_case_lacks_is_named():
    a, b = cases.choose("mlstm", "mlstm-1x1024x4x64x64,mlstm-1x8192x4x64x64", False)
    rows = [row_of(a, record.DEFAULT, 1.0, "x"), row_of(a, "other", 1.0, "x"), row_of(b, record.DEFAULT, 1.0, "y")]
    assert report.absent(rows[:2]) == []
    (line,) = report.absent(rows)
    assert line.endswith(f"other at {b.name} {BOTH}.")
    assert report.runs(rows) == "Rows of 2 runs: x (mlstm), y (mlstm)."


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--suite is missing: cells, mlstm, train, decode, sweep"),
        (["--suite=cels"], "unknown --suite 'cels'; nearest: cells"),
        (["--suite=cells", "--case=lstn"], "unknown --case of the suite cells 'lstn'; nearest: lstm"),
        (["--suite=cells", "--peers=torhc"], "unknown peer 'torhc'; nearest: torch"),
        (["--suite=cells", "--peers=flax,flashrnn"], "flashrnn is not installed (--peer_path=flashrnn=DIR)"),
        (["--suite=cells", "--peer_path=flashrn=x"], "unknown peer in --peer_path 'flashrn'; nearest: flashrnn"),
        (["--suite=cells", "--peer_path=xlstm=nowhere"], "wanted is xlstm=DIR with the package's folder DIR/xlstm"),
        (["--suite=cells", "--rounds=0"], "--rounds=0"),
        (["--suite=cells", "--quik"], "unrecognized arguments: --quik"),
    ],
)
def test_bad_inputs(tmp_path, flags, message, capsys):
    assert bench.main([f"--out={tmp_path}", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_bad_folders(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(timing, "machine", None)  # refused before anything is timed
    assert bench.main(["--suite=cells", f"--out={tmp_path / 'file' / 'rows'}"]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert bench.main(["--report", f"--out={tmp_path}"]) == 2
    assert "holds no rows: run --suite=NAME first" in capsys.readouterr().err
    (tmp_path / "cells.jsonl").write_text('{"a": 1}\n')
    assert bench.main(["--report", f"--out={tmp_path}"]) == 2
    assert "cells.jsonl, line 1 is no row of a benchmark" in capsys.readouterr().err
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert bench.main(["--suite=cells", "--peers=torch", f"--out={tmp_path}"]) == 2
    assert "torch is not installed (pip install torch)" in capsys.readouterr().err
