"""Text from a trained language model: python -m experiments.generate --workdir=DIR --prompt="In the beginning"

--workdir=DIR              a run of kind lm; its tokenizer is the run's
--checkpoint=PATH          published weights instead (xlstm_jax/convert), with the tokenizer.json of that folder
--tokenizer=NAME           bytes, file:PATH or the folder of a saved tokenizer, for --checkpoint
--prompt=TEXT | --prompt_file=FILE
--length=400 --num=1       tokens a continuation (bytes, without a tokenizer), and continuations
--stop=TEXT                end before this text (several are possible); a tokenizer's end token always ends
--temperature=0.8 --top_k --top_p --min_p --repetition_penalty    as in xlstm_jax.generate.Sampling; --seed of the draws
--beams=4 --length_penalty=1       beam search instead of drawing
--stream                   show the text as it comes
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from experiments import command
from experiments.build import build_model, build_task, resolve
from experiments.train import read_json, use_compilation_cache
from xlstm_jax import convert
from xlstm_jax.checkpoint import Checkpoints
from xlstm_jax.data import tokenizers
from xlstm_jax.generate import PLAIN, Sampling
from xlstm_jax.models import LM
from xlstm_jax.text import best, check_vocabulary, continuations, settled

STREAM_BLOCK = 8  # tokens that appear at once
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class Run(NamedTuple):
    """A run folder: its resolved config, its task and its model with the newest intact checkpoint's parameters."""

    plain: dict[str, Any]
    task: Any
    model: nnx.Module


def load_run(workdir: str | Path, **options: Any) -> Run:
    """What a run folder holds; options: of the model, over the config's, where no parameter depends on them."""
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
    plain["model"] |= options
    task = build_task(plain)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: build_model(plain, task, 0)))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        step = checkpoints.newest_intact()
        if step is None:
            raise ValueError(f"{workdir} has no checkpoint yet")
        for warning in checkpoints.warnings:
            print(warning, file=sys.stderr)
        part = "best.params" if plain["keep_best"] else "average" if plain["ema"] else "params"
        return Run(
            plain,
            task,
            nnx.merge(graphdef, checkpoints.restore_part(step, part, shapes)),
        )


def load(workdir: str | Path) -> nnx.Module:
    """The model of a run folder, with the parameters that its newest intact checkpoint is evaluated with."""
    return load_run(workdir).model


def load_tokenizer(workdir: str | Path) -> tokenizers.Tokenizer:
    """The tokeniser of a run folder; bytes where the run had none."""
    folder = Path(workdir) / "tokenizer"
    return tokenizers.load(folder) if folder.exists() else tokenizers.Bytes()


def load_published(path: str | Path, tokenizer: str | None = None) -> tuple[LM, tokenizers.Tokenizer]:
    """The language model of published weights, and the tokeniser of that name, or of the tokenizer.json beside them."""
    beside = (Path(path) if Path(path).is_dir() else Path(path).parent) / "tokenizer.json"
    if tokenizer is None and not beside.is_file():
        raise ValueError(f"{path} has no tokenizer.json beside its weights: give --tokenizer=bytes or file:PATH")
    if tokenizer is None:
        coder = tokenizers.make(f"file:{beside}")
    elif Path(tokenizer, "about.json").is_file():
        coder = tokenizers.load(tokenizer)
    elif tokenizers.is_trained(tokenizer):
        raise ValueError(f"--tokenizer={tokenizer} needs training text: give bytes, file:PATH or a saved one's folder")
    else:
        coder = tokenizers.make(tokenizer)
    model, _ = convert.load_pretrained(path)
    if not isinstance(model, LM):
        raise ValueError(f"{path} holds blocks without a vocabulary: text needs a language model")
    return model, coder


def chosen(options: Any) -> tuple[LM, tokenizers.Tokenizer]:
    """The model and the tokeniser of --workdir or --checkpoint and --tokenizer."""
    if (options.workdir is None) == (options.checkpoint is None):
        raise ValueError("one of --workdir (a run) and --checkpoint (published weights) is required")
    if options.workdir is not None:
        if options.tokenizer is not None:
            raise ValueError("--tokenizer goes with --checkpoint; a run has its own")
        model, tokenizer = load(options.workdir), load_tokenizer(options.workdir)
    else:
        model, tokenizer = load_published(options.checkpoint, options.tokenizer)
    check_vocabulary(model, tokenizer)
    return model, tokenizer


