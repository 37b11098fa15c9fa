"""The page on the cells, from their docstrings: python -m experiments.cells_page [--check]

Writes docs/cells.md; --check writes nothing and exits with 1 if the page is out of date. Every cell is built, without
memory, with sizes that are products of distinct primes, so that each size and each count can be read as a formula.
"""

import inspect
import math
import re
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiments import command
from xlstm_jax import cells, kernels

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "cells.md"

HEADS, KERNEL, SPACE = 7, 11, 13
WIDTHS = {"D_in": 10_007, "D": 20_011, "H": 30_011}  # a head
PRIMES = {"N": HEADS, "k": KERNEL, "X": SPACE} | WIDTHS
D_IN, D, H = (HEADS * prime for prime in WIDTHS.values())
ARITHMETIC = set("add add_any sub mul div max min neg exp log log1p expm1 tanh logistic sqrt rsqrt".split())

HEAD = """\
# Cells

Written by `python -m experiments.cells_page` from the docstrings and from the cells themselves; do not edit it by hand.

Widths: D_in of the input, D of the cell, H of a projected h; N heads (`num_heads`, 1 unless a cell says otherwise);
k the size of a kernel and X that of an image along each of its two axes.
FLOPs: of one step of one row, forward, to leading order (the terms that are a product of two widths): two for each
entry of a matrix that is multiplied by, one for each arithmetic operation on an entry of a matrix-valued state.
State: numbers kept for one row. Forms: ways to compute the same numbers, chosen by `form=`; the first is the plain
loop that the others are tested against.
"""


class Facts(NamedTuple):
    """What building a cell and tracing one step of it show."""

    parameters: dict[str, tuple[int, ...]]  # name to shape
    state: dict[str, tuple[int, ...]]  # without the batch axis
    flops: Counter  # see `formula`


# Formulas: a product of sizes is a number times powers of the primes; a Counter maps the powers to the number.


def monomial(n: int) -> Counter:
    """n as {powers of PRIMES: coefficient}."""
    powers = []
    for prime in PRIMES.values():
        power = 0
        while n % prime == 0:
            n, power = n // prime, power + 1
        powers.append(power)
    return Counter({tuple(powers): n})


def formula(terms: Counter) -> str:
    """{...} as "4 D_in D + 4 D²/N": every width has N in it, so that its N is taken out."""

    def symbols(powers):
        heads, kernel, space, *widths = powers
        return dict(zip(["X", "k", *WIDTHS, "N"], [space, kernel, *widths, heads - sum(widths)]))

    def term(powers, coefficient):
        power = {name: p for name, p in symbols(powers).items() if p}
        above = [name + superscript(p) for name, p in power.items() if p > 0]
        below = "".join("/" + name + superscript(-p) for name, p in power.items() if p < 0)
        factors = above if coefficient == 1 and above else [f"{coefficient:,}", *above]
        return " ".join(factors) + below

    ordered = sorted(terms.items(), key=lambda item: (-degree(item[0]), [-p for p in item[0][3:]], item[0]))
    return " + ".join(term(*item) for item in ordered) or "0"


def superscript(power: int) -> str:
    return "" if power == 1 else "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(power))


def degree(powers: tuple[int, ...]) -> int:
    """How many widths are multiplied."""
    return sum(powers[3:])


def total(shapes: dict[str, tuple[int, ...]]) -> Counter:
    return sum((monomial(math.prod(shape)) for shape in shapes.values()), Counter())


def shown(shape: tuple[int, ...]) -> str:
    return f"({', '.join(formula(monomial(size)) for size in shape)}{',' * (len(shape) == 1)})"


# A cell's facts.


def chain(cls: type) -> list[type]:
    """The classes whose constructors take the arguments of `cls`: each passes its **options on to the next."""
    owners = []
    for owner in cls.__mro__:
        if "__init__" in vars(owner) and owner is not object:
            owners.append(owner)
            if not any(p.kind is p.VAR_KEYWORD for p in arguments(owner)):
                break
    return owners


def arguments(owner: type) -> list[inspect.Parameter]:
    return list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]


