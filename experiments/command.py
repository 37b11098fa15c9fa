"""What the command lines share: how arguments are read, and one line with an exit code for whatever is wrong."""

import argparse
import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from xlstm_jax.names import check_run_folder


class Arguments(argparse.ArgumentParser):
    """A parser whose complaints are a ValueError, one line as all others."""

    def __init__(self, name: str, doc: str):
        layout = argparse.RawDescriptionHelpFormatter  # the docstring as it stands
        super().__init__(prog=f"experiments.{name}", description=doc, formatter_class=layout, allow_abbrev=False)

    def error(self, message: str):
        raise ValueError(message)

    def with_overrides(self, argv: list[str]) -> argparse.Namespace:
        """The arguments; `overrides` holds every --config.a.b=v as "a.b=v"."""
        options, rest = self.parse_known_args(argv)
        for word in rest:
            if not word.startswith("--config."):
                raise ValueError(
                    f"unknown argument {word!r}: write --name=value, or --config.a.b=v for a config's field"
                )
        options.overrides = [word.removeprefix("--config.") for word in rest]
        return options


def folder(text: str) -> Path:
    """The value of --workdir."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: name a folder")
    return Path(text)


def run_folder(text: str) -> Path:
    """The value of --workdir where checkpoints are written."""
    try:
        check_run_folder(folder(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def fail(message: object, code: int = 2) -> int:
    """Say what was wrong in one line on stderr; returns the exit code."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def exit_code(main: Callable[..., int]) -> Callable[..., int]:
    """Wraps a main: a wrong argument, config, file or folder ends in one line and 2, control-C in 130."""

    @functools.wraps(main)
    def wrapped(*args, **options) -> int:
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs what it raises too: the one line says it
        try:
            return main(*args, **options)
        except OSError as error:
            return fail(f"{error.filename}: {error.strerror}" if error.filename else error)
        except ValueError as error:
            return fail(error)
        except KeyboardInterrupt:
            return fail("interrupted; the same command goes on", 130)

    return wrapped
