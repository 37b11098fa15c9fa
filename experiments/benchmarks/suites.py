"""Who takes part in a case: our forms, the bound, and the peers that have such a thing."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks import bounds, layers, peers, whole
from experiments.benchmarks.cases import Case
from experiments.benchmarks.layers import Data
from experiments.benchmarks.record import BOUND, LOOP, OURS, PRODUCTS
from experiments.benchmarks.timing import Program


class Contender(NamedTuple):
    """build(pass) makes what is timed; outputs(result) is what all should agree on, or None."""

    library: str
    label: str
    build: Callable[[str], Program]
    outputs: Callable[[Any], np.ndarray] | None = None


def contenders(case: Case, names: list[str]) -> Iterator[Contender]:
    """Ours first; the peers' imports happen here."""
    given, outputs = None, None
    if case.kind in layers.KINDS:
        given = layers.data(case)
        outputs = partial(layer_outputs, given)
        for form, options in layers.forms(case).items():
            yield Contender(OURS, form, partial(layer_program, case, options, given), outputs)
        yield Contender(BOUND, PRODUCTS, lambda pass_: layers.products(case, pass_, given), None)
        if case.kind not in ("mlstm", "convlstm"):
            yield Contender(BOUND, LOOP, lambda pass_: layers.loop(case, pass_, given), None)
    else:
        logits = (lambda result: np.asarray(result[0])) if case.kind == "prefill" else None
        for form, build in whole.forms(case).items():
            yield Contender(OURS, form, build, logits)
        yield Contender(BOUND, PRODUCTS, partial(bounds.program, case), None)
    for name in names:
        for label, builder in peers.builders(name, case.kind).items():
            yield Contender(name, label, lambda pass_, builder=builder: builder(case, given)(pass_), outputs)


def layer_program(case: Case, options: dict[str, Any], given: Data, pass_: str) -> Program:
    """One of our forms."""
    return layers.program(layers.layer(case, options, given), pass_, given.cotangent)


def layer_outputs(given: Data, result: Any) -> np.ndarray:
    """The outputs in a program's results, on any device, zero past the lengths."""
    ys = result[0] if isinstance(result, tuple) else result
    ys = np.asarray(ys.cpu() if hasattr(ys, "cpu") else ys)
    return ys if given.lengths is None else ys * (np.arange(ys.shape[1])[None, :, None] < given.lengths[:, None, None])


def check(case: Case) -> dict[str, dict[str, Any]]:
    """The gradient check of each of our forms."""
    return layers.check(case) if case.kind in layers.KINDS else whole.check(case)


def operations(case: Case, pass_: str) -> float:
    """Of the matrix products."""
    return layers.flops(case, pass_) if case.kind in layers.KINDS else bounds.operations(case)
