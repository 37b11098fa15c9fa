"""Loss of language models on text of any length: python -m experiments.evaluate --workdir=DIR --split=test

    --workdir=DIR              a run of kind lm; several are compared in one figure
    --checkpoint=PATH          published weights instead, with --data and --tokenizer as experiments.generate takes it
    --data=NAME --data_dir     another corpus than the run's, by the run's tokenizer (experiments.data names them)
    --split=test               test, valid or train
    --contexts=256,512,...     windows of so many tokens, each from the empty state (default: the run's seq_len)
    --stateful                 also with the state carried from the first token to the last
    --by=none                  position: rows by place in the longest window; document: a row a document; none
    --batch_size=8 --chunk=256 --max_tokens=N     rows side by side, tokens at a time, tokens of the split
    --cache=N                  tokens that a Transformer's cache holds, if not those of its config
    --out=DIR                  rows into DIR/NAME.jsonl and the figure into DIR/NAME.png; --figure=FILE.png alone

A row has exact numbers: tokens, nats a token, perplexity, bits a byte, bits a character. `--stateful` reads the split
in batch_size parts side by side, each from the empty state; with --batch_size=1 it is one text from its first token
on. Memory does not grow with the context.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from experiments import command, generate
from experiments.bench import writable
from experiments.train import use_compilation_cache
from xlstm_jax import metrics
from xlstm_jax.data import lookup, tokens
from xlstm_jax.data.tokenizers import Tokenizer
from xlstm_jax.evaluate import by_document, by_position, stream_losses, summary, text_size
from xlstm_jax.names import unknown
from xlstm_jax.tasks.task import split_index
from xlstm_jax.text import check_vocabulary

BY = ("none", "position", "document")
DEFAULT_CONTEXT = 512


class Subject(NamedTuple):
    """What is evaluated: a model and the tokens of a split."""

    name: str
    model: nnx.Module
    tokenizer: Tokenizer
    tokens: np.ndarray  # (N + 1,), the first of which is not predicted
    end: int | None  # the token between documents
    trained: int | None  # tokens of a training window


def of_run(folder: Path, split: str, data: str | None, data_dir: str | None, cache: int | None) -> Subject:
    """A run folder's model on its own split, or on that of other data."""
    run = generate.load_run(folder)
    if cache is not None and run.plain["model"]["backbone"] == "transformer":
        run = generate.load_run(folder, context=cache)
    coder, task = generate.load_tokenizer(folder), run.task
    if data is not None:
        stream, end = of_corpus(data, data_dir, split, coder)
    elif not hasattr(task, "bounds"):
        raise ValueError(f"{folder}: the task {task.name} is no text: give --data")
    else:
        start, stop = task.bounds(split)
        stream, end = np.asarray(task.data[max(start - 1, 0) : stop]), getattr(task, "end", None)
    return Subject(folder.name, run.model, coder, stream, end, getattr(task, "seq_len", None))


def of_checkpoint(path: Path, tokenizer: str | None, split: str, data: str | None, data_dir: str | None) -> Subject:
    """Published weights on a corpus."""
    if data is None:
        raise ValueError("--checkpoint needs --data, the corpus to evaluate on (experiments.data list)")
    model, coder = generate.load_published(path, tokenizer)
    check_vocabulary(model, coder)
    return Subject(path.name, model, coder, *of_corpus(data, data_dir, split, coder), None)


def of_corpus(name: str, data_dir: str | None, split: str, coder: Tokenizer) -> tuple[np.ndarray, int | None]:
    """The tokens of one split, memory-mapped, and the token between its documents."""
    file = tokens.tokenise(lookup.load(name, data_dir), coder)[split]
    return file.tokens, file.end


def evaluation(subject: Subject, contexts: list[int], stateful: bool, by: str, **reading: int) -> list[dict[str, Any]]:
    """A row a context, and those by position or document: of the longest windows, and with the state carried on."""
    if by == "document" and subject.end is None:
        raise ValueError(f"{subject.name}: the data is one running text: it has no documents to tell apart")
    sizes = text_size(subject.tokenizer, subject.tokens[1:])
    longest, rows = max(contexts), []
    for context in (*contexts, *([None] if stateful else [])):
        nll = stream_losses(subject.model, subject.tokens, context, end=subject.end, **reading)
        about = {"run": subject.name, "context": context, "carried": context is None}
        rows.append(about | summary(nll, *sizes))
        if by == "position" and context in (longest, None):
            rows += [about | {"by": by} | row for row in by_position(nll, longest)]
        elif by == "document" and context in (longest, None):
            rows += [about | {"by": by} | row for row in by_document(nll, subject.tokens, subject.end)]
    return rows


