"""The others: which are here, and how each computes a case with the same inputs and, where they can be moved, weights.

A peer is a dictionary of kinds, and a kind a dictionary of builders by label: builder(case, given) -> pass -> Program.
"""

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import jax

from experiments.benchmarks import timing
from experiments.benchmarks.cases import Case
from experiments.benchmarks.layers import Data
from experiments.benchmarks.timing import Program
from xlstm_jax.names import unknown

Builder = Callable[[Case, Data], Callable[[str], Program]]
MODULES = {  # peer: the files that hold what it has
    "torch": ("torch_peers",),
    "flax": ("flax_peers",),
    "nnx": ("flax_peers",),
    "keras": ("keras_peers",),
    "flashrnn": ("path_peers",),
    "xlstm": ("path_peers",),
    "mlstm_kernels": ("path_peers", "path_jax_peers"),
    "xlstm-jax": ("path_jax_peers",),
}
IN_TORCH = ("torch_peers", "path_peers")  # timed with all threads and with one: the faster counts
PACKAGE = {"nnx": "flax", "xlstm-jax": "xlstm_jax"}  # where it is not the peer's name
BY_PATH = ("flashrnn", "xlstm", "mlstm_kernels", "xlstm-jax")  # taken from a folder that is given, and only from there
FOLDERS: dict[str, Path] = {}  # of those


def add_paths(given: list[str]) -> None:
    """Remember each "NAME=DIR", and let packages be imported from it but the one that is called as ours is."""
    for text in given:
        name, equals, folder = text.partition("=")
        if name not in BY_PATH:
            raise ValueError(unknown("peer in --peer_path", name, BY_PATH))
        folder, package = Path(folder).expanduser().absolute(), PACKAGE.get(name, name)
        if not equals or not (folder / package).is_dir():
            raise ValueError(f"--peer_path={text}: wanted is {name}=DIR with the package's folder DIR/{package} in it")
        FOLDERS[name] = folder
        if name != "xlstm-jax" and str(folder) not in sys.path:
            sys.path.insert(0, str(folder))


def choose(names: str) -> list[str]:
    """ "auto": all that are installed or whose path is given, "none", or "a,b"."""
    if names == "none":
        return []
    if names == "auto":
        return [name for name in MODULES if installed(name)]
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in MODULES:
            raise ValueError(unknown("peer", name, [*MODULES, "auto", "none"]))
        if not installed(name):
            how = f"--peer_path={name}=DIR" if name in BY_PATH else f"pip install {PACKAGE.get(name, name)}"
            raise ValueError(f"--peers={names}: {name} is not installed ({how})")
    return chosen


def installed(name: str) -> bool:
    """Whether it can be imported; most of NX-AI's need torch beside them, which is said where it is missing."""
    if name in BY_PATH:
        return name in FOLDERS
    return importlib.util.find_spec(PACKAGE.get(name, name)) is not None


def builders(name: str, kind: str) -> dict[str, Builder]:
    """By label; none where the peer has no such thing. Where its imports fail, building says so."""
    if name == "keras":
        os.environ.setdefault("KERAS_BACKEND", "jax")  # it is read once, when keras is imported
    found = {}
    for file in MODULES[name]:
        try:
            here = importlib.import_module(f"experiments.benchmarks.{file}").PEERS[name].get(kind, {})
        except ImportError as error:
            here = {name: functools.partial(raising, error)}
        found |= here
        if file in IN_TORCH and timing.cores() > 1 and jax.default_backend() == "cpu":
            found |= {f"{label}, 1 thread": functools.partial(one_thread, each) for label, each in here.items()}
    return found


def one_thread(builder: Builder, case: Case, given: Data) -> Callable[[str], Program]:
    """The same with one thread: many small operations one after another are slower on several."""
    import torch

    build = builder(case, given)

    def with_one(pass_):
        program = build(pass_)

        def run():
            torch.set_num_threads(1)
            try:
                return program.run()
            finally:
                torch.set_num_threads(timing.cores())

        return program._replace(run=run)

    return with_one


def raising(error: ImportError, *_: object) -> None:
    """In the place of a builder that cannot be had."""
    raise error


def version(name: str) -> str | None:
    """As installed; None for what was taken from a folder."""
    try:
        return None if name in BY_PATH else metadata.version(PACKAGE.get(name, name))
    except metadata.PackageNotFoundError:
        return None