def text(
    model: nnx.Module,
    prompt: str | bytes,
    length: int,
    seed: int = 0,
    sampling: Sampling = PLAIN,
    rows: int = 1,
    tokenizer: tokenizers.Tokenizer | None = None,
    stop: Sequence[str] = (),
) -> list[str]:
    """`rows` continuations of the prompt, `length` tokens each (bytes by default); no UTF-8: the replacement sign."""
    tokenizer, key = tokenizer or tokenizers.Bytes(), jax.random.key(seed)
    *_, last = continuations(model, tokenizer, [prompt] * rows, length, key, sampling, stop=stop)
    return last


def show(texts: Iterator[list[str]], stop: Sequence[str]) -> None:
    """Print the one continuation as it comes."""
    shown, whole = "", ""
    for (whole,) in texts:
        new = settled(whole, stop)
        if len(new) > len(shown):
            print(new[len(shown) :], end="", flush=True)
            shown = new
    print(whole[len(shown) :], flush=True)


def read_prompt(options: Any) -> str | bytes:
    """The text of --prompt, or the bytes of --prompt_file."""
    if options.prompt is not None and options.prompt_file is not None:
        raise ValueError("--prompt and --prompt_file: give one of them")
    if options.prompt_file is not None:
        return options.prompt_file.read_bytes()
    return "In the beginning " if options.prompt is None else options.prompt


@command.exit_code
def main(argv: list[str]) -> int:
    arguments = command.Arguments("generate", __doc__)
    arguments.add_argument("--workdir", type=command.folder)
    arguments.add_argument("--checkpoint", type=command.folder)
    arguments.add_argument("--tokenizer")
    arguments.add_argument("--prompt")
    arguments.add_argument("--prompt_file", type=Path)
    arguments.add_argument("--length", type=int, default=400)
    arguments.add_argument("--num", type=int, default=1)
    arguments.add_argument("--stop", action="append", default=[])
    for name in SAMPLING:
        arguments.add_argument(f"--{name}", type=int if name == "top_k" else float)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--beams", type=int)
    arguments.add_argument("--length_penalty", type=float)
    arguments.add_argument("--stream", action="store_true")
    options = arguments.parse_args(argv)
    given = {name: getattr(options, name) for name in SAMPLING if getattr(options, name) is not None}
    sampling, prompt = Sampling(**{"temperature": 0.8} | given), read_prompt(options)
    check(options, given, prompt)
    use_compilation_cache()
    model, tokenizer = chosen(options)
    before = prompt if isinstance(prompt, str) else prompt.decode(errors="replace")
    if options.beams:
        penalty = 1.0 if options.length_penalty is None else options.length_penalty
        search = dict(length_penalty=penalty, stop=options.stop)
        texts = best(model, tokenizer, prompt, options.length, options.beams, **search)
    elif options.stream:
        draws = jax.random.key(options.seed), sampling
        ends = dict(stop=options.stop, block=STREAM_BLOCK)
        arrived = continuations(model, tokenizer, [prompt], options.length, *draws, **ends)
        first = next(arrived)  # whatever is wrong is said before anything is printed
        print(before, end="", flush=True)
        show(itertools.chain([first], arrived), options.stop)
        return 0
    else:
        texts = text(model, prompt, options.length, options.seed, sampling, options.num, tokenizer, options.stop)
    for number, answer in enumerate(texts[: options.num], start=1):
        if options.num > 1:
            print(f"--- {number} of {options.num}")
        print(before + answer)
    return 0


def check(options: Any, given: dict[str, float], prompt: str | bytes) -> None:
    """Options that go together, before a model is read."""
    if not prompt:
        raise ValueError("the prompt is empty: give at least one character")
    for name in ("num", "length") + (() if options.beams is None else ("beams",)):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}={getattr(options, name)}: at least 1 is needed")
    if "" in options.stop:
        raise ValueError("--stop is empty: give at least one character")
    if options.beams is None and options.length_penalty is not None:
        raise ValueError("--length_penalty goes with --beams")
    if options.beams is not None and given:
        raise ValueError(f"--{next(iter(given))} is for drawing: beam search draws nothing")
    if options.beams is not None and options.num > options.beams:
        raise ValueError(f"--num={options.num} is more than --beams={options.beams}")
    if options.stream and (options.num > 1 or options.beams is not None):
        raise ValueError("--stream shows one drawn text: it goes without --num and --beams")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