def figure(rows: list[dict[str, Any]], file: Path, unit: str, trained: int | None = None) -> None:
    """Loss by position in the longest window, a colour a run; dashed with the state carried from window to window."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, axis = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    scale = 1 / np.log(2) if unit.startswith("bits") else 1.0
    names = list(dict.fromkeys(row["run"] for row in rows))
    for name, colour in zip(names, pyplot.get_cmap("tab10").colors * (1 + len(names) // 10)):
        for carried, style in ((False, "-"), (True, "--")):
            points = [r for r in rows if r["run"] == name and r["carried"] == carried and r.get("by") == "position"]
            if points:
                x = [(row["first"] + row["last"]) / 2 + 1 for row in points]
                label = f"{name}, state carried" if carried else name
                axis.plot(x, [scale * r["loss"] for r in points], style, color=colour, label=label, linewidth=1.4)
    if trained:
        axis.axvline(trained, color="#888888", linewidth=0.8, linestyle=":", label="training length")
    axis.set(xlabel="position in the window", ylabel=unit, xscale="log")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    picture.savefig(file, dpi=150)
    pyplot.close(picture)


def shown(row: dict[str, Any]) -> str:
    """One line of the screen."""
    where = "state carried" if row["carried"] else f"context {row['context']}"
    numbers = [f"{name.replace('_', ' ')} {row[name]:.4f}" for name in row if name.startswith(("loss", "perp", "bits"))]
    place = f"position {row['first']}-{row['last']}" if "first" in row else ""
    place = f"document {row['document']}" if "document" in row else place
    return "; ".join(filter(None, (row["run"], where, place, f"{row['tokens']} tokens", ", ".join(numbers))))


def numbers(name: str, text: str) -> list[int]:
    """256,512 as integers of at least 1."""
    words = text.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise ValueError(f"--{name}={text}: integers of at least 1 by commas are needed, 256,512 say")
    return [int(word) for word in words]


@command.exit_code
def main(argv: list[str]) -> int:
    arguments = command.Arguments("evaluate", __doc__)
    arguments.add_argument("--workdir", type=command.folder, action="append", default=[])
    arguments.add_argument("--checkpoint", type=command.folder)
    arguments.add_argument("--tokenizer")
    arguments.add_argument("--data")
    arguments.add_argument("--data_dir")
    arguments.add_argument("--split", default="test")
    arguments.add_argument("--contexts")
    arguments.add_argument("--stateful", action="store_true")
    arguments.add_argument("--by", default="none")
    arguments.add_argument("--batch_size", type=int, default=8)
    arguments.add_argument("--chunk", type=int, default=256)
    arguments.add_argument("--max_tokens", type=int)
    arguments.add_argument("--cache", type=int)
    arguments.add_argument("--out", type=command.folder)
    arguments.add_argument("--figure", type=Path)
    options = arguments.parse_args(argv)
    contexts = None if options.contexts is None else numbers("contexts", options.contexts)
    by = check(options)
    picture = options.figure
    if options.out:
        writable(options.out)
        picture = picture or options.out / f"{options.out.name}.png"
    use_compilation_cache()
    data = (options.split, options.data, options.data_dir)
    rows, units, trained = [], set(), set()
    for folder in (*options.workdir, *filter(None, [options.checkpoint])):
        if folder is options.checkpoint:
            subject = of_checkpoint(folder, options.tokenizer, *data)
        else:
            subject = of_run(folder, *data, options.cache)
        if options.max_tokens:
            subject = subject._replace(tokens=subject.tokens[: options.max_tokens + 1])
        units.add("bits a byte" if subject.tokenizer.kind == "bytes" else "nats a token")
        trained.add(subject.trained)
        lengths = contexts or [subject.trained or DEFAULT_CONTEXT]
        reading = dict(batch_size=options.batch_size, chunk=options.chunk)
        found = evaluation(subject, lengths, options.stateful, by, **reading)
        rows += [{"split": options.split, "data": options.data} | row for row in found]
        for row in found:
            if "by" not in row or not picture:
                print(shown(row), flush=True)
    if options.out:
        file = options.out / f"{options.out.name}.jsonl"
        metrics.write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))
        print(file)
    if picture:
        common = trained.pop() if len(trained) == 1 else None
        figure(rows, picture, units.pop() if len(units) == 1 else "nats a token", common)
        print(picture)
    return 0


def check(options: Any) -> str:
    """What is wrong with the options, before a model is read; returns what rows are split by."""
    if bool(options.workdir) == (options.checkpoint is not None):
        raise ValueError("--workdir (one run or several) or --checkpoint (published weights) is required, one of them")
    if options.tokenizer is not None and options.checkpoint is None:
        raise ValueError("--tokenizer goes with --checkpoint; a run has its own")
    names = [folder.name for folder in options.workdir]
    if len(set(names)) < len(names):
        raise ValueError(f"--workdir: the folders {', '.join(names)} must have different names, which the rows bear")
    split_index(options.split)
    if options.by not in BY:
        raise ValueError(unknown("--by", options.by, BY))
    for name in ("batch_size", "chunk", "max_tokens", "cache"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}={value}: at least 1 is needed")
    if options.figure and (options.figure.suffix != ".png" or not options.figure.absolute().parent.is_dir()):
        raise ValueError(f"--figure={options.figure}: a .png file in a folder that is there is needed")
    pictured = options.out or options.figure
    if pictured and options.by == "document":
        raise ValueError("--by=document has no figure: leave out --out and --figure, or take --by=position")
    return "position" if pictured else options.by


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
