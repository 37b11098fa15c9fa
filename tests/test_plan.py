"""Plans: names of topologies, collectives read off HLO, FLOPs by formula, and a shipped config against its budget."""

import re
from importlib import util
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from configs import scaling
from experiments import budgets, flops, growth, hlo, plan, topology, train
from experiments.build import resolve
from experiments.planning import read
from xlstm_jax import cells, metrics, models
from xlstm_jax.tasks import make

ROOT = Path(__file__).parents[1]
BUDGETS = budgets.read()
LONG = pytest.mark.long  # minutes each: make test ARGS="-m long -n 0"
PROGRAM = """HloModule jit_step, num_partitions=4
%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-reduce.1 = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
}
%time_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-gather.7 = bf16[4,2]{1,0} all-gather(%x), channel_id=2, replica_groups={{0,2},{1,3}}, dimensions={0}
}
%condition (p: (s32[], f32[8])) -> pred[] {
  %c = s32[]{:T(128)} constant(5)
}
%layers (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %w = (s32[], f32[8]) while(%t), condition=%condition, body=%time_body, metadata={op_name="jit(step)/jvp(time)/while"}
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %w1 = (s32[], f32[8]) while(%t), condition=%c2, body=%layers, backend_config={"known_trip_count":{"n":"3"}}
  %w2 = (s32[], f32[8]) while(%t), condition=%condition, body=%body.1, metadata={op_name="jit(step)/lifetime/while"}
  %send.1 = (bf16[6,8]{1,0:T(8,128)}, u32[], token[]) send(%b, %t), channel_id=4, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:1}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %rs = f32[2]{0} reduce-scatter(%y), channel_id=9, replica_groups=[1,4]<=[4], dimensions={0}
}
"""


def test_collectives_are_counted_as_often_as_they_run():
    *_, between, last = listed = hlo.collectives(PROGRAM, slice_size=2, slices=2)
    assert between == ("all-reduce", 1, 96, 2, False, True) and last.kind == "reduce-scatter"
    found = {c.kind: c for c in listed if c is not between}
    assert found["all-gather"] == ("all-gather", 15, 16, 2, True, True)
    assert found["all-reduce"] == ("all-reduce", 5, 32, 4, False, True)
    assert found["reduce-scatter"] == ("reduce-scatter", 1, 32, 4, False, True)
    assert plan.moved(found["all-reduce"]) == 2 * 3 / 4 * 32 * 5


@pytest.mark.parametrize(
    "text, name, chips",
    [
        ("v5e-256", "v5e:16x16", 256),
        ("v5litepod-8", "v5e:2x4", 8),
        ("v5p-1024", "v5p:8x8x8", 512),
        ("v4-128", "v4:4x4x4", 64),
        ("v5e:16x16*2", "v5e:16x16*2", 512),
        ("v5p:16x16x24", "v5p:16x16x24", 6144),
    ],
)
def test_names_of_topologies(text, name, chips):
    found = topology.topology(text)
    assert (found.name, found.chips) == (name, chips)


@pytest.mark.parametrize("text, words", [("v5e:16x61", "nearest: v5e:16x16"), ("v5e-256*two", "number of slices")])
def test_unknown_topology(text, words):
    with pytest.raises(ValueError, match=words):
        topology.topology(text)


def test_flops_of_a_token():
    model = nnx.eval_shape(
        lambda: models.LM(100, backbone="xlstm_large", dim=64, num_layers=3, num_heads=2, rngs=nnx.Rngs(0))
    )
    K, V, H, ffn = 16, 32, 2, 192
    layer = 2 * (64 * (2 * 32 + 64) + 64 * 64 + 2 * 64 * 2 + 64 * 64 + 3 * 64 * ffn) + H * (4 * K * V + 4 * K)
    assert flops.forward_flops(model) == 3 * layer + 2 * 64 * 100
    lstm = nnx.eval_shape(lambda: models.LM(100, backbone="lstm", dim=8, num_layers=2, rngs=nnx.Rngs(0)))
    assert flops.forward_flops(lstm) == 2 * (2 * 8 * 8 * 8 + 8 * 100)
    options = dict(backbone="transformer", dim=8, num_layers=3, num_heads=2, context=4)
    attends = nnx.eval_shape(lambda: models.LM(100, rngs=nnx.Rngs(0), **options))
    keys = (1 + 2 + 3 + 4 + 4 + 4) / 6  # that the tokens of a sequence of 6 see, on average
    assert flops.forward_flops(attends, 6) - flops.forward_flops(attends, 1) == pytest.approx(3 * 4 * 8 * (keys - 1))


