"""What a run would need of TPUs, from the real train step compiled ahead of time: no TPU needed, libtpu is.

    python -m experiments.plan --config=configs/scaling.py:xlstm_1.3b --topology=v5e:16x16
    python -m experiments.plan --config=... --topology=v5e-256,v5p-128 --json=plan.json --figure=plan.png
    python -m experiments.plan --config=... --topology=v5e:16x16*2 --search

Topologies: v4, v5e, v5p, v6e, tpu7x, by shape or by the name that a user gives (v5e-256); *2 for two slices. `--search`
tries batches in powers of two and every `layer_remat`, the cheapest first. Growth over topologies is
`experiments.growth`. Floors are what the chip's published rates allow if computation, memory and links overlap
entirely; nothing here has been timed.
"""

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

if __name__ == "__main__":
    import experiments.without_tpu  # noqa: F401

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import command, planning
from experiments.build import abstract_model, build_optimizer, build_task, resolve, step_options
from experiments.flops import forward_flops, modules
from experiments.hlo import Collective, collectives
from experiments.topology import GIB, Topology, topology
from xlstm_jax import guard, metrics, sharding, train
from xlstm_jax.cells.base import RecurrentCell
from xlstm_jax.cells.wrappers import REMAT
from xlstm_jax.kernels import local
from xlstm_jax.tasks import TASKS
from xlstm_jax.tasks.task import Batch

CENSUS = {"xla_tpu_enable_async_collective_fusion": "false"}  # else parts of one collective stand in several loops

FIGURES = (".png", ".svg", ".pdf")


class Abstract(NamedTuple):
    """All that a step is made of, without a single number in it."""

    task: SimpleNamespace
    tx: optax.GradientTransformation
    model: nnx.Module
    state: train.TrainState
    batch: Batch
    options: train.StepOptions


