"""One model on ever more chips, by formula and by compile: python -m experiments.growth [--compile=v5p:2x2x2,v5p:4x4x4]

    --config=configs/scaling.py:xlstm_125m    its rows over `data` and 8 of `fsdp`; --config.a.b=v changes a field
    --topology=v5p:2x2x2,...,v5p:16x16x24     8 to 6,144 chips, as the batch divides over
    --compile=NAMES                           those also compiled ahead of time (minutes each, libtpu), both ways
    --rows=16                                 a chip, where the batch grows with the chips (weak scaling)
    --batch=6144                              of all chips, where it does not (strong scaling)
    --out=results/growth                      rows.jsonl: what was compiled stays until --compile names it and versions
                                              have changed, formulas are made anew; growth.png

By formula: what is stored, from the sharding of every leaf of the train state; what is sent, with n devices over the
rows, f of them `fsdp`, and P a weight's bytes in the compute dtype,

    2 (n - 1) / n P            of every weight, its gradient summed over all
    (f - 1) / f P              of a divided weight, gathered; twice in a layer that gathers it again going back

and the floors of a step, as `experiments.plan` has them. The peak is what is stored and a part that grows with a chip's
rows: a line through the peaks that were compiled.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import experiments.without_tpu  # noqa: F401

import jax
import jax.numpy as jnp
import numpy as np

from experiments import command, plan, planning
from experiments.build import resolve
from experiments.topology import CUBES, Topology, topology
from xlstm_jax import metrics, sharding
from xlstm_jax.optim import parameter_name

CONFIG = "configs/scaling.py:xlstm_125m"
MESH = ["+mesh.data=-1", "mesh.fsdp=8"]
BATCH = 6144
SHAPES = [shape for shape in CUBES[1:] if BATCH % math.prod(map(int, shape.split("x"))) == 0]  # 4,096 chips do not
TOPOLOGIES = ",".join(f"v5p:{shape}" for shape in SHAPES)
SAME = ("config", "overrides", "scaling", "topology", "batch_size")
SCALINGS = ("rows grow with the chips", "one batch")


def on_paper(plain: dict[str, Any], where: Topology) -> dict[str, Any]:
    """What a plan has and a formula can say; the peak is not in it."""
    parts = plan.abstract(plain)
    sizes = sharding.mesh_sizes(plain.get("mesh"), where.chips)
    n, f = sizes["data"] * sizes["fsdp"], sizes["fsdp"]
    if parts.batch.inputs.shape[0] % n:
        raise ValueError(f"{parts.batch.inputs.shape[0]} rows do not divide over {n} devices")
    divided = sizes["tensor"] * sizes["seq"] > 1
    if where.slices > 1 or where.device_count > where.chips or divided or parts.options.accumulate > 1:
        raise ValueError(
            "the formula is for one slice of chips of one device each, rows alone divided, and no micro-batches:"
            " experiments.plan compiles others"
        )
    state = plan.share(parts.state, sharding.state_specs(parts.state, parts.model, sizes), sizes)
    width = jnp.dtype(plain["model"].get("dtype") or "float32").itemsize
    specs = sharding.parameter_specs(parts.model, sizes)
    again = plain["model"].get("layer_remat", "none") != "none"
    sent = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(parts.state.params):
        name = parameter_name(path)
        gathers = any(specs[name][1]) * (2 if again and name.startswith("backbone") else 1)
        sent += leaf.size * width * (2 * (n - 1) / n + gathers * (f - 1) / f)
    return plan.priced(parts, plain, where, sizes, state, sent, 0.0)


def rows_a_chip(row: dict[str, Any]) -> float:
    return row["batch_size"] / row["chips"]


def stored(row: dict[str, Any]) -> int:
    return row["parameter_bytes"] + row["optimizer_bytes"]


def with_peaks(formulas: list[dict[str, Any]], compiled: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The formulas' rows with the peak that the compiled ones tell; without one of these there is none."""
    points = {rows_a_chip(row): row["peak_bytes"] - stored(row) for row in compiled}
    if not points:
        raise ValueError("nothing was compiled yet, and a peak needs that: --compile=v5p:2x2x2 (libtpu, no TPU)")
    degree = min(len(points) - 1, 1)
    x, y = np.array(list(points), float), np.array(list(points.values()), float)
    line = np.polyfit(x, y, 1) if degree else np.array([y[0] / x[0], 0.0])
    return [row | {"peak_bytes": round(stored(row) + np.polyval(line, rows_a_chip(row)))} for row in formulas]


def scaled(plain: dict[str, Any], scaling: str, chips: int, rows: int, batch: int) -> dict[str, Any]:
    """The config on so many chips."""
    size = rows * chips if scaling == SCALINGS[0] else batch
    return plain | {"batch_size": size, "eval_batch_size": size}


def same(row: dict[str, Any], other: dict[str, Any], names: tuple[str, ...] = (*SAME, "versions")) -> bool:
    return all(row[name] == other[name] for name in names)


@command.exit_code
def main(argv: list[str]) -> int:
    parser = command.Arguments("growth", __doc__)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--topology", default=TOPOLOGIES)
    parser.add_argument("--compile", default="")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--out", type=command.folder, default=Path("results/growth"))
    options = parser.with_overrides(argv)
    for name in ("rows", "batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}={getattr(options, name)}: at least 1 is needed")
    wanted = [topology(name) for name in filter(None, options.compile.split(","))]
    places = list(dict.fromkeys([*(topology(name) for name in options.topology.split(",")), *wanted]))
    overrides = options.overrides or MESH
    config, _ = planning.read(options.config, overrides)
    plain = resolve(config)
    file = options.out / "rows.jsonl"
    compiled = [row for row in metrics.read(file) if row["how"] == "compiled"]
    formulas = []
    options.out.mkdir(parents=True, exist_ok=True)
    for scaling in SCALINGS:
        about = {"config": options.config, "overrides": overrides, "scaling": scaling}
        for place in places:
            small = scaled(plain, scaling, place.chips, options.rows, options.batch)
            formulas.append(about | {"how": "formula"} | on_paper(small, place))
            if place not in wanted:
                continue
            now = formulas[-1] | {"versions": plan.versions()}
            if any(same(row, now) for row in compiled):
                continue
            said = with_peaks(formulas[-1:], compiled)[0] if compiled else None
            far = said is not None and said["peak_bytes"] > 1.5 * said["limit_bytes"]  # no minutes for a plain answer
            found = None if far else plan.fits(small, place)
            print(f"{place.name}, {scaling}\n{plan.table(found) if found else 'does not fit'}\n", flush=True)
            compiled = [row for row in compiled if not same(row, now, SAME)]  # of other versions
            if found:
                compiled.append(about | {"how": "compiled"} | found)
                metrics.write_atomically(file, lines(compiled))
    rows = compiled + with_peaks(formulas, [row for row in compiled if row["config"] == options.config])
    metrics.write_atomically(file, lines(rows))
    plan.figure(rows, options.out / "growth.png")
    return 0


def lines(rows: list[dict[str, Any]]) -> str:
    """As JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
