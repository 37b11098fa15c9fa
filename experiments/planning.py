"""From `--config=FILE.py[:arg][@search] --config.a.b=v` to the runs of a sweep: their overrides, and an id for each."""

import ast
import difflib
import hashlib
import importlib.util
import json
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments import search
from experiments.build import abstract_model, build_optimizer, build_task, flatten, options_of, resolve
from xlstm_jax.names import unknown

ROOT = Path(__file__).resolve().parents[1]


class Run(NamedTuple):
    """One row of a sweep: what it changes in the base config."""

    id: str
    overrides: dict[str, Any]


class Sweep(NamedTuple):
    """A config file read with its argument: the base config, every run, and the file itself (for its TABLE)."""

    source: str  # FILE.py[:arg][@search]
    base: ConfigDict
    runs: list[Run]
    module: ModuleType
    changes: list[dict[str, Any]] = []  # the rows of sweep(), before any search

    def config(self, run: Run) -> ConfigDict:
        """The base config with the overrides of one run, locked."""
        return override(self.base, run.overrides)

    def expected_seconds(self, run: Run) -> float | None:
        """What the config file says how long the run takes, if it says so."""
        ask = getattr(self.module, "expected_seconds", None)
        return ask(parts(self.source)[1], run.overrides) if ask else None


def parts(source: str) -> tuple[str, str | None, str]:
    """ "FILE.py:arg@random,20,0" -> ("FILE.py", "arg", "random,20,0")."""
    path, _, found = source.rpartition("@") if "@" in source.rpartition(".py")[2] else (source, "", "")
    path, _, arg = path.partition(":")
    return path, arg or None, found


def load(source: str, overrides: list[str] | tuple[str, ...] = (), workdir: Path | None = None) -> Sweep:
    """Reads "FILE.py[:arg][@search]" and command-line overrides "a.b=v"; checks every run's fields before anything
    starts. The runs of a search that learns from results are those proposed in `workdir` so far."""
    base, module = read(source, overrides)
    _, arg, words = parts(source)
    wanted = search.parse(words)
    changes = _ask(module, lambda: list(module.sweep(arg))) if hasattr(module, "sweep") else [{}]
    for name, _ in map(parse_override, overrides):
        if changes and all(name in each for each in changes):
            raise ValueError(
                f"--config.{name}: every run of the sweep sets this field itself; change sweep() in {source}"
            )
    rows = changes
    if wanted:
        space = search_space(source, module, changes)
        rows = search.random_rows(space, wanted, changes) if wanted.method == "random" else _proposed(workdir)
    if not rows and not (wanted and wanted.method == "tpe"):  # which may have proposed nothing yet
        raise ValueError(f"{source}: sweep() yields no run")
    return Sweep(source, base, distinct(source, base, rows), module, changes)


def distinct(source: str, base: ConfigDict, rows: list[dict[str, Any]]) -> list[Run]:
    """A run for each row of the sweep; ValueError for a row that does not fit the config, or that is there twice."""
    runs, seen = [], {}
    for row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{source}: sweep() yields {row!r}: a dictionary is needed, such as {{'seed': 0}}")
        try:
            run, config = Run(run_id(row), row), json.dumps(override(base, row).to_dict(), sort_keys=True)
        except ValueError as error:
            raise ValueError(f"{source}: row {row} of the sweep: {error}") from None
        except TypeError:
            raise ValueError(
                f"{source}: row {row} of the sweep: only numbers, strings, booleans, None, lists and dictionaries of"
                " Python's own, such as int(x) of a NumPy integer"
            ) from None
        for key, what in ((run.id, f"share the id {run.id}"), (config, "have the same config")):
            if key in seen:
                raise ValueError(f"{source}: two runs {what}: {seen[key]} and {row}")
            seen[key] = row
        runs.append(run)
    return runs


def search_space(source: str, module: ModuleType, changes: list[dict[str, Any]]) -> dict[str, Any]:
    """What the config's search(arg) says, checked."""
    if not hasattr(module, "search"):
        raise ValueError(f"--config={source}: the file has no search(arg), which gives the space of the search")
    space = _ask(module, lambda: module.search(parts(source)[1]))
    search.check_space(space, changes)
    return space


def _proposed(workdir: Path | None) -> list[dict[str, Any]]:
    """Overrides that a search has proposed, each once."""
    found = {search.key(each["overrides"]): each["overrides"] for each in search.proposals(workdir)} if workdir else {}
    return list(found.values())


