"""Who takes part in a case: our forms, the bound, and the peers that have such a thing."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks import layers, peers
from experiments.benchmarks.cases import Case
from experiments.benchmarks.record import BOUND, OURS, PRODUCTS
from experiments.benchmarks.timing import Program


class Contender(NamedTuple):
    """build(pass) makes what is timed; outputs(result) is what all should agree on, or None."""

    library: str
    label: str
    build: Callable[[str], Program]
    outputs: Callable[[Any], np.ndarray] | None = None


def contenders(suite: str, case: Case, names: list[str]) -> Iterator[Contender]:
    """Ours first; the peers' imports happen here."""
    given = layers.data(case)
    shape = given.cotangent.shape
    valid = True if given.lengths is None else np.arange(shape[1])[None, :, None] < given.lengths[:, None, None]

    def outputs(result):
        ys = result[0] if isinstance(result, tuple) else result
        ys = np.asarray(ys.cpu() if hasattr(ys, "cpu") else ys)
        return (ys if ys.shape == shape else np.moveaxis(ys, 1, 2)) * valid

    def ours(options, pass_):
        return layers.program(layers.layer(case, options, given), pass_, given.cotangent)

    for form, options in layers.forms(case).items():
        yield Contender(OURS, form, partial(ours, options), outputs)
    yield Contender(BOUND, PRODUCTS, lambda pass_: layers.products(case, pass_, given))
    for name in names:
        try:
            found = peers.builders(name, case.kind)
        except ImportError as error:
            found = {name: partial(raising, error)}
        for label, builder in found.items():
            yield Contender(name, label, lambda pass_, builder=builder: builder(case, given)(pass_), outputs)


def raising(error: Exception, *_) -> None:
    """In the place of a builder that cannot be had."""
    raise error


def check(suite: str, case: Case) -> dict[str, dict[str, Any]]:
    """The gradient check of each of our forms."""
    return layers.check(case)


def operations(suite: str, case: Case, pass_: str) -> float | None:
    """Of the matrix products."""
    return layers.flops(case, pass_)
