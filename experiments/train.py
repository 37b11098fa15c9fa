"""One run: python -m experiments.train --config=configs/F.py[:arg] --workdir=DIR [--config.a.b=v]; repeat it to resume.

On several hosts, which see one --workdir, the same command runs on each with --processes: auto (TPU pods and SLURM know
who is who), or HOST:PORT,COUNT,INDEX (process 0's address, how many, which this is; on SLURM HOST:PORT is enough).

Exit codes: 0 finished, 1 diverged, 2 something in the config, the data or the folder is wrong (one line says what),
75 told to stop (SIGTERM, preemption) or a process was lost: the same command goes on.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments import command, flops, owner, planning
from experiments.build import (
    COUNTS,
    DEFAULTS,
    INTERVALS,
    abstract_model,
    build_model,
    build_optimizer,
    build_task,
    chosen_forms,
    flatten,
    resolve,
    step_options,
)
from xlstm_jax import distributed, metrics, precision, sharding, train
from xlstm_jax.checkpoint import FORMAT
from xlstm_jax.data import tokenizers
from xlstm_jax.data.tokens import cache_root


def run(
    config: ConfigDict,
    workdir: str | os.PathLike,
    progress: bool = True,
    profile: int = 0,
    told: Callable[[], bool] = lambda: False,
    stall_limit: int = 1800,
    pruned: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train as `config` says, or go on with it, or return what a finished run in `workdir` found: the result row.

    profile: trace that many steps into `workdir`/profile. told, stall_limit, pruned: see `train.fit`.
    """
    workdir = Path(workdir).absolute()
    with distributed.together("read the config"):
        plain = resolve(config)
    environment = metrics.environment()
    distributed.agree(
        "config or code", flatten({"config": plain, **{n: environment[n] for n in ("commit", "versions")}})
    )
    with distributed.together("prepare the run"):
        task = build_task(plain)
        tx = build_optimizer(plain)
        graphdef, shapes = abstract_model(plain, task)
        mesh = build_mesh(plain, nnx.merge(graphdef, shapes), task)
        data_hash = getattr(task, "data_hash", None)
        found = check_workdir(workdir, plain, data_hash)
    distributed.agree("data or folder", {"hash": data_hash, "finished": found is not None})
    if found is not None:
        return found
    use_compilation_cache()
    environment["precision"] |= recorded_dtypes(plain)
    inputs = jax.eval_shape(lambda: task.batch("train", 0, 0, plain["batch_size"])).inputs
    with sharding.use(mesh):
        environment["forms"] = chosen_forms(graphdef, shapes, task, plain)
    work = flops.work(nnx.merge(graphdef, shapes), inputs.shape[1], jax.devices()[: 1 if mesh is None else mesh.size])
    record = {"id": workdir.name, "config": plain} | environment | {"data_hash": data_hash}
    stored = None if mesh is None else sharding.parameter_shardings(nnx.merge(graphdef, shapes), mesh)
    params = jax.jit(lambda seed: nnx.split(build_model(plain, task, seed))[1], out_shardings=stored)(plain["seed"])
    names = (*COUNTS, *INTERVALS)
    with owner.owned(workdir), sharding.use(mesh):
        if hasattr(task, "coder") and jax.process_index() == 0:
            tokenizers.save(task.coder, workdir / "tokenizer")
        return train.fit(
            nnx.merge(graphdef, params),
            task,
            tx,
            **{name: plain[name] for name in names},
            options=step_options(plain),
            profile=profile,
            workdir=workdir,
            progress=progress,
            label=workdir.name,
            record=record,
            told=told,
            stall_limit=stall_limit,
            work=work,
            pruned=pruned,
        )


def recorded_dtypes(plain: dict[str, Any]) -> dict[str, str]:
    """What the model computes in and keeps its parameters in, for the record of a run."""
    dtypes = precision.dtypes(plain["precision"]) | plain["model"]
    return {name: str(dtypes[name]) for name in ("dtype", "param_dtype")}


def build_mesh(plain: dict[str, Any], model: nnx.Module, task) -> Mesh | None:
    """The mesh that the config names, checked against devices, batches, time and heads; None for one device.

    Several processes divide the rows over all devices where the config names none.
    """
    if not plain.get("mesh") and jax.process_count() == 1:
        return None
    try:
        mesh = sharding.make_mesh(plain.get("mesh"))
        batches = {name: plain[name] for name in ("batch_size", "eval_batch_size")}
        batches["batch_size / accumulate"] = plain["batch_size"] // plain["accumulate"]
        sharding.check(mesh, batch_sizes=batches, seq_len=getattr(task, "seq_len", None), model=model)
    except ValueError as error:
        raise ValueError(f"config.mesh: {error}") from error
    return mesh


