"""Plans: names of topologies, collectives read off HLO, FLOPs by formula, and a shipped config against its budget."""

import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from experiments import flops, hlo, plan, topology, train
from experiments.planning import read
from xlstm_jax import cells, models

ROOT = Path(__file__).parents[1]
BUDGETS = sorted((ROOT / "results" / "plans").glob("*.json"))
SMALLEST = ROOT / "results" / "plans" / "debug.json"  # of configs/scaling.py:xlstm_125m,debug on v5e:2x4
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
    conv = cells.ConvLSTM(1, 2, kernel_size=3, space=(4, 4), rngs=nnx.Rngs(0))
    assert flops.work(conv, 5, devices).flops is None


@pytest.mark.parametrize(
    "mesh, words",
    [
        (3, "config.mesh is 3: a dictionary"),
        ({"data": 3}, "config.mesh: mesh data=3 does not fit 8 devices"),
        ({"data": 8}, "config.mesh: batch_size=4 does not divide"),
    ],
)
def test_a_wrong_mesh_in_a_config(mesh, words, tmp_path):
    config, _ = read("tests/configs/tiny.py", ["batch_size=4", "eval_batch_size=4"])
    with pytest.raises(ValueError, match=words):
        train.run(ConfigDict(config.to_dict() | {"mesh": mesh}), tmp_path / "run")


def test_search_takes_the_cheapest_remat_of_the_largest_batch(monkeypatch):
    limits = {"none": 8, "weights": 8, "elementwise": 32, "layer": 32}  # rows that fit

    def fits(plain, where):
        remat, rows = plain["model"]["layer_remat"], plain["batch_size"]
        return {"batch_size": rows, "layer_remat": remat} if rows <= limits[remat] else None

    monkeypatch.setattr(plan, "fits", fits)
    monkeypatch.setattr(plan.sharding, "make_mesh", lambda *_: type("M", (), {"shape": {"data": 2, "fsdp": 2}}))
    monkeypatch.setattr(topology.Topology, "devices", lambda self: [])
    found = plan.search({"model": {}}, topology.topology("v5e:2x2"), say=lambda *a, **k: None)
    assert found == {"batch_size": 32, "layer_remat": "elementwise"}


def check_budget(path):
    """Compiled again: memory and bytes within 3 %, no more collectives than there, none in a loop over time."""
    budget = json.loads(path.read_text())
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "experiments.plan", f"--config={budget['config']}", "--json=/dev/stdout"]
    command += [f"--topology={budget['topology']}", *(f"--config.{each}" for each in budget["overrides"])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("\n{\n") :])
    assert found["in_time_loops"] == budget["in_time_loops"] == 0
    for name in ("peak_bytes", "link_bytes", "network_bytes"):
        assert found[name] <= 1.03 * budget[name], name
    for kind, counted in found["collectives"].items():
        assert counted["count"] <= budget["collectives"].get(kind, {"count": 0})["count"], kind


@pytest.mark.skipif(util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[tpu]'")
@pytest.mark.skipif(not SMALLEST.exists(), reason=f"{SMALLEST.name}: experiments.plan --json has not written it")
def test_the_smallest_config_keeps_to_its_budget():
    check_budget(SMALLEST)


def test_budgets_have_no_collective_in_a_loop_over_time():
    assert BUDGETS
    for path in BUDGETS:
        budget = json.loads(path.read_text())
        assert budget["in_time_loops"] == 0 and budget["peak_bytes"] <= budget["limit_bytes"], path.name


if __name__ == "__main__":  # all of them: python -m tests.test_plan
    for path in BUDGETS:
        check_budget(path)
        print(f"{path.name} keeps to its budget", flush=True)