def build(cls: type) -> nnx.Module:
    """An instance, with heads if it can have them and in its first form."""
    taken = {p.name: p for owner in reversed(chain(cls)) for p in arguments(owner)}
    inner = lambda width: cells.LSTM(width, D, form="scan", rngs=nnx.Rngs(0))  # noqa: E731
    values = {
        "in_features": lambda: D_IN,
        "features": lambda: D,
        "projection": lambda: H,
        "kernel_size": lambda: KERNEL,
        "rngs": lambda: nnx.Rngs(0),
        "forward": lambda: inner(D_IN),
        "backward": lambda: inner(D_IN),
        "layers": lambda: [inner(D_IN), inner(D)],
    }
    needed = [p.name for p in taken.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    for name in needed:
        if name not in values:
            raise ValueError(f"{cls.__name__} needs the argument {name!r}: say in experiments/cells_page.py what it is")
    chosen = {"num_heads": HEADS, "form": cls.forms and cls.forms[0], "recurrent_init": "zeros"}
    options = {name: value for name, value in chosen.items() if name in taken}
    make = lambda: cls(**{name: values[name]() for name in needed}, **options)  # noqa: E731
    try:
        return nnx.eval_shape(make)
    except ValueError as error:
        if "heads" not in str(error) or options.pop("num_heads", None) is None:
            raise
        return nnx.eval_shape(make)


def facts(cls: type) -> Facts:
    cell = build(cls)
    graphdef, params = nnx.split(cell)
    shape = (D_IN,)
    if hasattr(cell, "input_shape"):  # a convolutional cell's has axes of space
        shape = (SPACE if size == "space" else size for size in cell.input_shape(jnp.zeros((1, 1, 1))))
    xs = jax.ShapeDtypeStruct((1, 1, *shape), jnp.float32)
    step = lambda params, xs: nnx.merge(graphdef, params)(xs)  # noqa: E731
    jaxpr, (_, state) = jax.make_jaxpr(step, return_shape=True)(params, xs)
    return Facts(
        {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(params)},
        {
            jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape[1:]
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        },
        flops(jaxpr.jaxpr),
    )


def flops(jaxpr: Any) -> Counter:
    """Operations of a traced program, the terms of two widths and more; a loop's body counts for each turn."""
    counted = Counter()
    for eqn in jaxpr.eqns:
        out = eqn.outvars[0].aval
        inner = [value for value in jax.tree.leaves(eqn.params, is_leaf=is_program) if is_program(value)]
        for program in inner:
            for powers, n in flops(getattr(program, "jaxpr", program)).items():
                counted[powers] += n * eqn.params.get("length", 1)
        name = eqn.primitive.name
        if name == "dot_general":
            ((contracted, _), _) = eqn.params["dimension_numbers"]
            counted += monomial(2 * out.size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted))
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            features = eqn.params["dimension_numbers"].rhs_spec[0]
            counted += monomial(2 * out.size * math.prod(kernel) // kernel[features])
        elif name in ARITHMETIC and jnp.issubdtype(out.dtype, jnp.floating):
            counted += monomial(out.size)
    return Counter({powers: n for powers, n in counted.items() if degree(powers) > 1})


def is_program(value: Any) -> bool:
    return hasattr(value, "eqns")


# The page.


def classes() -> dict[type, str]:
    """Every cell and its name in CELLS, and the public cells that have none, which are made of others."""
    named = {cls: f'`"{name}"`' for name, cls in cells.CELLS.items()}
    public = [value for value in vars(cells).values() if inspect.isclass(value) and value is not cells.Cell]
    return named | {cls: "" for cls in public if cls not in named}


def page() -> str:
    """The whole page: summary, a section a file with its cells, and the options that cells share."""
    found = {cls: facts(cls) for cls in classes()}
    modules = list(dict.fromkeys(cls.__module__ for cls in found))
    parts = [HEAD, summary(found)]
    for module in modules:
        file = f"xlstm_jax/cells/{module.rpartition('.')[2]}.py"
        parts += [f"## {file.rpartition('/')[2]}", f"[{file}](../{file})", *docstring(sys.modules[module].__doc__)]
        parts += [part for cls in found if cls.__module__ == module for part in section(cls, found[cls])]
    shared = dict.fromkeys(owner for cls in found for owner in chain(cls) if owner not in found)
    parts += ["## Options that cells share"]
    for owner in shared:
        parts += [f"### {owner.__name__}", *docstring(owner.__doc__), *constructor(owner)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def summary(found: dict[type, Facts]) -> str:
    lines = ["| cell | name | parameters | FLOPs of a step | state | forms |", "|---|---|---|---|---|---|"]
    for cls, fact in found.items():
        link = f"[{cls.__name__}](#{cls.__name__.lower()})"
        numbers = formula(total(fact.parameters)), formula(fact.flops), formula(total(fact.state))
        lines.append(f"| {' | '.join([link, classes()[cls], *numbers, forms(cls)])} |")
    return "\n".join(lines)


def forms(cls: type) -> str:
    return ", ".join(cls.forms) or "those of its cells"


def section(cls: type, fact: Facts) -> list[str]:
    """One cell: what it is, its constructor, its parameters and its cost."""
    rows = [f"| `{name}` | {shown(shape)} |" for name, shape in fact.parameters.items()]
    state = ", ".join(f"`{name}` {shown(shape)}" for name, shape in fact.state.items())
    name = classes()[cls]
    example = "" if name else " (here with LSTMs of width D)"
    return [
        f"### {cls.__name__}",
        *docstring(cls.__doc__),
        *constructor(cls),
        "\n".join(["| parameter | shape |", "|---|---|", *rows]),
        f"- Parameters{example}: {formula(total(fact.parameters))}.\n"
        f"- FLOPs of a step: {formula(fact.flops)}.\n"
        f"- State: {state}; {formula(total(fact.state))} numbers a row.\n"
        f"- Forms: {forms(cls)}." + (f"\n- Name: {name}." if name else ""),
    ]


def constructor(cls: type) -> list[str]:
    """The arguments with their defaults, and what the constructor's docstring says of them."""
    owner, *bases = chain(cls)
    given, star = [], False
    for p in arguments(owner):
        if p.kind is p.KEYWORD_ONLY and not star:
            given, star = [*given, "*"], True
        stars = "**" if p.kind is p.VAR_KEYWORD else ""
        given.append(stars + p.name if p.default is p.empty else f"{p.name}={default(p.default)}")
    name = cls.__name__
    call = textwrap.fill(f"{name}({', '.join(given)})", 100, subsequent_indent=" " * (len(name) + 1))
    parts = [f"```python\n{call}\n```"]
    if not bases and "**options" in call:
        parts.append("`options`: those of the cell that it is mixed with.")
    if bases:
        parts.append(f"`options`: those of [{bases[0].__name__}](#{bases[0].__name__.lower()}).")
    return parts + docstring(vars(owner)["__init__"].__doc__)


def default(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    return value.__name__ if hasattr(value, "__name__") else repr(value)


def docstring(text: str | None) -> list[str]:
    """Markdown of a docstring: paragraphs of prose, and as code what is indented, aligned or begins as an equation."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text or "").strip()):
        first = paragraph.split("\n")[0]
        equation = parts and re.match(r"((?![A-Za-z]{4})[^=])* = ", first)  # no word before it
        code = equation or first.startswith("  ") or re.search(r"\S   ", paragraph)
        parts.append(f"```\n{textwrap.dedent(paragraph)}\n```" if code else prose(paragraph))
        for module in re.findall(r"`kernels\.(\w+)`", paragraph):
            parts += docstring(getattr(kernels, module).__doc__)
    return parts if text else []


def prose(paragraph: str) -> str:
    """Without the characters that Markdown would take for its own, but for what stands in backticks."""
    pieces = re.split(r"(`[^`]*`)", paragraph)
    return "".join(piece if n % 2 else re.sub(r"([~*<])", r"\\\1", piece) for n, piece in enumerate(pieces))


@command.exit_code
def main(argv: list[str]) -> int:
    parser = command.Arguments("cells_page", __doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    text = page()
    if not options.check:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text)
        return 0
    if PAGE.exists() and PAGE.read_text() == text:
        return 0
    return command.fail("docs/cells.md is out of date: run `python -m experiments.cells_page`", 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
