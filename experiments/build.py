"""From a config to what it names: the resolved values, the task, the model and the optimiser."""

import contextlib
import dataclasses
import functools
import inspect
import json
import re
from types import NoneType, UnionType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree
from ml_collections import ConfigDict

from xlstm_jax import attention, blocks, cells, models, optim, precision, tasks, train
from xlstm_jax.kernels import choice
from xlstm_jax.names import unknown

KINDS = ("tagger", "lm", "features")  # features: real inputs in place of tokens
SECTIONS = ("model", "task", "optimizer")
COUNTS = {"steps": None, "batch_size": None, "log_every": 100, "eval_batch_size": None, "steps_per_dispatch": 10}
COUNTS |= {"max_bad_steps": 10, "keep_last": 2}
INTERVALS = {"seed": None, "eval_every": 0, "save_every": 0, "keep_every": 0}  # these may be 0
STEP = train.PLAIN._asdict()  # accumulate, z_loss, ema, on_bad_step, spike
DEFAULTS = COUNTS | INTERVALS | STEP | {"precision": "float32"}
REQUIRED = ("kind", *SECTIONS, "steps", "batch_size", "seed")
FIELDS = (
    "kind",
    "label",
    "precision",
    *SECTIONS,
    "mesh",
    *COUNTS,
    *INTERVALS,
    *STEP,
)  # mesh: sizes by axis, see `sharding.make_mesh`
PLAIN = {bool, int, float, str, NoneType}
LARGEST = 2**31 - 1  # steps and seeds are int32 on the device


