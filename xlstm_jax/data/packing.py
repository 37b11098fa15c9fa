"""Packing: ragged sequences to rows of one length, end to end, and back.

    packed = pack(sequences, 1024, algorithm="best_fit")
    ys, state = cell(packed.tokens, mask=packed.mask, reset=packed.reset)       # each sequence as if alone
    outputs = unpack(ys, packed)                                                # a list, in the order of `sequences`

Both algorithms take the sequences in the order given: "first_fit" puts each into the first row with room for it,
"best_fit" into the fullest such row. Segment ids follow grain and jax: 0 is padding, a row's sequences are 1, 2, ...
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from numbers import Real
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Bool, Int, Int32, Shaped

from ..names import unknown


class Packed(NamedTuple):
    """Rows of sequences, padded at the end, and where each sequence is."""

    tokens: Shaped[np.ndarray, "R T ..."]  # token ids or feature rows, in the sequences' dtype
    segment_ids: Int32[np.ndarray, "R T"]  # 0: padding; 1, 2, ... along each row
    positions: Int32[np.ndarray, "R T"]  # from 0 in each sequence, 0 in padding
    reset: Bool[np.ndarray, "R T"]  # True at each sequence's first step
    places: Int[np.ndarray, "S 2"]  # of each sequence: its first step, counted through all rows, and its length

    @property
    def mask(self) -> Bool[np.ndarray, "R T"]:
        """True where there is a sequence, False in padding."""
        return self.segment_ids > 0


def pack(
    sequences: Iterable[ArrayLike | Sequence], length: int, *, algorithm: str = "first_fit", pad: int | float = 0
) -> Packed:
    """Packs sequences (T,) or (T, ...) of at most `length` steps; one of length 0 takes no place, but comes back."""
    if not isinstance(length, int | np.integer) or isinstance(length, bool) or length < 1:
        raise ValueError(f"length must be an integer of at least 1, not {length!r}")
    if algorithm not in ALGORITHMS:
        raise ValueError(unknown("packing algorithm", algorithm, ALGORITHMS))
    arrays = alike(sequences)
    dtype, features = arrays[0].dtype, arrays[0].shape[1:]
    check_pad(pad, dtype)
    lengths = np.array([len(a) for a in arrays])
    if lengths.max() > length:
        n = int(np.argmax(lengths > length))
        raise ValueError(
            f"sequence {n} has {lengths[n]} steps, more than length={length}: split it or take longer rows"
        )

    rows, starts, segments = place(lengths, ALGORITHMS[algorithm], length)
    size, steps = length * rows, np.arange(lengths.max(), dtype=np.int32)
    tokens = np.full((size, *features), pad, dtype)
    segment_ids, positions, reset = np.zeros(size, np.int32), np.zeros(size, np.int32), np.zeros(size, bool)
    for array, start, segment in zip(arrays, starts.tolist(), segments.tolist()):
        own = slice(start, start + len(array))
        tokens[own], segment_ids[own], positions[own] = array, segment, steps[: len(array)]
    reset[starts[lengths > 0]] = True
    tokens = tokens.reshape(rows, length, *features)
    flags = (a.reshape(rows, length) for a in (segment_ids, positions, reset))
    return Packed(tokens, *flags, np.stack([starts, lengths], axis=1))


def unpack(outputs: ArrayLike, packed: Packed) -> list[np.ndarray]:
    """What a model made of each sequence: outputs (R, T, ...) to a list of (length, ...), in the order given.

    NumPy arrays, views of one copy on the host; a loss under `jax.jit` counts the packed rows instead, by their mask.
    """
    outputs = np.asarray(outputs)
    if outputs.shape[:2] != packed.segment_ids.shape:
        raise ValueError(f"outputs must begin with the packed shape {packed.segment_ids.shape}, not {outputs.shape}")
    flat = outputs.reshape(packed.segment_ids.size, *outputs.shape[2:])
    return [flat[start : start + length] for start, length in packed.places.tolist()]


def reset_from_segments(segment_ids: ArrayLike) -> Bool[np.ndarray, "B T"]:
    """The reset flags of segment ids (B, T) made elsewhere; their mask is `segment_ids > 0`.

    Along a row the ids must not decrease, a new sequence has a larger id, and 0, padding, is only at the end:
    1 1 2 2 2 0 begins at steps 0 and 2. A row's first sequence begins anew; it does not go on from another row.
    """
    ids = np.asarray(segment_ids)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"segment_ids must be integers (B, T), not {ids.dtype} {ids.shape}")
    before, after = ids[:, :-1], ids[:, 1:]
    refuse(ids, ids < 0, "is negative: 0 is padding, a sequence has a positive id")
    refuse(after, (before == 0) & (after > 0), "follows padding (0), which may stand at a row's end only", shift=1)
    refuse(after, (after < before) & (after > 0), "is less than the id before it: ids must not decrease", shift=1)
    return (ids > 0) & (np.diff(ids, axis=1, prepend=0) != 0)


def refuse(ids: Int[np.ndarray, "B T"], wrong: Bool[np.ndarray, "B T"], why: str, shift: int = 0) -> None:
    """Names the first wrong id; `ids` begin at position `shift` of their rows."""
    if wrong.any():
        row, position = np.argwhere(wrong)[0]
        raise ValueError(f"segment_ids: row {row}, position {position + shift}: {ids[row, position]} {why}")


def alike(sequences: Any) -> list[np.ndarray]:
    """The sequences as arrays of one dtype and one shape after the time axis; a bare [] takes those of the others."""
    if not isinstance(sequences, Iterable) or isinstance(sequences, str | bytes):
        raise ValueError(f"sequences is a {type(sequences).__name__}: a list of sequences (T,) or (T, ...) is needed")
    given = list(sequences)
    if not given:
        raise ValueError("there is no sequence to pack: at least one is needed, of any length")
    arrays = [None if isinstance(s, list | tuple) and not s else as_array(n, s) for n, s in enumerate(given)]
    first = next((a for a in arrays if a is not None), np.zeros(0, np.int32))
    arrays = [first[:0] if a is None else a for a in arrays]
    for n, a in enumerate(arrays):
        if a.ndim == 0:
            raise ValueError(f"sequence {n} is a single number: a sequence has the shape (T,) or (T, ...)")
        if a.dtype != first.dtype or a.shape[1:] != first.shape[1:]:
            kind, wanted = (f"{b.dtype} {('T', *b.shape[1:])}".replace("'", "") for b in (a, first))
            raise ValueError(f"sequence {n} is {kind}, the first one {wanted}: all must be alike")
    return arrays


def as_array(n: int, sequence: Any) -> np.ndarray:
    """Sequence n, of numbers."""
    try:
        array = np.asarray(sequence)
    except ValueError:
        raise ValueError(f"sequence {n} is ragged: all its steps must have one shape") from None
    if not jnp.issubdtype(array.dtype, np.number) and array.dtype != bool:
        raise ValueError(f"sequence {n} is {array.dtype if array.ndim else repr(sequence)}: numbers are needed")
    return array


def check_pad(pad: Any, dtype: np.dtype) -> None:
    """A number, which NumPy would not round or wrap."""
    if not isinstance(pad, Real):
        raise ValueError(f"pad={pad!r} is no number")
    if np.issubdtype(dtype, np.integer):
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        if not (low <= pad <= high and pad == int(pad)):
            raise ValueError(f"pad={pad} is no {dtype}, the dtype of the sequences")


def place(lengths: Int[np.ndarray, " S"], fit, length: int) -> tuple[int, Int[np.ndarray, " S"], Int[np.ndarray, " S"]]:
    """Number of rows, and of each sequence its first step, counted through all rows, and its segment id."""
    starts, segments = np.zeros_like(lengths), np.zeros_like(lengths)
    (real,) = np.nonzero(lengths)
    if not real.size:
        return 0, starts, segments
    row = np.array(fit(lengths[real].tolist(), length))
    order = np.argsort(row, kind="stable")  # by row, then in the order given
    row, real = row[order], real[order]
    filled = np.cumsum(lengths[real]) - lengths[real]  # steps before each sequence, in all rows and without padding
    (first,) = np.nonzero(np.diff(row, prepend=-1))  # the first sequence of each row
    starts[real] = row * length + filled - filled[first][row]
    segments[real] = np.arange(len(row)) - first[row] + 1
    return len(first), starts, segments


def first_fit(lengths: Sequence[int], length: int) -> list[int]:
    """The row of each sequence: the first with room. O(log S) each, by a tree of the most room below each node."""
    leaves = 1 << (len(lengths) - 1).bit_length()  # one a row, at most one row a sequence
    room = [length] * (2 * leaves)  # node n has the children 2n and 2n + 1
    rows = []
    for need in lengths:
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < need:
                node += 1
        rows.append(node - leaves)
        room[node] -= need
        while node > 1:
            most = max(room[node], room[node ^ 1])
            node //= 2
            if room[node] == most:
                break
            room[node] = most
    return rows


def best_fit(lengths: Sequence[int], length: int) -> list[int]:
    """The row of each sequence: the fullest with room, of equals the first. One heap of rows a remaining room."""
    heaps = defaultdict(list)
    rooms = 0  # bit r is set where some row has r steps left
    rows, opened = [], 0
    for need in lengths:
        fitting = rooms >> need
        if fitting:
            room = need + (fitting & -fitting).bit_length() - 1  # the lowest set bit
            row = heappop(heaps[room])
            if not heaps[room]:
                rooms ^= 1 << room
        else:
            row, room, opened = opened, length, opened + 1
        rows.append(row)
        if room > need:
            heappush(heaps[room - need], row)
            rooms |= 1 << (room - need)
    return rows


ALGORITHMS = {"first_fit": first_fit, "best_fit": best_fit}
