"""Tasks by name: `make("parity", train_lengths=(3, 40))`."""

import dataclasses
from typing import Any

from xlstm_jax.names import unknown
from xlstm_jax.tasks import brackets, chomsky, chomsky_numbers, majority, permutations, strings
from xlstm_jax.tasks.adding import Adding
from xlstm_jax.tasks.associative_recall import AssociativeRecall
from xlstm_jax.tasks.byte_lm import ByteLM
from xlstm_jax.tasks.copying import CopyMemory, SelectiveCopying
from xlstm_jax.tasks.cycle_navigation import CycleNavigation
from xlstm_jax.tasks.even_pairs import EvenPairs
from xlstm_jax.tasks.labelled import Labelled
from xlstm_jax.tasks.listops import ListOps
from xlstm_jax.tasks.modular_arithmetic import ModularArithmetic
from xlstm_jax.tasks.music import Music
from xlstm_jax.tasks.nearest_neighbour import NearestNeighbour
from xlstm_jax.tasks.parity import Parity
from xlstm_jax.tasks.pixels import Pixels
from xlstm_jax.tasks.stack_manipulation import StackManipulation
from xlstm_jax.tasks.task import SPLITS, Batch, check
from xlstm_jax.tasks.text_lm import TextLM
from xlstm_jax.tasks.token_windows import TokenWindows

__all__ = ["SPLITS", "TASKS", "Batch", "check", "make"]

FORMAL = (  # the 15 formal languages of the xLSTM paper; those of Deletang et al.; state tracking
    *(Parity, EvenPairs, CycleNavigation, ModularArithmetic),
    *(brackets.ModularArithmeticBrackets, brackets.SolveEquation, StackManipulation),
    *(strings.BucketSort, strings.MissingDuplicate, strings.OddsFirst, strings.Repetition, strings.ReverseString),
    *(strings.Set, majority.Majority, majority.MajorityCount),
    *(chomsky.ParityCheck, chomsky.ChomskyEvenPairs, chomsky.ChomskyCycleNavigation, chomsky.ChomskyModularArithmetic),
    *(chomsky.ChomskyModularArithmeticBrackets, chomsky.ChomskySolveEquation, chomsky.ChomskyStackManipulation),
    *(chomsky.ChomskyReverseString, chomsky.DuplicateString, chomsky.ChomskyOddsFirst),
    *(chomsky.ChomskyMissingDuplicate, chomsky.ChomskyBucketSort, chomsky_numbers.BinaryAddition),
    *(chomsky_numbers.BinaryMultiplication, chomsky_numbers.ComputeSqrt),
    *(permutations.S3, permutations.A5, permutations.S5),
)

TASKS = {task.name: task for task in FORMAL} | {
    "byte_lm": ByteLM,
    "text_lm": TextLM,
    "token_windows": TokenWindows,
    "music": Music,
    "associative_recall": AssociativeRecall,
    "adding": Adding,
    "copy_memory": CopyMemory,
    "selective_copying": SelectiveCopying,
    "nearest_neighbour": NearestNeighbour,
    "listops": ListOps,
    "pixels": Pixels,
    "labelled": Labelled,
}


def make(name: str, **options: Any) -> Any:
    """The task called `name`; options are the fields of its class."""
    if name not in TASKS:
        raise ValueError(unknown("task", name, TASKS))
    defaults = {field.name: field.default for field in dataclasses.fields(TASKS[name]) if field.init}
    options = {option: tuple(value) if isinstance(value, list) else value for option, value in options.items()}
    for option, value in options.items():
        if option not in defaults:
            raise ValueError(unknown(f"option of task {name}", option, defaults))
        if type(value) is int and type(defaults[option]) is float:
            options[option] = value = float(value)
        if not _same_type(value, defaults[option]):
            raise ValueError(f"task {name}: {option} must be of the kind of {defaults[option]!r}, not {value!r}")
    return TASKS[name](**options)


def _same_type(value, default):
    """True where a value has the type of the default, for tuples item by item."""
    if type(default) is tuple:
        return type(value) is tuple and len(value) == len(default) and all(map(_same_type, value, default))
    return type(value) is type(default)