def test_what_speed_is_told_by():
    model = nnx.eval_shape(
        lambda: models.LM(100, backbone="xlstm[1:1]", dim=64, num_layers=4, num_heads=2, rngs=nnx.Rngs(0))
    )
    devices = [SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")] * 2
    assert flops.work(model, 5, devices) == (3 * flops.forward_flops(model), 2 * 989e12, 2)  # 2 of 4 blocks are sLSTM
    assert flops.work(model, 5, jax.devices()[:1]).peak is None  # of a CPU nothing is claimed
    conv = nnx.eval_shape(lambda: cells.ConvLSTM(1, 2, kernel_size=3, space=(4, 4), rngs=nnx.Rngs(0)))
    assert flops.work(conv, 5, devices).flops is None


@pytest.mark.parametrize(
    "mesh, words",
    [
        (3, "config.mesh is 3: a dictionary"),
        ({"data": 3}, "config.mesh: mesh data=3 does not fit 8 devices"),
        ({"data": 8}, "config.mesh: batch_size=4 does not divide"),
        ({"data": 4, "seq": 2}, "config.mesh: batch_size / accumulate=2 does not divide over data x fsdp = 4"),
    ],
)
def test_a_wrong_mesh_in_a_config(mesh, words, tmp_path):
    config, _ = read("tests/configs/tiny.py", ["batch_size=4", "eval_batch_size=4"])
    with pytest.raises(ValueError, match=words):
        train.run(ConfigDict(config.to_dict() | {"mesh": mesh, "accumulate": 2}), tmp_path / "run")


def test_a_corpus_that_is_not_there_is_planned(tmp_path):
    """As a task with a file of the same ids draws its batches."""
    ids = tmp_path / "ids.npy"
    np.save(ids, np.arange(9000, dtype=np.uint16) % 300)
    for name, rows in (("text_lm", {}), ("token_windows", {"rows": "windows"}), ("token_windows", {})):
        options = dict(name=name, corpus=f"file:{ids}", tokenizer="ids:300", carries_state=False, **rows)
        found = plan.abstract_task({"task": options | {"corpus": "file:none.npy"}}).shapes(4)
        assert found == jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make(**options).batch("train", 0, 0, 4)
        )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--topology=v5e-25"], "unknown topology 'v5e-25'; nearest: v5e-256"),
        (["--topology=v5e:2x2", "--json=none/plan.json"], "--json=none/plan.json: there is no folder none"),
        (["--topology=v5e:2x2", "--json=tests"], "--json=tests: it is a folder, and a file is needed"),
        (["--topology=v5e:2x2", "--figure=a.xyz"], "--figure=a.xyz: its name must end in one of .png, .svg, .pdf"),
        (["--topology=v5e:2x2,v5e:2x4", "--hlo=a.txt"], "--hlo=a.txt: it holds one program: name one topology"),
    ],
)
def test_a_plan_that_cannot_be(arguments, words, capsys):
    assert plan.main(["--config=configs/scaling.py:xlstm_125m,debug", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_search_takes_the_cheapest_remat_of_the_largest_batch(monkeypatch):
    sizes = {"none": 40, "weights": 40, "elementwise": 9, "layer": 9}  # bytes of a row, beside 10 and 1,000 at most
    asked = []

    def fits(plain, where):
        remat, rows = plain["model"]["layer_remat"], plain["batch_size"]
        asked.append((remat, rows))
        peak = 10 + sizes[remat] * rows + (rows > 64)  # not quite a line
        return None if peak > 1000 else dict(batch_size=rows, layer_remat=remat, peak_bytes=peak, limit_bytes=1000)

    monkeypatch.setattr(plan, "fits", fits)
    monkeypatch.setattr(plan.sharding, "make_mesh", lambda *_: type("M", (), {"shape": {"data": 1, "fsdp": 1}}))
    monkeypatch.setattr(topology.Topology, "devices", lambda self: [])
    found = plan.search({"model": {}, "accumulate": 2}, topology.topology("v5e:2x2"), say=lambda *a, **k: None)
    assert (found["batch_size"], found["layer_remat"]) == (64, "elementwise")
    expected = [("none", 2), ("none", 4), ("none", 16), ("none", 32)]  # a row a device and micro-batch first
    assert asked == [
        *expected,
        ("weights", 32),
        ("elementwise", 32),
        ("elementwise", 64),
        ("elementwise", 128),
        ("layer", 128),
    ]


@pytest.mark.parametrize("most", [1, 2, 3, 17, 100, 1023, 1024])
@pytest.mark.parametrize("bend", [0.5, 1.0, 2.0])
def test_the_largest_batch_is_found_whatever_the_line_says(most, bend):
    def plan_of(rows):
        return dict(batch_size=rows, peak_bytes=rows**bend, limit_bytes=most**bend) if rows <= most else None

    assert plan.largest(plan_of, 1)["batch_size"] == 2 ** (most.bit_length() - 1)
    assert plan.largest(plan_of, 2 * most) is None


def test_a_plan_that_leaves_its_budget_is_told():
    budget = BUDGETS["debug"]
    assert budgets.differences(budget, budget) == []
    more = {kind: c | {"count": c["count"] + 1} for kind, c in budget["collectives"].items()}
    for change, words in (
        ({"peak_bytes": int(1.02 * budget["peak_bytes"])}, "peak_bytes is .*, its budget"),
        ({"link_bytes": 2 * budget["link_bytes"]}, "link_bytes is .*, its budget"),
        ({"in_time_loops": 3}, "3 collectives stand in loops over time, none may"),
        ({"collectives": more}, "collectives are .*, in the budget"),
        ({"collectives": {}}, "collectives are {}, in the budget"),
        ({"limit_bytes": 1}, "above the chip's 1"),
    ):
        (line,) = budgets.differences(budget, budget | change)
        assert re.search(words, line)


@pytest.mark.skipif(util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[tpu]'")
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n.startswith("debug") else LONG) for n in BUDGETS])
def test_a_shipped_config_keeps_to_its_budget(name):
    assert budgets.differences(BUDGETS[name], budgets.compiled(BUDGETS[name])) == []


