"""Text from a trained language model: python -m experiments.generate --workdir=DIR --prompt="In the beginning"."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import command
from experiments.build import build_model, build_task, resolve
from experiments.train import read_json, use_compilation_cache
from xlstm_jax.checkpoint import Checkpoints
from xlstm_jax.data import tokenizers
from xlstm_jax.generate import generate


def load(workdir: str | Path) -> nnx.Module:
    """The model of a run folder, with the parameters of its newest checkpoint."""
    workdir = Path(workdir).absolute()
    if not workdir.is_dir():
        raise ValueError(f"no such folder: {workdir}")
    if not (workdir / "config.json").is_file():
        raise ValueError(f"{workdir} is no run folder: it holds no config.json")
    plain = resolve(read_json(workdir / "config.json").get("config", {}))
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


def load_tokenizer(workdir: str | Path) -> tokenizers.Tokenizer:
    """The tokeniser of a run folder; bytes where the run had none."""
    folder = Path(workdir) / "tokenizer"
    return tokenizers.load(folder) if folder.exists() else tokenizers.Bytes()


def text(
    model: nnx.Module,
    prompt: str,
    length: int,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    rows: int = 1,
    tokenizer: tokenizers.Tokenizer | None = None,
) -> list[str]:
    """`rows` continuations of the prompt, `length` tokens each (bytes by default); no UTF-8: the replacement sign."""
    if not prompt:
        raise ValueError("the prompt is empty: give at least one character")
    tokenizer = tokenizer or tokenizers.Bytes()
    start = jnp.asarray(tokenizer.encode(prompt))
    tokens = generate(model, jnp.tile(start[None], (rows, 1)), length, jax.random.key(seed), temperature, top_k)
    return [tokenizer.decode(row) for row in np.asarray(tokens)]


@command.exit_code
def main(argv: list[str]) -> int:
    arguments = command.Arguments("generate", __doc__)
    arguments.add_argument("--workdir", type=command.folder, required=True, help="folder of a run of kind lm")
    arguments.add_argument("--prompt", default="In the beginning ", help="text to go on with")
    arguments.add_argument("--length", type=int, default=400, help="tokens: bytes, unless the run has a tokenizer")
    arguments.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest byte")
    arguments.add_argument("--top_k", type=int, default=0, help="choose among the k likeliest; 0: all")
    arguments.add_argument("--seed", type=int, default=0, help="of the draws")
    options = arguments.parse_args(argv)
    use_compilation_cache()
    model = load(options.workdir)
    tokenizer, draws = load_tokenizer(options.workdir), (options.seed, options.temperature, options.top_k)
    (answer,) = text(model, options.prompt, options.length, *draws, tokenizer=tokenizer)
    print(options.prompt + answer)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
