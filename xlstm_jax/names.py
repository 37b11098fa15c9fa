"""One line about a name that does not exist."""

import difflib
from collections.abc import Iterable


def unknown(what: str, name: object, valid: Iterable[str]) -> str:
    """ "unknown cell 'lsmt'; nearest: lstm, slstm", or all valid names where none is near."""
    valid = {right.lower(): right for right in valid}
    nearest = [valid[match] for match in difflib.get_close_matches(str(name).lower(), valid, n=3)]
    return f"unknown {what} {name!r}; " + (
        f"nearest: {', '.join(nearest)}" if nearest else f"valid: {', '.join(valid.values())}"
    )