def test_a_plan_in_words_and_drawn(tmp_path):
    said = plan.table(BUDGETS["debug"])
    for words in ("v5e:2x4, 8 chips; mesh {'data': 8}", "0.05 GiB of 16.00 GiB", "7 all-reduce (3.10 MiB)"):
        assert words in said
    assert "SLOW" in plan.table(BUDGETS["debug"] | {"in_time_loops": 3}) and "SLOW" not in said
    plan.figure(list(BUDGETS.values()), tmp_path / "plans.png")
    assert (tmp_path / "plans.png").read_bytes().startswith(b"\x89PNG")


def test_every_shipped_config_has_a_budget_and_keeps_within_a_chip():
    planned = {(b["config"].removeprefix("configs/scaling.py:"), b["topology"]) for b in BUDGETS.values()}
    wanted = [("xlstm_125m", "v5e:4x4"), ("xlstm_1.3b", "v5e:16x16"), ("lstm_1b", "v4:4x4x4")]
    assert planned >= {*wanted, ("xlstm_7b", "v5p:8x8x8"), ("xlstm_7b", "v5e:16x16*2")}
    assert {config for config, _ in planned} >= set(scaling.MODELS)
    for name, budget in BUDGETS.items():
        config, _ = read(str(ROOT / budget["config"]), budget["overrides"])
        parts = plan.abstract(resolve(config))
        assert budget["parameters"] == sum(a.size for a in jax.tree.leaves(parts.state.params)), name
        assert budget["batch_size"] == config.batch_size and budget["commit"] and budget["versions"]["libtpu"]
        assert budget["in_time_loops"] == 0 < budget["peak_bytes"] <= budget["limit_bytes"], name


def test_the_page_has_the_table_of_the_budgets():
    text = budgets.PAGE.read_text(encoding="utf-8")
    plans = list(BUDGETS.values())
    assert budgets.page(text, plans) == text, "run `python -m experiments.budgets --table`"
    assert budgets.page(text, plans[:-1]) != text


ROWS = metrics.read(ROOT / "results" / "growth" / "rows.jsonl")


