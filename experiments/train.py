"""One run: python -m experiments.train --config=configs/F.py[:arg] --workdir=DIR [--config.a.b=v]; repeat it to resume.

Exit codes: 0 finished, 1 diverged, 2 something in the config, the data or the folder is wrong (one line says what).
"""

import dataclasses
import inspect
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags
from flax import nnx
from ml_collections import ConfigDict

from xlstm_jax import metrics, models, optim, tasks, train

KINDS = ("tagger", "lm")
SECTIONS = ("model", "task", "optimizer")
COUNTS = {"steps": None, "batch_size": None, "log_every": 100, "eval_batch_size": None, "steps_per_dispatch": 10}
INTERVALS = {"seed": None, "eval_every": 0, "save_every": 0}  # these may be 0
REQUIRED = ("kind", *SECTIONS, "steps", "batch_size", "seed")
FIELDS = ("kind", *SECTIONS, *COUNTS, *INTERVALS)


def run(config: ConfigDict, workdir: str | os.PathLike, progress: bool = True) -> dict[str, Any]:
    """Train as `config` says, or go on with it, or return what a finished run in `workdir` found: the result row."""
    workdir = Path(workdir).absolute()
    plain = resolve(config)
    task = build_task(plain)
    tx = build_optimizer(plain)
    graphdef, shapes = nnx.split(
        nnx.eval_shape(lambda: build_model(plain, task, 0))
    )  # cheap, and finds every wrong option
    data_hash = getattr(task, "data_hash", None)
    found = check_workdir(workdir, plain, data_hash)
    if found is not None:
        return found
    use_compilation_cache()
    environment = metrics.environment()
    environment["precision"]["dtype"] = str(plain["model"].get("dtype") or "float32")
    record = {"id": workdir.name, "config": plain} | environment | {"data_hash": data_hash}
    if not (workdir / "config.json").exists():
        parameters = sum(x.size for x in jax.tree.leaves(shapes))
        metrics.write_json(workdir / "config.json", record | {"parameters": parameters})
    params = jax.jit(lambda seed: nnx.split(build_model(plain, task, seed))[1])(plain["seed"])
    names = (*COUNTS, *INTERVALS)
    return train.fit(
        nnx.merge(graphdef, params),
        task,
        tx,
        **{name: plain[name] for name in names},
        workdir=workdir,
        progress=progress,
        label=workdir.name,
        record=record,
    )


