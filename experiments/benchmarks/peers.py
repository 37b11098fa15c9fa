"""The others: which are here, and how each computes a case with the same inputs and, where they can be moved, weights.

A peer is a dictionary of kinds, and a kind a dictionary of builders by label: builder(case, given) -> pass -> Program.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np

from experiments.benchmarks.cases import Case
from experiments.benchmarks.layers import Data
from experiments.benchmarks.timing import Program
from xlstm_jax.names import unknown

Builder = Callable[[Case, Data], Callable[[str], Program]]
MODULES = {  # peer: what it is written in, or the file that says so
    "torch": "experiments.benchmarks.torch_peers",
    "flax": "experiments.benchmarks.flax_peers",
    "nnx": "experiments.benchmarks.flax_peers",
    "keras": "experiments.benchmarks.keras_peers",
    "flashrnn": "experiments.benchmarks.path_peers",
    "xlstm": "experiments.benchmarks.path_peers",
    "mlstm_kernels": "experiments.benchmarks.path_peers",
}
PACKAGE = {"nnx": "flax"}  # where it is not the peer's name
BY_PATH = ("flashrnn", "xlstm", "mlstm_kernels")  # no package of theirs is taken but the one whose folder is given


def add_paths(given: list[str]) -> dict[str, Path]:
    """Each "NAME=DIR" is put on the path of imports."""
    paths = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if name not in BY_PATH:
            raise ValueError(unknown("peer in --peer_path", name, BY_PATH))
        folder = Path(folder).expanduser().absolute()
        if not equals or not (folder / name).is_dir():
            raise ValueError(f"--peer_path={text}: wanted is {name}=DIR with the package's folder DIR/{name} in it")
        paths[name] = folder
        sys.path.insert(0, str(folder))
    return paths


def choose(names: str, paths: dict[str, Path]) -> list[str]:
    """ "auto": all that are installed or whose path is given, "none", or "a,b"."""
    if names == "none":
        return []
    if names == "auto":
        return [name for name in MODULES if installed(name, paths)]
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in MODULES:
            raise ValueError(unknown("peer", name, [*MODULES, "auto", "none"]))
        if not installed(name, paths):
            how = f"--peer_path={name}=DIR" if name in BY_PATH else f"pip install {PACKAGE.get(name, name)}"
            raise ValueError(f"--peers={names}: {name} is not installed ({how})")
    return chosen


def installed(name: str, paths: dict[str, Path]) -> bool:
    """Whether it can be imported; those of NX-AI need torch beside them."""
    if name in BY_PATH:
        return name in paths and importlib.util.find_spec("torch") is not None
    return importlib.util.find_spec(PACKAGE.get(name, name)) is not None


def builders(name: str, kind: str) -> dict[str, Builder]:
    """By label; none where the peer has no such thing. ImportError where the peer's own imports fail."""
    if name == "keras":
        os.environ.setdefault("KERAS_BACKEND", "jax")  # it is read once, when keras is imported
    return importlib.import_module(MODULES[name]).PEERS[name].get(kind, {})


def version(name: str) -> str | None:
    """As installed; None for what was taken from a folder."""
    try:
        return None if name in BY_PATH else metadata.version(PACKAGE.get(name, name))
    except metadata.PackageNotFoundError:
        return None


def lengths_or_full(given: Data) -> np.ndarray:
    """Of each row."""
    B, T = given.inputs[0].shape[:2]
    return np.full(B, T) if given.lengths is None else given.lengths