def resolve(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values with every default filled in; ValueError for a wrong field, type or number."""
    try:
        plain = json.loads(json.dumps(config.to_dict() if isinstance(config, ConfigDict) else dict(config)))
    except TypeError as error:
        raise ValueError(f"config: {error}: only numbers, strings, booleans, None, lists and dictionaries") from error
    for name in plain:
        if name not in FIELDS:
            raise ValueError(unknown("field", f"config.{name}", [f"config.{field}" for field in FIELDS]))
    for name in REQUIRED:
        if name not in plain:
            raise ValueError(f"config.{name} is missing")
    for name in SECTIONS:
        if not isinstance(plain[name], dict):
            raise ValueError(f"config.{name} is {plain[name]!r}: a dictionary of arguments is needed")
    if not isinstance(plain.get("mesh", {}), dict):
        raise ValueError(f"config.mesh is {plain['mesh']!r}: a dictionary of sizes by axis is needed")
    if plain["kind"] not in KINDS:
        raise ValueError(unknown("config.kind", plain["kind"], KINDS))
    if not isinstance(plain.get("label", ""), str):
        raise ValueError(f"config.label is {plain['label']!r}: it is what a table calls the run, a string")
    plain = DEFAULTS | plain
    plain["eval_batch_size"] = plain["eval_batch_size"] or plain["batch_size"]
    for name, least in {**dict.fromkeys(COUNTS, 1), **dict.fromkeys(INTERVALS, 0)}.items():
        if type(plain[name]) is not int:
            raise ValueError(f"config.{name} is {plain[name]!r} ({type(plain[name]).__name__}): an int is needed")
        if not least <= plain[name] <= LARGEST:
            bound = f"at least {least}" if plain[name] < least else f"at most {LARGEST}"
            raise ValueError(f"config.{name} is {plain[name]}: {bound} is needed")
    for name, default in STEP.items():
        kind, given = type(default), type(plain[name])
        if given is not kind and (kind, given) != (float, int):
            raise ValueError(f"config.{name} is {plain[name]!r} ({given.__name__}): {kind.__name__} is needed")
    with _about():
        train.check_options(step_options(plain), plain["batch_size"])
        dtypes = precision.dtypes(plain["precision"])
    own = plain["model"].get("dtype")
    if plain["precision"] != "float32" and own not in (None, dtypes["dtype"]):
        raise ValueError(
            f"config.precision is {plain['precision']!r}, but config.model.dtype {own!r}: give one of them"
        )
    return plain


def step_options(plain: dict[str, Any]) -> train.StepOptions:
    """What a step of the resolved config does beside a plain update."""
    return train.StepOptions(**{name: type(default)(plain[name]) for name, default in STEP.items()})


def build_task(plain: dict[str, Any]):
    """The task that the resolved config names."""
    options = dict(plain["task"])
    name = options.pop("name", None)
    if name not in tasks.TASKS:
        raise ValueError(unknown("config.task.name", name, tasks.TASKS))
    _check_options("task", options, dict.fromkeys(options_of(plain, "task")))  # `tasks.make` knows their types
    with _about("task"):
        task = tasks.make(name, **options)
    real = hasattr(task, "num_features")
    if real != (plain["kind"] == "features"):
        right = "real inputs: use 'features'" if real else "tokens as inputs: use 'tagger' or 'lm'"
        raise ValueError(f"config.kind is {plain['kind']!r}, but the task {name} has {right}")
    if plain["kind"] == "lm" and task.num_classes != task.vocab_size:
        raise ValueError(f"config.kind is 'lm', but the task {name} has classes that are no tokens: use 'tagger'")
    return task


def build_model(plain: dict[str, Any], task, seed) -> nnx.Module:
    """The model of the resolved config, initialised from the seed."""
    _check_options("model", plain["model"], options_of(plain, "model"))
    rngs = nnx.Rngs(jax.random.key(seed))
    options = precision.dtypes(plain["precision"]) | plain["model"]
    with _about("model"):
        if plain["kind"] == "lm":
            return models.LM(task.vocab_size, rngs=rngs, **options)
        if plain["kind"] == "features":
            return models.FeatureTagger(task.num_features, task.num_classes, rngs=rngs, **options)
        return models.Tagger(task.vocab_size, task.num_classes, rngs=rngs, **options)


def abstract_model(plain: dict[str, Any], task) -> tuple[nnx.GraphDef, PyTree]:
    """Graph and shapes of the model, built and applied to two steps without computing: finds every wrong option."""
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: build_model(plain, task, 0)))

    def apply(params, tokens):
        return nnx.merge(graphdef, params)(tokens, key=jax.random.key(0))[0]

    real = plain["kind"] == "features"
    inputs = jax.ShapeDtypeStruct((1, 2, task.num_features) if real else (1, 2), jnp.float32 if real else jnp.int32)
    with _about("model"):
        jax.eval_shape(apply, shapes, inputs)
    return graphdef, shapes


def chosen_forms(graphdef: nnx.GraphDef, shapes: PyTree, task, plain: dict[str, Any]) -> list[str]:
    """The forms that the model's cells run in a training step, each with its reason, for the record of a run."""
    B, terms = plain["batch_size"], train.terms_of(task, step_options(plain))

    def step(params, batch):
        carry = nnx.merge(graphdef, params).initial_state(B) if task.carries_state else None
        return train.gradients(params, graphdef, batch, carry, jax.random.key(0), plain["accumulate"], **terms)

    chosen = choice.chosen_forms(step, shapes, jax.eval_shape(lambda: task.batch("train", 0, 0, B)))
    return list(dict.fromkeys(f"{each.form}: {each.reason}" for each in chosen))


def build_optimizer(plain: dict[str, Any]):
    """The optimiser of the resolved config; its number of steps is the run's."""
    _check_options("optimizer", plain["optimizer"], options_of(plain, "optimizer"))
    if "learning_rate" not in plain["optimizer"]:
        raise ValueError("config.optimizer.learning_rate is missing")
    with _about("optimizer"):
        return optim.make(**plain["optimizer"], steps=plain["steps"])


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat = {}
    for name, value in nested.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _check_options(section: str, options: dict[str, Any], valid: dict[str, Any]) -> None:
    """Names, and types where the annotation in `valid` is a plain one."""
    for name, value in options.items():
        if name not in valid:
            raise ValueError(unknown("field", f"config.{section}.{name}", [f"config.{section}.{v}" for v in valid]))
        kinds = valid[name].__args__ if isinstance(valid[name], UnionType) else (valid[name],)
        fits = type(value) in kinds or (type(value) is int and float in kinds)
        if not fits and PLAIN.issuperset(kinds):
            wanted = " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
            given = type(value).__name__
            raise ValueError(f"config.{section}.{name} is {value!r} ({given}): {wanted} is needed")


def options_of(plain: dict[str, Any], section: str) -> dict[str, Any]:
    """Every option that a section of this config may hold, and its annotation."""
    if section == "model":
        return _model_options()
    if section == "optimizer":
        return {name: kind for name, kind in _annotations(optim.make).items() if name != "steps"}
    kind = tasks.TASKS.get(plain.get("task", {}).get("name")) if section == "task" else None
    return {field.name: field.type for field in dataclasses.fields(kind) if field.init} if kind else {}


@functools.cache
def _model_options() -> dict[str, Any]:
    """Every option that some model, cell or mixer takes, and its annotation."""
    makers = (models.LM, models.Tagger, models.FeatureTagger, *cells.CELLS.values())
    makers += (blocks.MLSTMLayer, blocks.SLSTMLayer, attention.Attention)
    found = {"slstm_conv_width": int, "slstm_at": list, "inner_dim": int, "layer_remat": str}
    for each in (parent for maker in makers for parent in maker.__mro__ if parent.__module__.startswith("xlstm_jax")):
        given = _annotations(each.__init__)
        found |= {name: kind for name, kind in given.items() if found.get(name) in (None, inspect.Parameter.empty)}
    return {name: kind for name, kind in found.items() if name not in ("self", "args", "kwargs", "options", "rngs")}


def _annotations(function) -> dict[str, Any]:
    return {name: parameter.annotation for name, parameter in inspect.signature(function).parameters.items()}


@contextlib.contextmanager
def _about(section: str | None = None):
    """Complaints from inside name the section of the config that they are about."""
    try:
        yield
    except (TypeError, ValueError, ArithmeticError) as error:
        words = " ".join(str(error).split())
        if foreign := re.search(r"unknown option of \w+ '(\w+)'", words):
            words = f"{foreign[1]} is no option of this {section}, only of others"
        raise ValueError(f"config{f'.{section}' if section else ''}: {words}") from error