def resolve(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values with every default filled in; ValueError for a wrong field, type or number."""
    plain = json.loads(json.dumps(config.to_dict() if isinstance(config, ConfigDict) else dict(config)))
    for name in plain:
        if name not in FIELDS:
            raise ValueError(optim.unknown("field", f"config.{name}", [f"config.{field}" for field in FIELDS]))
    for name in REQUIRED:
        if name not in plain:
            raise ValueError(f"config.{name} is missing")
    for name in SECTIONS:
        if not isinstance(plain[name], dict):
            raise ValueError(f"config.{name} is {plain[name]!r}: a dictionary of arguments is needed")
    if plain["kind"] not in KINDS:
        raise ValueError(optim.unknown("config.kind", plain["kind"], KINDS))
    plain = {**COUNTS, **INTERVALS, **plain}
    plain["eval_batch_size"] = plain["eval_batch_size"] or plain["batch_size"]
    for name, least in {**dict.fromkeys(COUNTS, 1), **dict.fromkeys(INTERVALS, 0)}.items():
        if type(plain[name]) is not int:
            raise ValueError(f"config.{name} is {plain[name]!r} ({type(plain[name]).__name__}): an int is needed")
        if plain[name] < least:
            raise ValueError(f"config.{name} is {plain[name]}: at least {least} is needed")
    return plain


def build_task(plain: dict[str, Any]):
    """The task that the resolved config names."""
    options = dict(plain["task"])
    name = options.pop("name", None)
    if name not in tasks.TASKS:
        raise ValueError(optim.unknown("config.task.name", name, tasks.TASKS))
    _check_names("task", options, [field.name for field in dataclasses.fields(tasks.TASKS[name]) if field.init])
    task = _call("task", tasks.make, name, **options)
    if plain["kind"] == "lm" and task.num_classes != task.vocab_size:
        raise ValueError(f"config.kind is 'lm', but the task {name} has classes that are no tokens: use 'tagger'")
    return task


def build_model(plain: dict[str, Any], task, seed) -> nnx.Module:
    """The model of the resolved config, initialised from the seed."""
    options = dict(plain["model"], rngs=nnx.Rngs(jax.random.key(seed)))
    if plain["kind"] == "lm":
        return _call("model", models.LM, task.vocab_size, **options)
    return _call("model", models.Tagger, task.vocab_size, task.num_classes, **options)


def build_optimizer(plain: dict[str, Any]):
    """The optimiser of the resolved config; its number of steps is the run's."""
    valid = [name for name in inspect.signature(optim.make).parameters if name != "steps"]
    _check_names("optimizer", plain["optimizer"], valid)
    if "learning_rate" not in plain["optimizer"]:
        raise ValueError("config.optimizer.learning_rate is missing")
    return _call("optimizer", optim.make, **plain["optimizer"], steps=plain["steps"])


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
    saved = _read_json(path)
    there, here = (flatten(c) | {"data": h} for c, h in ((saved["config"], saved.get("data_hash")), (plain, data_hash)))
    differing = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if differing:
        shown = "; ".join(f"{name} is {there.get(name)!r} there, {here.get(name)!r} here" for name in differing[:5])
        more = f" (and {len(differing) - 5} more)" if len(differing) > 5 else ""
        raise ValueError(f"workdir {workdir} holds another config's run: {shown}{more}; choose another folder")
    return _read_json(workdir / "result.json") if (workdir / "result.json").exists() else None


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat = {}
    for name, value in nested.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def use_compilation_cache() -> None:
    """Keep compiled programs in $XLSTM_JAX_CACHE or ~/.cache/xlstm_jax/jax, unless a JAX cache is set already."""
    if jax.config.jax_compilation_cache_dir:
        return
    folder = Path(os.environ.get("XLSTM_JAX_CACHE") or Path.home() / ".cache/xlstm_jax/jax").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a read-only home costs a compilation, not the run
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): restore it or choose another folder") from error


def _check_names(section: str, options: dict[str, Any], valid: list[str]) -> None:
    for name in options:
        if name not in valid:
            raise ValueError(
                optim.unknown("field", f"config.{section}.{name}", [f"config.{section}.{v}" for v in valid])
            )


def _call(section: str, make, *args, **options):
    """make(...), its complaints named by the section of the config that they are about."""
    try:
        return make(*args, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.{section}: {' '.join(str(error).split())}") from error


def read_config(source: str | None, overrides: list[str]) -> ConfigDict:
    """The config of "FILE.py[:arg]" with overrides "a.b=v"; ValueError in one line for whatever is wrong with them."""
    if not source:
        raise ValueError("--config is missing: --config=configs/FILE.py[:arg]")
    from experiments import planning  # it builds on this module

    path, _, arg = source.partition(":")
    config = planning.load_module(path).get_config(arg or None)
    return planning.override(config, dict(map(planning.parse_override, overrides)))


def fail(message: object, code: int = 2) -> int:
    """Say what was wrong in one line on stderr; returns the exit code."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def main(argv: list[str]) -> int:
    arguments = flags.FlagValues()
    config = flags.DEFINE_string("config", None, "FILE.py[:arg]", flag_values=arguments)
    workdir = flags.DEFINE_string("workdir", None, "folder of the run", flag_values=arguments)
    changes = [argument for argument in argv[1:] if re.match(r"--?config\.", argument)]
    try:
        rest = arguments([argument for argument in argv if argument not in changes])[1:]
        if rest:
            raise ValueError(f"unknown argument {rest[0]!r}: write --config=..., --workdir=... or --config.a.b=v")
        overrides = [re.sub(r"^--?config\.", "", argument) for argument in changes]
        resolved = read_config(config.value, overrides)
        if not workdir.value:
            raise ValueError("--workdir is missing: --workdir=DIR")
        row = run(resolved, workdir.value)
    except train.Diverged as error:
        return fail(error, 1)
    except (ValueError, OSError, flags.Error) as error:
        return fail(error)
    scores = [f"{name} {value:.4f}" for name, value in row.items() if name.startswith(("valid_", "test_"))]
    print(f"{row['id']}: {row['steps']} steps in {row['seconds']:.0f} s; {', '.join(scores)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
