"""One line about a name that does not exist, or that cannot be used."""

import difflib
import glob
import re
from collections.abc import Iterable
from pathlib import Path


def unknown(what: str, name: object, valid: Iterable[str]) -> str:
    """ "unknown cell 'lsmt'; nearest: lstm, slstm", or all valid names where none is near."""
    valid = {right.lower(): right for right in valid}
    nearest = [valid[match] for match in difflib.get_close_matches(str(name).lower(), valid, n=3)]
    return f"unknown {what} {name!r}; " + (
        f"nearest: {', '.join(nearest)}" if nearest else f"valid: {', '.join(valid.values())}"
    )


def check_run_folder(folder: Path) -> None:
    """ValueError where orbax would take the path for a pattern: it writes checkpoints there that it does not find.

    Also where it is the address of a bucket: as a path it is a folder `gs:` beside the code.
    """
    if address := re.match(r"([A-Za-z][\w+.-]+):/+(.*)", str(folder)):  # Path has made one "/" of "//"
        scheme, rest = address.groups()
        raise ValueError(f"{scheme}://{rest} is not a folder: name the one where it is mounted, such as /mnt/{rest}")
    if glob.has_magic(str(folder.absolute())):
        raise ValueError(f"{folder.absolute()}: checkpoints cannot be kept under a name with '[', '*' or '?'")