def check_workdir(workdir: Path, plain: dict[str, Any], data_hash: str | None = None) -> dict[str, Any] | None:
    """The row of a finished run, else None; ValueError if the folder cannot be used. Touches nothing that is there."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"workdir {workdir} cannot be made: {error.strerror}") from error
    if not os.access(workdir, os.W_OK | os.X_OK):
        raise ValueError(f"workdir {workdir} cannot be written: choose a folder that you own")
    path = workdir / "config.json"
    if not path.exists():
        if any((workdir / name).exists() for name in ("checkpoints", "metrics.jsonl", "result.json")):
            raise ValueError(f"workdir {workdir} holds a run without config.json: choose an empty folder")
        return None
    saved = read_json(path)
    if not isinstance(saved.get("config"), dict):
        raise ValueError(f"{path} holds no config: restore it or choose another folder")
    there, here = (
        flatten({name: value for name, value in (DEFAULTS | c).items() if name != "mesh"}) | {"data": h}  # any mesh
        for c, h in ((saved["config"], saved.get("data_hash")), (plain, data_hash))
    )
    differing = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if differing:
        shown = "; ".join(f"{name} is {there.get(name)!r} there, {here.get(name)!r} here" for name in differing[:5])
        more = f" (and {len(differing) - 5} more)" if len(differing) > 5 else ""
        raise ValueError(f"workdir {workdir} holds another config's run: {shown}{more}; choose another folder")
    if not (workdir / "result.json").exists():
        check_format(path, saved)
        return None
    found = read_json(workdir / "result.json")
    if not found.keys() >= {"id", "steps", "seconds"}:
        raise ValueError(f"{workdir / 'result.json'} is no result: restore it or choose another folder")
    return found


def check_format(path: Path, saved: dict[str, Any]) -> None:
    """ValueError where the checkpoints beside a config.json are of another format than this version's."""
    if saved.get("format") != FORMAT:
        raise ValueError(
            f"{path.parent} holds checkpoints of format {saved.get('format', 1)}, this version reads {FORMAT}: go on"
            " with the version that began the run, or choose another folder"
        )


def use_compilation_cache() -> None:
    """Keep compiled programs in `jax` in the `cache_root`, unless a JAX cache is set already."""
    if jax.config.jax_compilation_cache_dir:
        return
    try:
        folder = cache_root() / "jax"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return  # a read-only home, or none, costs a compilation, not the run
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; one line if the file holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): restore it or choose another folder") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no JSON object: restore it or choose another folder")
    return value


@command.exit_code
def main(argv: list[str]) -> int:
    arguments = command.Arguments("train", __doc__)
    arguments.add_argument("--config", required=True, help="FILE.py[:arg]")
    arguments.add_argument("--workdir", type=command.run_folder, required=True, help="folder of the run")
    arguments.add_argument("--profile", type=int, default=0, help="trace so many steps into WORKDIR/profile")
    arguments.add_argument("--processes", help="auto, HOST:PORT,COUNT,INDEX or HOST:PORT: this is one of several")
    arguments.add_argument("--stall_limit", type=int, default=1800, help="seconds that one waits for another")
    arguments.add_argument("--start_limit", type=int, default=300, help="seconds for all to come together")
    arguments.add_argument(
        "--heartbeat", type=int, default=60, help="seconds of silence after which one counts as dead"
    )
    options = arguments.with_overrides(argv)
    if options.processes is None:
        with distributed.Stop() as stop:
            return train_as_told(options, stop)
    try:
        distributed.join(options.processes, wait=options.start_limit, heartbeat=options.heartbeat)
    except RuntimeError as error:
        return command.fail(error)
    with distributed.Stop() as stop:
        code = one_of_several(options, stop)
        return distributed.leave(code, wait=10 if code == 2 else 300)  # 2: perhaps of this process alone


@command.exit_code
def one_of_several(options, stop: distributed.Stop) -> int:
    """`train_as_told`, where the end of another process is one line too."""
    try:
        return train_as_told(options, stop)
    except (jax.errors.JaxRuntimeError, distributed.Missing) as error:
        words = " ".join(str(error).split())[:300]
        own = words.startswith(("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED"))  # not a lost process
        return command.fail(f"process {jax.process_index()} cannot go on: {words}", 1 if own else distributed.AGAIN)


def train_as_told(options, stop: distributed.Stop) -> int:
    """The run of the command line; its exit code."""
    with distributed.together("read the config file"):
        config, module = planning.read(options.config, options.overrides)
    first = jax.process_index() == 0
    result = options.workdir / "result.json"
    finished = result.exists()
    if first:
        print(planning.headline(options.config, module, [config], options.workdir), flush=True)
    try:
        limits = dict(profile=options.profile, stall_limit=options.stall_limit)
        row = run(config, options.workdir, told=stop.told, **limits)
    except train.Diverged as error:
        return command.fail(error, 1)
    except train.Stopped as error:
        if first:
            print(f"{options.workdir.name}: {error}", file=sys.stderr)
        return distributed.AGAIN
    if not first:
        return 0
    found = {name: value for name, value in row.items() if name.startswith(("valid_", "test_"))}
    scores = [f"{name} {value:.4f}" for name, value in found.items() if isinstance(value, float)]
    done = f"already finished, nothing was trained; {result} has" if finished else "finished:"
    timing = metrics.read(options.workdir / "timing.jsonl")
    waited = metrics.waited(timing[-1]) if timing else None
    if waited is not None:
        scores.append(f"{100 * waited:.2f} % of training waited for data")
    print(f"{row['id']}: {done} {row['steps']} steps in {row['seconds']:.0f} s; {', '.join(scores)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
