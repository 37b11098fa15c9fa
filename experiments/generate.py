"""Text from a trained byte language model: python -m experiments.generate --workdir=DIR --prompt="In the beginning"."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from experiments.train import build_model, build_task, fail, use_compilation_cache
from xlstm_jax.checkpoint import Checkpoints
from xlstm_jax.generate import generate


def load(workdir: str | Path) -> nnx.Module:
    """The model of a run folder, with the parameters of its newest checkpoint."""
    workdir = Path(workdir).absolute()
    if not workdir.is_dir():
        raise ValueError(f"no such folder: {workdir}")
    if not (workdir / "config.json").is_file():
        raise ValueError(f"{workdir} is no run folder: it holds no config.json")
    plain = json.loads((workdir / "config.json").read_text(encoding="utf-8"))["config"]
    if plain["kind"] != "lm":
        raise ValueError(f"{workdir} holds a {plain['kind']}: text comes from a run of kind 'lm' only")
    if not (workdir / "checkpoints").is_dir():
        raise ValueError(f"{workdir} has no checkpoint yet")
    task = build_task(plain)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: build_model(plain, task, 0)))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        step = checkpoints.latest()
        if step is None:
            raise ValueError(f"{workdir} has no checkpoint yet")
        return nnx.merge(graphdef, checkpoints.restore_part(step, "params", shapes))


def text(
    model: nnx.Module, prompt: str, length: int, seed: int = 0, temperature: float = 1.0, top_k: int = 0, rows: int = 1
) -> list[str]:
    """`rows` continuations of the prompt, `length` bytes each; bytes that are no UTF-8 become the replacement sign."""
    if not prompt:
        raise ValueError("the prompt is empty: give at least one character")
    start = jnp.asarray(np.frombuffer(prompt.encode(), np.uint8).astype(np.int32))
    tokens = generate(model, jnp.tile(start[None], (rows, 1)), length, jax.random.key(seed), temperature, top_k)
    return [bytes(row).decode(errors="replace") for row in np.asarray(tokens, np.uint8)]


def main(argv: list[str]) -> int:
    arguments = flags.FlagValues()
    workdir = flags.DEFINE_string("workdir", None, "folder of a run of kind lm", flag_values=arguments)
    prompt = flags.DEFINE_string("prompt", "In the beginning ", "text to go on with", flag_values=arguments)
    length = flags.DEFINE_integer("length", 400, "bytes", flag_values=arguments)
    temperature = flags.DEFINE_float("temperature", 0.8, "0: the likeliest byte", flag_values=arguments)
    top_k = flags.DEFINE_integer("top_k", 0, "choose among the k likeliest; 0: all", flag_values=arguments)
    seed = flags.DEFINE_integer("seed", 0, "of the draws", flag_values=arguments)
    try:
        rest = arguments(argv)[1:]
        if rest:
            raise ValueError(f"unknown argument {rest[0]!r}: write --workdir=... and --prompt=...")
        if not workdir.value:
            raise ValueError("--workdir is missing: --workdir=DIR, the folder of a run")
        use_compilation_cache()
        model = load(workdir.value)
        (answer,) = text(model, prompt.value, length.value, seed.value, temperature.value, top_k.value)
    except (ValueError, OSError, flags.Error) as error:
        return fail(error)
    print(prompt.value + answer)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