def test_the_formulas_of_growth_are_what_was_compiled():
    compiled = [row for row in ROWS if row["how"] == "compiled"]
    formulas = {(row["topology"], row["scaling"]): row for row in ROWS if row["how"] == "formula"}
    assert compiled and {row["chips"] for row in formulas.values()} >= {8, 64, 512, 6144}
    for row in compiled:
        said = formulas[row["topology"], row["scaling"]]
        assert said["parameter_bytes"] == row["parameter_bytes"] and row["in_time_loops"] == 0
        assert said["optimizer_bytes"] == pytest.approx(row["optimizer_bytes"], rel=0.01)
        assert said["link_bytes"] == pytest.approx(row["link_bytes"], rel=0.1)
        assert said["peak_bytes"] == pytest.approx(row["peak_bytes"], rel=0.1)
    config, _ = read(str(ROOT / compiled[0]["config"]), compiled[0]["overrides"])
    for row in list(formulas.values())[::7]:
        sized = resolve(config) | {"batch_size": row["batch_size"]}
        again = growth.on_paper(sized, topology.topology(row["topology"]))
        assert {name: row[name] for name in again} == again


@pytest.mark.parametrize(
    "change, where, words",
    [
        ({"batch_size": 12}, "v5p:2x2x2", "12 rows do not divide over 8 devices"),
        ({"mesh": {"fsdp": 4, "tensor": 2}}, "v5p:2x2x2", "the formula is for one slice"),
        ({}, "tpu7x:2x2x2", "of chips of one device each"),
        ({"mesh": {"fsdp": 3}}, "v5p:2x2x2", "mesh fsdp=3 does not fit 8 devices"),
    ],
)
def test_what_no_formula_is_for(change, where, words):
    config, _ = read("configs/scaling.py:xlstm_125m,debug", [])
    with pytest.raises(ValueError, match=words):
        growth.on_paper(resolve(config) | change, topology.topology(where))


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--rows=0", "--rows=0: at least 1 is needed"),
        ("--compile=v5p:9x9x9", "unknown topology 'v5p:9x9x9'; nearest: v5p:"),
        ("--batch=6145", "6145 rows do not divide over 8 devices"),
    ],
)
def test_growth_that_cannot_be(argument, words, tmp_path, capsys):
    small = ["--config=configs/scaling.py:xlstm_125m,debug", "--config.mesh.data=-1"]
    assert growth.main([argument, *small, "--topology=v5p:2x2x2", f"--out={tmp_path}"]) == 2
    assert words in capsys.readouterr().err


def test_growth_compiles_again_what_other_versions_have(tmp_path, monkeypatch):
    stored, asked = [row for row in ROWS if row["how"] == "compiled"], []
    file, now = tmp_path / "rows.jsonl", {"versions": stored[0]["versions"]}
    file.write_text(growth.lines(stored))

    def fits(plain, where):
        asked.append((where.name, plain["batch_size"]))
        return stored[0] | now

    monkeypatch.setattr(plan, "fits", fits)
    monkeypatch.setattr(plan, "versions", lambda: now["versions"])
    words = [f"--out={tmp_path}", "--topology=v5p:2x2x2,v5p:4x4x4"]
    assert growth.main([*words, "--compile=v5p:2x2x2"]) == 0 and asked == []
    rows = metrics.read(file)
    assert rows[: len(stored)] == stored and (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    places = [(row["topology"], row["scaling"]) for row in rows[len(stored) :]]
    assert places == [(place, scaling) for scaling in growth.SCALINGS for place in ("v5p:2x2x2", "v5p:4x4x4")]
    now["versions"] = {"libtpu": "another"}
    assert growth.main([*words, "--compile=v5p:2x2x2"]) == 0 and asked == [("v5p:2x2x2", 128)]
    assert [row for row in metrics.read(file) if row["how"] == "compiled"] == [*stored[1:], stored[0] | now]


def test_growth_needs_a_compiled_peak():
    with pytest.raises(ValueError, match="nothing was compiled yet"):
        growth.with_peaks([], [])
    about = dict(chips=8, parameter_bytes=1, optimizer_bytes=2)
    line = [about | dict(batch_size=8 * n, peak_bytes=3 + 5 * n + 7) for n in (1, 2)]
    (row,) = growth.with_peaks([about | {"batch_size": 80}], line)
    assert row["peak_bytes"] == 3 + 50 + 7
