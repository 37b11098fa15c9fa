"""Data sets: python -m experiments.data list | info NAME | prepare NAME [--download]; only --download uses the network.

NAME is bundled:NAME, local:NAME, file:PATH or tfds:NAME[/CONFIG] (xlstm_jax/data/lookup.py). `prepare` ends with
a data set that training reads without a network; with --tokenizer its tokens are in the cache too.
"""

import sys
from pathlib import Path

import numpy as np

from experiments import command
from xlstm_jax.data import corpora, lookup, prepared, tokens
from xlstm_jax.data.documents import Corpus
from xlstm_jax.names import unknown

ACTIONS = ("list", "info", "prepare")


def listing(folder: Path) -> list[str]:
    """One line a data set: what ships with the package, the known local files, what is prepared in the data folder."""
    lines = [f"data folder: {folder}{'' if folder.is_dir() else ' (absent)'}"]
    lines += [f"bundled:{name:16} there   {known.size:>12,} bytes" for name, known in corpora.BUNDLED.items()]
    for name, known in lookup.LOCAL.items():
        state = "there" if (folder / known.file).is_file() else "absent"
        lines.append(f"local:{name:18} {state:6}  {known.size:>12,} bytes  {known.what}")
    for path in prepared.folders(folder):
        lines.append(f"tfds:{path.parent.relative_to(folder)}:{path.name}")
    return [*lines, "file:PATH: .txt, .jsonl, .npy, .mat, or a folder; tfds:NAME: info NAME says how to get it"]


def description(corpus: Corpus) -> list[str]:
    """Where a data set is, what is in its splits, how it begins."""
    kind = "running text or tokens" if corpus.whole else "documents"
    lines = [f"{corpus.name}: {kind} ({corpus.layout})", f"source: {corpus.source}", f"sha256: {corpus.hash}"]
    for split, documents in corpus.splits.items():
        first = documents[0]
        sizes = f"{len(first):,} {'bytes' if isinstance(first, bytes) else 'tokens'}"
        lines.append(f"{split}: {sizes if corpus.whole else f'{len(documents):,} documents'}")
    first = corpus.splits["train"][0]
    beginning = first[:60] if isinstance(first, bytes) else f"{first.dtype} {np.shape(first)}"
    return [*lines, f"train begins: {beginning!r}"]


@command.exit_code
def main(argv: list[str]) -> int:
    arguments = command.Arguments("data", __doc__)
    arguments.add_argument("action", help="list, info or prepare")
    arguments.add_argument("name", nargs="?", help="bundled:NAME, local:NAME, file:PATH or tfds:NAME[/CONFIG]")
    arguments.add_argument("--data_dir", help="default: $XLSTM_JAX_DATA, else ~/.cache/xlstm_jax/data")
    arguments.add_argument(
        "--download", action="store_true", help="prepare: get it from the network if it is not there"
    )
    arguments.add_argument("--time_limit", type=float, default=600.0, help="of the download, in seconds")
    arguments.add_argument("--tokenizer", help="prepare: also write its tokens (bytes, bpe:4096, file:tokenizer.json)")
    options = arguments.parse_args(argv)
    if options.action not in ACTIONS:
        raise ValueError(unknown("action", options.action, ACTIONS))
    if (options.action == "list") == bool(options.name):
        raise ValueError("list takes no name" if options.name else f"{options.action} needs the name of a data set")
    if options.action != "prepare" and (options.download or options.tokenizer):
        raise ValueError("--download and --tokenizer go with prepare only")
    if options.action == "list":
        lines = listing(lookup.data_folder(options.data_dir))
    else:
        corpus = lookup.load(options.name, options.data_dir, download=options.download, time_limit=options.time_limit)
        lines = description(corpus)
    if options.tokenizer:
        tokenizer = tokens.tokenizer_for(corpus, options.tokenizer)
        files = tokens.tokenise(corpus, tokenizer)
        counts = ", ".join(f"{split} {len(file):,}" for split, file in files.items())
        lines.append(f"tokens ({tokenizer.name}, {tokenizer.vocab_size} ids): {counts}; {files['train'].path.parent}")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