def plan(plain: dict[str, Any], where: Topology, hlo: Path | None = None) -> dict[str, Any]:
    """The plan of a resolved config on a topology, as plain numbers; bytes and FLOPs are a chip's."""
    parts = abstract(plain)
    mesh = sharding.make_mesh(plain.get("mesh"), where.devices())
    program, text, seconds = compiled(parts, mesh)
    if hlo:
        hlo.write_text(text, encoding="utf-8")
    found = collectives(text, mesh.size // where.slices, where.slices)
    memory = program.memory_analysis()
    per_chip = mesh.size / where.chips  # devices a chip: 1, or 2 where each TensorCore is one
    sent = [sum(moved(c) for c in found if c.crosses_slices == crosses) * per_chip for crosses in (False, True)]
    state = (memory.argument_size_in_bytes - share(parts.batch, batch_specs(parts, mesh), mesh.shape)) * per_chip
    return priced(parts, plain, where, mesh.shape, state, *sent) | {
        "peak_bytes": round(memory.peak_memory_in_bytes * per_chip),
        "collectives": summed(found),
        "in_time_loops": sum(c.count for c in found if c.in_time_loop),
        "compile_seconds": round(seconds, 1),
        "versions": versions(),
        "commit": metrics.commit(),
    }


def versions() -> dict[str, str]:
    """Of what a plan depends on."""
    return {name: version(name) for name in ("jax", "libtpu", "flax")}


def priced(parts: Abstract, plain, where: Topology, sizes, state: float, link: float, network: float) -> dict[str, Any]:
    """What follows from sizes alone: `state`, `link` and `network` are bytes that a chip stores, and sends a step."""
    rows, seq_len = parts.batch.inputs.shape[:2]
    chip, steps = where.chip, plain["steps"]
    flops = 3 * forward_flops(parts.model, seq_len) * rows * seq_len / where.chips
    stored = share(parts.state.params, sharding.state_specs(parts.state, parts.model, sizes).params, sizes)
    stored *= math.prod(sizes.values()) / where.chips
    floors = {
        "compute": flops / chip.flops,
        "memory": 2 * state / chip.memory_rate,  # the state is read and written once at least
        "links": link / chip.link_rate,
        "network": network / chip.network_rate,
    }
    floor = max(floors.values())
    return {
        "topology": where.name,
        "chips": where.chips,
        "mesh": {axis: size for axis, size in sizes.items() if size > 1},
        "batch_size": rows,
        "layer_remat": plain["model"].get("layer_remat", "none"),
        "parameters": sum(a.size for a in jax.tree.leaves(parts.state.params)),
        "parameter_bytes": round(stored),
        "optimizer_bytes": round(state - stored),
        "limit_bytes": round(chip.memory),
        "link_bytes": round(link),
        "network_bytes": round(network),
        "model_flops": flops,
        "floors": floors,
        "step_seconds": floor,
        "mfu_bound": flops / chip.flops / floor,
        "serial_steps": seq_len * sum(copies for _, copies in modules(parts.model, RecurrentCell)),
        "tokens_a_step": rows * seq_len,
        "tokens": rows * seq_len * steps,
        "chip_hours": floor * steps * where.chips / 3600,
    }


def share(tree: Any, specs: Any, sizes: dict[str, int]) -> int:
    """Bytes of a tree that one device of a mesh of these sizes stores."""
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    shares = jax.tree.map(lambda a, s: math.prod(NamedSharding(mesh, s).shard_shape(a.shape)), tree, specs)
    return sum(n * a.dtype.itemsize for a, n in zip(jax.tree.leaves(tree), jax.tree.leaves(shares)))


def abstract(plain: dict[str, Any]) -> Abstract:
    """Of a resolved config."""
    task, tx, options, rows = abstract_task(plain), build_optimizer(plain), step_options(plain), plain["batch_size"]
    model = nnx.merge(*abstract_model(plain, task))
    params = nnx.split(model)[1]
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    carry = jax.eval_shape(lambda: model.initial_state(rows)) if task.carries_state else ()
    guarded = jax.eval_shape(lambda: guard.initial(options.on_bad_step, options.spike))
    average = params if options.ema else ()
    state = train.TrainState(params, jax.eval_shape(tx.init, params), scalar, carry, scalar, average, guarded)
    return Abstract(task, tx, model, state, task.shapes(rows), options)


def batch_specs(parts: Abstract, mesh: Mesh) -> Batch:
    """How the batch of a step is divided over the devices."""
    rows, seq_len = parts.batch.inputs.shape[:2]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        divided = PartitionSpec(local.axes_for(rows, local.ROWS), local.axes_for(seq_len, ("seq",)))
    return jax.tree.map(lambda _: divided, parts.batch)


def compiled(parts: Abstract, mesh: Mesh) -> tuple[Any, str, float]:
    """The train step's program for the devices of a mesh, its HLO, and seconds of compiling.

    The HLO is what the compiler wrote down: `as_text` of a program for v5p fails (an async-update of three operands).
    """
    rows, seq_len = parts.batch.inputs.shape[:2]
    row_counts = {"batch_size": rows, "batch_size / accumulate": rows // parts.options.accumulate}
    sharding.check(mesh, batch_sizes=row_counts, seq_len=seq_len, model=parts.model)
    specs = sharding.state_specs(parts.state, parts.model, mesh.shape)

    def placed(leaf, spec):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    def step(state, batch):
        task = SimpleNamespace(**vars(parts.task), batch=lambda *_: batch)
        static = dict(graphdef=nnx.graphdef(parts.model), tx=parts.tx, batch_size=rows, options=parts.options)
        return train.train_step(state, task=task, **static)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        batch = jax.tree.map(placed, parts.batch, batch_specs(parts, mesh))
        start = time.monotonic()
        lowered = jax.jit(step, donate_argnums=0).lower(jax.tree.map(placed, parts.state, specs), batch)
        with tempfile.TemporaryDirectory() as folder:
            dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            program = lowered.compile(compiler_options=CENSUS | dump)
            (file,) = Path(folder).glob("*jit_step*.after_optimizations.txt")
            return program, file.read_text(encoding="utf-8"), time.monotonic() - start


def abstract_task(plain: dict[str, Any]) -> SimpleNamespace:
    """The task's sizes and the shapes of its batches; a corpus of token ids is not read, as `ids:SIZE` says enough."""
    options = plain["task"]
    name = options.get("name")
    if name in ("text_lm", "token_windows") and str(options.get("tokenizer")).startswith("ids:"):
        words = int(options["tokenizer"].removeprefix("ids:"))
        seq_len, carries = (options.get(each, getattr(TASKS[name], each)) for each in ("seq_len", "carries_state"))
        sizes = dict(vocab_size=words, num_classes=words, carries_state=carries)
        resets = carries or (name == "token_windows" and options.get("rows", "streams") == "streams")

        def shapes(rows):
            tokens, weights = (jax.ShapeDtypeStruct((rows, seq_len), t) for t in (jnp.int32, jnp.float32))
            return Batch(tokens, tokens, weights, None, jax.ShapeDtypeStruct(tokens.shape, bool) if resets else None)

    else:
        task = build_task(plain)
        sizes = {name: getattr(task, name) for name in ("vocab_size", "num_classes", "carries_state")}

        def shapes(rows):
            return jax.eval_shape(lambda: task.batch("train", 0, 0, rows))

    return SimpleNamespace(**sizes, shapes=shapes, **{name: options.get(name, 0.0) for name in ("ar", "tar")})


def moved(c: Collective) -> float:
    """Bytes that a device sends for all runs of a collective in a step, by the ring algorithms."""
    share = (c.group - 1) / c.group
    factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(c.kind, share)
    return factor * c.bytes * c.count


def summed(found: list[Collective]) -> dict[str, dict[str, int]]:
    """{kind: {count, bytes}} a step."""
    kinds = sorted({c.kind for c in found})
    return {
        kind: {
            "count": sum(c.count for c in found if c.kind == kind),
            "bytes": sum(c.count * c.bytes for c in found if c.kind == kind),
        }
        for kind in kinds
    }


def fits(plain: dict[str, Any], where: Topology) -> dict[str, Any] | None:
    """The plan, None where memory does not suffice."""
    try:
        found = plan(plain, where)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return None
        raise
    return found if found["peak_bytes"] <= found["limit_bytes"] else None


def search(plain: dict[str, Any], where: Topology, say=print) -> dict[str, Any]:
    """The plan with the largest batch that fits, and among the ways of `layer_remat` that reach it the cheapest."""
    mesh = sharding.make_mesh(plain.get("mesh"), where.devices()).shape
    least, best = mesh["data"] * mesh["fsdp"] * plain["accumulate"], None
    for remat in REMAT:

        def plan_of(rows, remat=remat):
            found = fits(plain | {"batch_size": rows, "model": plain["model"] | {"layer_remat": remat}}, where)
            peak = f"fits, {gib(found['peak_bytes'])} a chip" if found else "does not fit"
            say(f"layer_remat={remat}, batch_size={rows}: {peak}", flush=True)
            return found

        best = largest(plan_of, best["batch_size"] * 2 if best else least) or best  # only more rows are worth more work
    if best is None:
        raise ValueError(f"{least} rows, the fewest that divide, do not fit: take more chips, or fsdp and tensor")
    return best


def largest(plan_of: Callable[[int], dict[str, Any] | None], rows: int) -> dict[str, Any] | None:
    """The plan of the largest batch that fits, `rows` times a power of two; None where not even those do.

    Each batch costs a compilation: two that fit tell how the peak grows, and the next is the largest on that line.
    """
    fitting, refused = [], None
    while refused is None or rows < refused:
        found = plan_of(rows)
        if found is None:
            refused = rows
        else:
            fitting.append(found)
        if not fitting:
            return None
        rows = 2 * fitting[-1]["batch_size"]
        if len(fitting) > 1:
            aim = reach(*fitting[-2:])
            rows = max(rows, aim if refused is None else min(aim, refused // 2))
    return fitting[-1]


def reach(a: dict[str, Any], b: dict[str, Any]) -> int:
    """The most rows, those of b times a power of two, that keep within the limit on the line through two peaks."""
    growth = (b["peak_bytes"] - a["peak_bytes"]) / (b["batch_size"] - a["batch_size"])
    if growth <= 0:
        return 2 * b["batch_size"]
    return b["batch_size"] * 2 ** int(math.log2(1 + (b["limit_bytes"] - b["peak_bytes"]) / growth / b["batch_size"]))


def gib(n: float) -> str:
    """A number of bytes in words; MiB where GiB would be 0.00."""
    return f"{n / GIB:.2f} GiB" if n == 0 or n >= GIB / 100 else f"{1024 * n / GIB:.2f} MiB"


def table(found: dict[str, Any]) -> str:
    """One plan in words."""
    seconds = ", ".join(f"{name} {1e3 * value:,.4g}" for name, value in found["floors"].items())
    kinds = ", ".join(f"{c['count']} {kind} ({gib(c['bytes'])})" for kind, c in found["collectives"].items())
    rows = {
        "topology": f"{found['topology']}, {found['chips']} chips; mesh {found['mesh']}",
        "model": f"{found['parameters'] / 1e9:.3f} B parameters; layer_remat={found['layer_remat']}",
        "batch": f"{found['batch_size']} rows, {found['tokens_a_step']:,} tokens a step",
        "stored a chip": f"parameters {gib(found['parameter_bytes'])}, optimiser {gib(found['optimizer_bytes'])}",
        "peak a chip": f"{gib(found['peak_bytes'])} of {gib(found['limit_bytes'])}",
        "collectives a step": kinds or "none",
        "in loops over time": f"{found['in_time_loops']}" + ("" if found["in_time_loops"] == 0 else "  <- SLOW"),
        "model FLOPs a chip": f"{found['model_flops']:.3g} a step",
        "floors, ms a step": seconds,
        "step at least": f"{1e3 * found['step_seconds']:,.4g} ms; MFU at most {found['mfu_bound']:.2f}",
        "one after another": f"{found['serial_steps']:,} steps in time forward, as many backward: in no floor"
        if found["serial_steps"]
        else "no steps in time: no layer waits for its own last step",
        "run": f"{found['tokens']:.3g} tokens, at least {found['chip_hours']:,.4g} chip hours",
        "compiled in": f"{found['compile_seconds']} s",
    }
    return "\n".join(f"{name:20}{value}" for name, value in rows.items())


def figure(plans: list[dict[str, Any]], path: Path) -> None:
    """Memory, bytes moved and floor of the step time, a chip each, over the topologies.

    Plans with a `scaling` and a `how` (see `experiments.growth`): a colour a scaling, formulas dashed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "peak memory a chip (GiB)": lambda p: p["peak_bytes"] / GIB,
        "bytes sent a chip and step (GiB)": lambda p: (p["link_bytes"] + p["network_bytes"]) / GIB,
        "floor of the step time (s)": lambda p: p["step_seconds"],
    }
    groups = {}
    for each in plans:
        groups.setdefault(each.get("scaling", each["topology"].partition(":")[0]), []).append(each)
    lines = "none" if any("how" in each for each in plans) else "-"
    drawn, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for ax, (title, value) in zip(axes, panels.items()):
        for colour, (label, members) in enumerate(groups.items()):
            for how in ("formula", "compiled"):
                some = sorted((p for p in members if p.get("how", "compiled") == how), key=lambda p: p["chips"])
                points = [p["chips"] for p in some], [value(p) for p in some]
                style = dict(linestyle="--") if how == "formula" else dict(marker="o", linestyle=lines)
                ax.plot(*points, color=f"C{colour}", label=f"{label}, {how}" if some else None, **style)
        if ax is axes[0]:
            for limit, kind in sorted({(p["limit_bytes"], p["topology"].partition(":")[0]) for p in plans}):
                ax.axhline(limit / GIB, color="0.6", linewidth=1, linestyle=":", label=f"memory of {kind}")
        ax.set(title=title, xlabel="chips", xscale="log")
        low, high = min(map(value, plans)), max(map(value, plans))
        ax.set(yscale="log") if high > 4 * low else ax.set_ylim(0, 1.1 * high)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        ax.grid(alpha=0.3)
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    drawn.savefig(path, dpi=120)
    plt.close(drawn)


@command.exit_code
def main(argv: list[str]) -> int:
    arguments = command.Arguments("plan", __doc__)
    arguments.add_argument("--config", required=True, help="FILE.py[:arg]")
    arguments.add_argument("--topology", required=True, help="v5e:16x16, v5e-256, v5e:16x16*2; several with commas")
    arguments.add_argument("--search", action="store_true", help="the largest batch and the cheapest remat that fit")
    arguments.add_argument("--json", type=Path, help="write the plans to this file")
    arguments.add_argument("--hlo", type=Path, help="write the compiled program to this file")
    arguments.add_argument("--figure", type=Path, help="draw the plans into this file")
    options = arguments.with_overrides(argv)
    places = [topology(name) for name in options.topology.split(",")]
    for name in ("json", "hlo", "figure"):  # before minutes of compiling
        file = getattr(options, name)
        if file and not file.parent.is_dir():
            raise ValueError(f"--{name}={file}: there is no folder {file.parent}")
        if file and file.is_dir():
            raise ValueError(f"--{name}={file}: it is a folder, and a file is needed")
    if options.figure and options.figure.suffix not in FIGURES:
        raise ValueError(f"--figure={options.figure}: its name must end in one of {', '.join(FIGURES)}")
    if options.hlo and (options.search or len(places) > 1):
        raise ValueError(f"--hlo={options.hlo}: it holds one program: name one topology, and no --search")
    config, _ = planning.read(options.config, options.overrides)
    plain = resolve(config)
    plans = []
    for place in places:
        try:
            found = search(plain, place) if options.search else plan(plain, place, options.hlo)
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            words = " ".join(str(error).split())[:300]
            rows = "--search" if options.search else f"batch_size={plain['batch_size']}"
            raise ValueError(f"{place.name}, {rows}: {words}") from error
        plans.append({"config": options.config, "overrides": options.overrides} | found)
        print(table(plans[-1]) + "\n", flush=True)
    if options.json:
        options.json.write_text(json.dumps(plans[0] if len(plans) == 1 else plans, indent=1) + "\n", encoding="utf-8")
    if options.figure:
        figure(plans, options.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
