"""The collectives of a compiled program, read off its HLO: how often each runs, its bytes, and in which loop."""

import math
import re
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
CROSSING = {"ONE_TO_ONE": "collective-permute"}
BITS = {"pred": 8, "bf16": 16, "f16": 16, "token": 0}
TIME = re.compile(r"(^|[/(])time([/)]|$)")  # the scope that the loops over time are traced under


class Collective(NamedTuple):
    """One instruction: how many times a call of the program runs it, and what it moves each time."""

    kind: str
    count: int
    bytes: int  # of its result on one device (of its operand, where a reduce-scatter's is the larger)
    group: int  # devices that take part together
    in_time_loop: bool
    crosses_slices: bool


def collectives(text: str, slice_size: int | None = None, slices: int = 1) -> list[Collective]:
    """Every collective of the program; a loop's body counts as often as its condition says.

    slice_size: devices of one slice, to tell what crosses between slices; slices: how many there are.
    """
    computations = _computations(text)
    everyone = re.search(r"num_partitions=(\d+)", text)
    everyone = int(everyone[1]) if everyone else 1
    found, seen = [], set()

    def walk(name: str, times: int, in_time: bool) -> None:
        for line in computations.get(name, ()):
            kind = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
            if kind:
                channel = re.search(r"channel_id=(\d+)", line)
                key = (channel[1] if channel else line, times, in_time)
                if key not in seen:  # a fused asynchronous one is written in several places
                    seen.add(key)
                    group, crosses = _group(line, slice_size, everyone)
                    # a TPU's reduce-scatter is an all-reduce and a slice in a computation of that name
                    what = "reduce-scatter" if "all-reduce-scatter" in name else kind[2]
                    size = _bytes(kind[1], kind[2], bool(kind[3]), group)
                    found.append(Collective(what, times, size, group, in_time, crosses))
            crossing = re.search(r"= \((\w+\[[\d,]*\]).* send\(.*_xla_megascale_transfer_type=\"(\w+)\"", line)
            if crossing:  # between slices the hosts send; the program is one slice's
                what = CROSSING.get(crossing[2]) or crossing[2].lower().replace("_", "-")
                size = _bytes(crossing[1], what, False, slices) * (slices if what == "all-gather" else 1)
                found.append(Collective(what, times, size, slices, in_time, True))
            loop = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
            if loop:
                scope = re.search(r'op_name="([^"]*)"', line)
                inside = in_time or bool(scope and TIME.search(scope[1]))
                walk(loop[2], times * _trips(line, computations.get(loop[1], ())), inside)
                continue
            for called in re.findall(r"(?:calls|to_apply|branch_computations)=\{?%?([\w.\-]+)", line):
                walk(called, times, in_time)

    walk(computations["ENTRY"], 1, False)
    return found


def _computations(text: str) -> dict:
    """{name: its lines}, and the entry's name under ENTRY."""
    computations, lines = {}, []
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head and not line.startswith(" "):
            computations[head[2]] = lines = []
            if head[1]:
                computations["ENTRY"] = head[2]
        else:
            lines.append(line)
    return computations


def _trips(line: str, condition: list[str]) -> int:
    """As the compiler says, else the largest number that the condition compares with."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    return max((int(n) for line in condition for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", line)), default=1)


def _bytes(result: str, kind: str, start: bool, group: int) -> int:
    """Of the arrays in a result's type; without the operands that the result of an asynchronous start holds too."""
    sizes = []
    for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
        bits = BITS.get(dtype) or int((re.search(r"\d+", dtype) or ["32"])[0])
        sizes.append(math.prod(int(n) for n in shape.split(",") if n) * bits // 8)
    total = sum(sizes)
    if start and kind == "all-gather":
        return total * group // (group + 1)
    if start and kind in ("collective-permute", "all-to-all"):
        return total // 2
    return total * group if kind == "reduce-scatter" else total


def _group(line: str, slice_size: int | None, everyone: int) -> tuple[int, bool]:
    """Devices in one group, and whether a group holds devices of two slices; an empty list of groups is everyone."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line) or re.search(r"source_target_pairs=\{\{([\d,]+)\}", line)
    if listed:
        members = [int(n) for n in listed[1].split(",")]
        crosses = slice_size is not None and len({m // slice_size for m in members}) > 1
        return len(members), crosses
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if named:  # mesh['a'=2,'b'=4] {'b'}: devices count along the axes in that order, the last one fastest
        lengths = {axis: int(length) for axis, length in re.findall(r"'(\w+)'=(\d+)", named[1])}
        taken = {axis: int(part or lengths[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])}
        strides = {axis: math.prod(list(lengths.values())[n + 1 :]) for n, axis in enumerate(lengths)}
        reach = sum(strides[axis] * (lengths[axis] - 1) for axis in taken)
        return math.prod(taken.values()), slice_size is not None and reach >= slice_size
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if not iota:
        return everyone, slice_size is not None and everyone > slice_size
    groups, size = int(iota[1]), int(iota[2])
    ids = np.arange(groups * size).reshape([int(n) for n in iota[3].split(",")])
    if iota[4]:
        ids = ids.transpose([int(n) for n in iota[4].split(",")])
    first = ids.reshape(groups, size)[0]
    return size, slice_size is not None and len({int(m) // slice_size for m in first}) > 1