def read(source: str, overrides: list[str] | tuple[str, ...] = ()) -> tuple[ConfigDict, ModuleType]:
    """The config of "FILE.py[:arg]" with overrides "a.b=v", and the file itself."""
    path, arg, _ = parts(source)
    file = Path(path)
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"--config={path}: no such Python file")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))  # so that `from configs import ...` works in it
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    _ask(module, lambda: spec.loader.exec_module(module))
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config={path}: the file has no get_config(arg)")
    base = _ask(module, lambda: module.get_config(arg))
    if not isinstance(base, ConfigDict):
        raise ValueError(f"--config={path}: get_config returns a {type(base).__name__}: a ConfigDict is needed")
    return override(base, dict(map(parse_override, overrides))), module


def _ask(module: ModuleType, function: Callable):
    """function(); what goes wrong inside the config file is named with its line, in one line."""
    try:
        return function()
    except ValueError:  # the config's own words
        raise
    except Exception as error:
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == module.__file__
        ]
        place = f" line {lines[-1]}:" if lines else ""
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"--config={module.__file__}:{place} {words}") from error


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
            section = name.rpartition(".")[0]
            sections = {field.rpartition(".")[0] for field in fields} | {"mesh"}
            if section not in sections:
                raise ValueError(unknown("section", section, sorted(sections - {""})))
            fields[name] = value
        if inside := [field for field in fields if field.startswith(f"{name}.")]:
            raise ValueError(
                f"{name} is a section of the config: change one of its fields, such as --config.{inside[0]}=VALUE"
            )
        if name not in fields:
            raise ValueError(_no_field(base, fields, name, value))
        if isinstance(fields[name], float) and value in ("nan", "inf", "-inf"):  # no literals, but numbers
            value = float(value)
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
            if parent not in owner:
                owner[parent] = ConfigDict()
            owner = owner[parent]
        owner[last] = value
    return config.lock()


def _no_field(base: ConfigDict, fields: dict[str, Any], name: str, value: Any) -> str:
    """One line: the nearest field, or option that the config does not list, of the same section."""
    section, _, last = name.rpartition(".")
    listed = [field for field in fields if field.rpartition(".")[0] == section]
    options = [f"{section}.{option}" for option in options_of(base.to_dict(), section)]
    if not listed:
        return unknown("field", name, fields)
    found = difflib.get_close_matches(name, {*listed, *options}, n=1)
    if not found or found[0] in listed:
        return unknown("field", name, listed)
    return f"the config does not list {name!r}: --config.+{found[0]}={value} adds the option {found[0]}"


def headline(source: str, module: ModuleType, configs: list[ConfigDict], workdir: Path) -> str:
    """What is about to run: file, preset, models, tasks, folder."""
    path, arg, _ = parts(source)
    presets = list(getattr(module, "PRESETS", ()))
    preset = next((name for name in presets if name in (arg or "").split(",")), None)
    if presets and preset is None:
        preset = f"{presets[0]} (as none is named; there are {', '.join(presets)})"
    words = [path, f"preset {preset}" if preset else f"argument {arg or 'none'}"]
    names = {
        "model": [c.get("label") or c.get("model", {}).get("backbone") for c in configs],
        "task": [c.get("task", {}).get("name") for c in configs],
    }
    words += [f"{what} {', '.join(dict.fromkeys(map(str, found)))}" for what, found in names.items()]
    runs = f"{len(configs)} runs, " if len(configs) > 1 else ""
    return f"{'; '.join(words)}; {runs}folder {workdir}"


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


def validate(sweep: Sweep) -> set[str]:
    """Builds every distinct task, optimiser and (abstractly) model: a wrong option shows before anything starts.

    Returns the names of the numbers that some result row will have.
    """
    seen, names = set(), {"steps", "parameters", "seconds", "wall_seconds"}
    for run in sweep.runs:
        plain = resolve(sweep.config(run))
        if (config := json.dumps(plain | {"seed": 0}, sort_keys=True)) in seen:
            continue
        seen.add(config)
        try:
            task = build_task(plain)
            build_optimizer(plain)
            key = json.dumps([plain["kind"], plain["model"]], sort_keys=True)
            if key not in seen:
                abstract_model(plain, task)
            seen.add(key)
        except ValueError as error:
            raise ValueError(f"run {run.id}: {error}") from None
        scores = task.metrics(dict.fromkeys(("nll", "correct", "weight"), 1.0))
        names |= {f"{split}_{name}" for split in ("valid", "test") for name in scores}
    return names
