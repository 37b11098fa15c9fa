"""Timing: programs that run in turn, medians with their spread, and what the machine does at most."""

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SAMPLE_SECONDS = 0.005  # a shorter program is run several times for one sample
WARM_SECONDS = 0.1  # a shorter program runs once before a sample: caches and heap are then as in a loop of its own
PAUSE_SECONDS = 0.01  # before each sample: the threads of another library's pool stop spinning
LEAST_SAMPLES = 3


class Program(NamedTuple):
    """What is timed. run: once, to the end; bytes as the compiler counts them, None where nothing counts them."""

    run: Callable[[], Any]
    compile_seconds: float | None = None
    temp_bytes: int | None = None  # peak of what is neither argument nor result
    traffic_bytes: int | None = None  # arguments and results once, temporary arrays written and read
    parameters: int | None = None


class TooLarge(RuntimeError):
    """A program that the memory cannot hold."""


def jax_program(function: Callable, *args: Any, carry: bool = False) -> Program:
    """Compiled ahead of the run; refused where it would not fit.

    carry: the first argument is donated, and the first of the results takes its place for the next run.
    """
    lowered = jax.jit(function, donate_argnums=0 if carry else ()).lower(*args)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory, temp, traffic = compiled.memory_analysis(), None, None
    if memory is not None:
        temp = memory.temp_size_in_bytes
        outside = memory.argument_size_in_bytes + memory.output_size_in_bytes
        traffic = outside + 2 * temp
        check_fits(temp + memory.output_size_in_bytes)
    held = list(args)

    def run():
        results = jax.block_until_ready(compiled(*held))
        if carry:
            held[0] = results[0]
        return results

    return Program(run, seconds, temp, traffic)


def check_fits(needed: int) -> None:
    """TooLarge where less is free."""
    free = free_bytes()
    if free is not None and needed > free:
        raise TooLarge(f"needs {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free")


def free_bytes() -> int | None:
    """Of the device, or of the machine where the device is its processor; None if nobody says."""
    stats = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def interleave(
    programs: dict[str, Program], rounds: int, seconds: float, progress: Callable[[int], None] = lambda n: None
) -> dict[str, list[float] | Exception]:
    """Seconds of each program in each round, all in turn, in another order each round; what it raised if it failed.

    Each has run once before, and runs once more to see how often it must run for one sample.
    A program that has had `seconds` and LEAST_SAMPLES samples is left out of later rounds.
    """
    found: dict[str, list[float] | Exception] = {}
    repeats, warm, random = {}, {}, np.random.default_rng(0)
    for name, program in programs.items():
        try:
            start = time.perf_counter()
            program.run()
            once = time.perf_counter() - start
            repeats[name], found[name] = max(1, int(np.ceil(SAMPLE_SECONDS / max(once, 1e-7)))), []
            warm[name] = once < WARM_SECONDS
        except (RuntimeError, MemoryError) as error:
            found[name] = error
    for number in range(rounds):
        progress(number)
        for name in random.permutation(list(repeats)):
            times, n = found[name], repeats[name]
            if len(times) >= LEAST_SAMPLES and n * sum(times) > seconds:
                continue
            time.sleep(PAUSE_SECONDS)
            if warm[name]:
                programs[name].run()
            start = time.perf_counter()
            for _ in range(n):
                programs[name].run()
            times.append((time.perf_counter() - start) / n)
    return found


def spread(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: median, quartiles, extremes."""
    names = ("lowest", "lower_quartile", "median", "upper_quartile", "highest")
    return {name: float(f"{1e3 * q:.5g}") for name, q in zip(names, np.quantile(seconds, (0, 0.25, 0.5, 0.75, 1)))}


def ratio(ours: list[float], other: list[float]) -> dict[str, float]:
    """Of the medians, and the quartiles of the ratios within a round."""
    pairs = [a / b for a, b in zip(ours, other)]
    low, high = np.quantile(pairs, (0.25, 0.75))
    found = dict(median=np.median(ours) / np.median(other), lower_quartile=low, upper_quartile=high)
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Machine(NamedTuple):
    """The best of some runs: float32 matrix products, operations a second; reading and writing, bytes a second."""

    flops: float
    bandwidth: float


def machine(quick: bool) -> Machine:
    """Measured by a square product and by adding 1 to a large array in place."""
    large = jax.default_backend() != "cpu"
    n = 256 if quick else 8192 if large else 2048
    numbers = (1 << 16) if quick else (1 << 28) if large else (1 << 25)
    a = jnp.full((n, n), 0.5, jnp.float32)
    product = jax_program(jnp.matmul, a, a)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.block_until_ready(add(jnp.zeros(numbers, jnp.float32)))
    product.run()
    products, copies = [], []
    for _ in range(2 if quick else 7):
        start = time.perf_counter()
        product.run()
        products.append(time.perf_counter() - start)
        start = time.perf_counter()
        x = jax.block_until_ready(add(x))
        copies.append(time.perf_counter() - start)
    return Machine(2 * n**3 / min(products), 8 * numbers / min(copies))
