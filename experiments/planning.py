"""From `--config=FILE.py[:arg] --config.a.b=v` to the runs of a sweep: their overrides, and an id for each."""

import ast
import hashlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from flax import nnx
from ml_collections import ConfigDict

from experiments.train import build_model, build_optimizer, build_task, flatten, resolve
from xlstm_jax.optim import unknown

ROOT = Path(__file__).resolve().parents[1]


class Run(NamedTuple):
    """One row of a sweep: what it changes in the base config."""

    id: str
    overrides: dict[str, Any]


class Sweep(NamedTuple):
    """A config file read with its argument: the base config, every run, and the file itself (for its TABLE)."""

    source: str  # FILE.py[:arg]
    base: ConfigDict
    runs: list[Run]
    module: ModuleType

    def config(self, run: Run) -> ConfigDict:
        """The base config with the overrides of one run, locked."""
        return override(self.base, run.overrides)

    def expected_seconds(self, run: Run) -> float | None:
        """What the config file says how long the run takes, if it says so."""
        ask = getattr(self.module, "expected_seconds", None)
        return ask(self.source.partition(":")[2] or None, run.overrides) if ask else None


def load(source: str, overrides: list[str] | tuple[str, ...] = ()) -> Sweep:
    """Reads "FILE.py[:arg]" and command-line overrides "a.b=v"; checks every run before anything starts."""
    path, _, arg = source.partition(":")
    module = load_module(path)
    base = override(module.get_config(arg or None), dict(map(parse_override, overrides)))
    rows = module.sweep(arg or None) if hasattr(module, "sweep") else [{}]
    sweep = Sweep(source, base, [Run(run_id(row), row) for row in rows], module)
    seen: dict[str, dict] = {}
    for run in sweep.runs:
        if run.id in seen:
            raise ValueError(f"{source}: two runs share the id {run.id}: {seen[run.id]} and {run.overrides}")
        seen[run.id] = run.overrides
        sweep.config(run)
    return sweep


def load_module(path: str) -> ModuleType:
    """The Python file, imported from where it lies; `from configs import ...` works in it."""
    file = Path(path)
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"--config={path}: no such Python file")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config={path}: the file has no get_config(arg)")
    return module


def parse_override(text: str) -> tuple[str, Any]:
    """ "a.b=3" -> ("a.b", 3); what is no Python literal is a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--config.{text}: expected --config.{text}=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def override(base: ConfigDict, overrides: dict[str, Any]) -> ConfigDict:
    """A locked copy with dotted fields changed; a field must exist and keep its type, unless "+a.b" adds it."""
    config = ConfigDict(base.to_dict())
    fields = flatten(base.to_dict())
    for name, value in overrides.items():
        if name.startswith("+"):
            name = name.removeprefix("+")
            fields[name] = value
        if name not in fields:
            raise ValueError(unknown("field", name, fields))
        if isinstance(fields[name], float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if fields[name] is not None and value is not None and type(value) is not type(fields[name]):
            wanted, given = type(fields[name]).__name__, type(value).__name__
            raise ValueError(
                f"{name}={value!r} is of type {given}; the config's {name}={fields[name]!r} is of type {wanted}"
            )
        *parents, last = name.split(".")
        owner = config
        for parent in parents:
            owner = owner[parent]
        owner[last] = value
    return config.lock()


def run_id(overrides: dict[str, Any]) -> str:
    """Readable slug and a short hash of the overrides: {"task.name": "parity", "seed": 0} -> "parity-seed0-…"."""
    words = []
    for name, value in overrides.items():
        if name.startswith("+"):  # an option of one model: in the hash only
            continue
        word = value if isinstance(value, str) else f"{name.rpartition('.')[2]}{value}"
        words.append(re.sub(r"[^A-Za-z0-9.]+", "_", word).strip("_"))
    digest = hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()[:6]
    return "-".join([*words, digest])[-120:]


def validate(sweep: Sweep) -> None:
    """Builds every distinct model (abstractly), task and optimiser: a wrong option shows before anything starts."""
    seen = set()
    for run in sweep.runs:
        plain = resolve(sweep.config(run)) | {"seed": 0}
        if (key := json.dumps(plain, sort_keys=True)) in seen:
            continue
        seen.add(key)
        try:
            task = build_task(plain)
            build_optimizer(plain)
            nnx.eval_shape(lambda plain=plain, task=task: build_model(plain, task, 0))
        except ValueError as error:
            raise ValueError(f"run {run.id}: {error}") from None
