"""What a cell is built with and called with, checked once for all cells: one clear line for what does not fit."""

import functools
import inspect
from numbers import Real
from types import NoneType, UnionType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..kernels.memory import is_integer
from ..names import unknown
from ..regularizers import check_key

FLOATS = ("bfloat16", "float16", "float32", "float64")
WANTED = {  # by annotation
    bool: (bool, "True or False"),
    float: (Real, "a number"),
    str: (str, "a name"),
    nnx.Rngs: (nnx.Rngs, "a generator such as nnx.Rngs(0)"),
}
FROM_ZERO = ("block", "conv_width")  # integers that may be 0


class CellType(type(nnx.Module)):
    """The type of every cell: its arguments have known names and are what their annotations say, before it is built."""

    forms: tuple[str, ...]
    chosen_forms: tuple[str, ...]

    def __call__(cls, *args, **options):
        positional, known, open_ended = parameters(cls)
        for name in options:
            if name not in known and not open_ended:
                raise ValueError(unknown(f"option of {cls.__name__}", name, known))
        forms = (*cls.forms, *cls.chosen_forms)
        if "form" in options and forms and options["form"] not in forms:
            raise ValueError(unknown(f"form of {cls.__name__}", options["form"], forms))
        checked = [check_argument(name, known[name], value) for name, value in zip(positional, args)]
        options = {name: check_argument(name, known.get(name), value) for name, value in options.items()}
        return super().__call__(*checked, *args[len(checked) :], **options)


@functools.cache
def parameters(cls: type) -> tuple[list[str], dict[str, Any], bool]:
    """Those of `cls` by position; all with their annotations, of its bases too; whether it takes still others."""
    signatures = []
    for owner in cls.__mro__[:-1]:
        if "__init__" in vars(owner):
            signatures.append(list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:])
            if all(p.kind is not p.VAR_KEYWORD for p in signatures[-1]):
                break
    else:
        signatures.append([])
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    known = {p.name: p.annotation for own in reversed(signatures) for p in own if p.kind not in variadic}
    return [p.name for p in signatures[0] if p.kind is p.POSITIONAL_OR_KEYWORD], known, not signatures[-1]


def check_argument(name: str, annotation: Any, value: Any) -> Any:
    """The value, an integer of numpy as one of Python's."""
    if name in ("dtype", "param_dtype"):
        if value is not None or name != "dtype":
            check_dtype(name, value)
        return value
    kinds = annotation.__args__ if isinstance(annotation, UnionType) else (annotation,)
    if value is None and NoneType in kinds:
        return value
    kind, *others = [kind for kind in kinds if kind is not NoneType]
    if others:
        return value
    if kind is int:
        least = int(name not in FROM_ZERO)
        if not is_integer(value, least):
            raise ValueError(f"{name} is {value!r}: an integer of at least {least} is needed")
        return int(value)
    if isinstance(kind, CellType):
        check_cell(name, value)
    elif kind in WANTED:
        right, words = WANTED[kind]
        if not isinstance(value, right) or isinstance(value, bool) != (kind is bool) or value != value:
            raise ValueError(f"{name} is {value!r}: {words} is needed")
    return value


def check_dtype(name: str, value: Any) -> None:
    """A floating dtype of jax."""
    try:
        dtype = None if value is None else jnp.dtype(value)
    except (TypeError, ValueError):
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 8:
        raise ValueError(unknown(f"floating {name}", value if dtype is None else dtype.name, FLOATS))


def check_cell(name: str, value: Any) -> None:
    """A cell that is built."""
    if not isinstance(type(value), CellType):
        what = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
        raise ValueError(f"{name} is {what}: a cell is needed, such as cells.LSTM(3, 8, rngs=nnx.Rngs(0))")


def check_inputs(cell: Any, xs: Any, state: Any, mask: Any, reset: Any, key: Any) -> None:
    """The arguments of a call fit the cell and one another."""
    check_array("xs", xs, "BT", cell.input_shape(xs))
    check_flags(xs, mask, reset)
    check_key(key)
    if state is not None:
        check_state(state, jax.eval_shape(lambda: cell.empty_state(xs)))


def check_array(name: str, array: Any, lead: str, shape: tuple[int | str, ...], kind: Any = jnp.floating) -> None:
    """An array (*lead, *shape) of the kind, with no leading axis empty."""
    if not hasattr(array, "dtype"):
        raise ValueError(f"{name} must be an array, not a {type(array).__name__}")
    if array.ndim != len(lead) + len(shape) or array.shape[len(lead) :] != shape:
        raise ValueError(f"{name} must have the shape ({', '.join(map(str, (*lead, *shape)))}), not {array.shape}")
    if 0 in array.shape[: len(lead)]:
        axis = array.shape.index(0)
        raise ValueError(f"{name} has no {('row', 'time step')[axis]} ({lead[axis]} = 0); at least one is needed")
    if not jnp.issubdtype(array.dtype, kind):
        raise ValueError(f"{name} must be {kind.__name__}, not {array.dtype}")


def check_flags(xs: Any, mask: Any, reset: Any) -> None:
    """Both are bool (B, T), as xs (B, T, ...) has it."""
    check_flag("mask", mask, xs.shape[:2])
    check_flag("reset", reset, xs.shape[:2])


def check_flag(name: str, flags: Any, shape: tuple[int, ...]) -> None:
    """None, or bool of the shape."""
    if flags is not None and not hasattr(flags, "dtype"):
        raise ValueError(f"{name} must be an array, not a {type(flags).__name__}")
    if flags is not None and (flags.shape != shape or flags.dtype != jnp.bool_):
        raise ValueError(f"{name} must be bool of the shape {shape}, not {flags.dtype} {flags.shape}")


def check_state(state: Any, empty: Any) -> None:
    """The state is of the type, the shapes and the dtypes of the empty one."""
    if type(state) is not type(empty):
        raise ValueError(f"state must be a {type(empty).__name__}, not a {type(state).__name__}")
    leaves = jax.tree_util.tree_leaves_with_path
    if jax.tree.structure(state) != jax.tree.structure(empty):
        raise ValueError(f"state must have the parts {[jax.tree_util.keystr(path) for path, _ in leaves(empty)]}")
    for (path, leaf), (_, want) in zip(leaves(state), leaves(empty)):
        if jnp.shape(leaf) != want.shape or jnp.result_type(leaf) != want.dtype:
            name, got = jax.tree_util.keystr(path), f"{jnp.result_type(leaf)} {jnp.shape(leaf)}"
            raise ValueError(f"state{name} must be {want.dtype} of the shape {want.shape} for these inputs, not {got}")


def check_tokens(tokens: Any, mask: Any, vocab_size: int) -> None:
    """Within the vocabulary where they count; only outside of `jax.jit`, under which there are no values to look at."""
    if any(isinstance(each, jax.core.Tracer) for each in (tokens, mask)):
        return
    tokens = np.asarray(tokens) if mask is None else np.where(mask, tokens, 0)  # constants under jit are values too
    for token in (int(tokens.min()), int(tokens.max())):
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"tokens has a token {token}, which is not in the vocabulary of {vocab_size}: 0 to {vocab_size - 1}"
            )
