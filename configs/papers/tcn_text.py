"""Language models of words and characters: the TCN paper's Table 1 (Bai, Kolter and Koltun 2018, arXiv 1803.01271).

    CONFIG=configs/papers/tcn_text.py:reduced
    python -m experiments.sweep run --config=$CONFIG --workdir=runs/tcn_text --launcher=local
    python -m experiments.table     --config=$CONFIG --workdir=runs/tcn_text

| argument  | runs                                              | time                         |
|-----------|---------------------------------------------------|------------------------------|
| `demo`    | LSTM of width 64, 200 steps                       | a minute or two on 2 cores   |
| `reduced` | LSTM and GRU of width 256, one layer, 2,000 steps | less than an hour on 2 cores |
| `paper`   | LSTM and GRU of the paper's sizes, 40,000 steps   | hours a run, H100            |

After the preset comes the text: `kjv` (as without), the bundled Bible by its 10,000 commonest words, which the paper
has not; `ptb` and `ptb_characters`, the Penn Treebank in the folder ~/.cache/xlstm_jax/data/ptb (train.txt, valid.txt
and test.txt, words between spaces, <unk> in them already); `text8`, the file of that name beside it, split 90/5/5 by
position. `debug` shrinks every run to seconds. The table is in nats a token: e to its power is the perplexity a word.
"""

import itertools
import math

from ml_collections import ConfigDict

from configs import common

DATA = "file:~/.cache/xlstm_jax/data"
# corpus, tokeniser, steps in a row; layers, width, embedding, dropout and clip of Table 2 of the paper's appendix, the
# LSTM's (the GRU's and text8's embedding are not known)
SETS = {
    "kjv": ("bundled:kjv", "words:10000", 70, 3, 700, 700, 0.4, 0.3),
    "ptb": (f"{DATA}/ptb", "words", 70, 3, 700, 700, 0.4, 0.3),
    "ptb_characters": (f"{DATA}/ptb", "characters", 256, 2, 600, 120, 0.1, 0.5),
    "text8": (f"{DATA}/text8", "characters", 256, 1, 1024, 120, 0.15, 0.5),
}
MODELS = ("lstm", "gru")
PRESETS = {
    "demo": dict(models=("lstm",), size=(1, 64, 64, 0.0), steps=200, seconds=80),
    "reduced": dict(models=MODELS, size=(1, 256, 128, 0.1), steps=2_000, seconds=1_200),
    "paper": dict(models=MODELS, size=None, steps=40_000, seconds=7_200),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """One run: the LSTM."""
    preset, name, debug = common.parse_arg(arg, PRESETS, SETS)
    numbers = PRESETS[preset]
    corpus, tokenizer, seq_len, *size, clip = SETS[name]
    layers, dim, embedding_dim, dropout = numbers["size"] or size
    steps = numbers["steps"]
    config = ConfigDict()
    config.kind = "lm"
    config.model = dict(
        backbone="lstm", dim=dim, num_layers=layers, embedding_dim=embedding_dim, dropout=dropout, final_norm="none"
    )
    config.task = dict(
        name="text_lm", corpus=corpus, tokenizer=tokenizer, data_dir="", seq_len=seq_len, carries_state=True
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=2e-3,
        warmup_steps=steps // 20,
        schedule="cosine",
        min_learning_rate=2e-5,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        clip=clip,
    )
    config.steps = steps
    config.batch_size = 16
    config.seed = 0
    config.eval_every = config.save_every = max(steps // 5, 1)
    config.keep_best = "loss"
    config.log_every = config.steps_per_dispatch = 20
    config.eval_batch_size = 8
    if debug:
        common.shrink(config)
        config.model.embedding_dim, config.task.seq_len = 16, 16
    return config.lock()


def sweep(arg: str | None = None):
    """Every run of the table."""
    preset, _, _ = common.parse_arg(arg, PRESETS, SETS)
    for model, seed in itertools.product(PRESETS[preset]["models"], (0,)):
        yield {"model.backbone": model, "seed": seed}


def expected_seconds(arg: str | None, overrides: dict) -> float:
    """On one of two CPU cores (paper: one H100); the sweep's time left begins from it."""
    preset, _, debug = common.parse_arg(arg, PRESETS, SETS)
    return 10 if debug else PRESETS[preset]["seconds"]


COLUMNS = {name: f"{tokenizer}/{corpus}" for name, (corpus, tokenizer, *_) in SETS.items()}
PERPLEXITY = {"lstm": 78.93, "gru": 92.48}  # of PTB's words
BITS = {"ptb_characters": {"lstm": 1.36, "gru": 1.37}, "text8": {"lstm": 1.50, "gru": 1.53}}  # a character


def by_column(index: int) -> dict[str, int]:
    """One of the numbers in SETS, of the texts that the paper has."""
    return {COLUMNS[name]: numbers[index] for name, numbers in SETS.items() if name != "kjv"}


TABLE = dict(
    title="Language models of words and characters: nats a token on the test split",
    row="model.backbone",
    rows={"lstm": "LSTM", "gru": "GRU"},
    column=("task.tokenizer", "task.corpus"),
    columns={
        COLUMNS["kjv"]: "Bible, words",
        COLUMNS["ptb"]: "PTB, words",
        COLUMNS["ptb_characters"]: "PTB, characters",
        COLUMNS["text8"]: "text8, characters",
    },
    metric="test_loss",
    aggregate="mean",
    lower_is_better=True,
    digits=3,
    paper=dict(
        name="paper",
        source="TCN (arXiv 1803.01271), Tab. 1, in nats: PTB by words, perplexity 78.93 (LSTM) and 92.48 (GRU); PTB by "
        "characters 1.36 and 1.37 bits, text8 1.50 and 1.53 bits; the TCN has 88.68, 1.31 and 1.45",
        values={
            **{(model, COLUMNS["ptb"]): math.log(value) for model, value in PERPLEXITY.items()},
            **{
                (model, COLUMNS[name]): bits * math.log(2)
                for name, values in BITS.items()
                for model, bits in values.items()
            },
        },
        missing="the paper has no Bible",
    ),
    protocol={
        "model.num_layers": by_column(3),
        "model.dim": by_column(4),
        "optimizer.name": {COLUMNS["ptb"]: "sgd for the LSTM"},
        "steps": "not given",
    },
    differences="Paper: LSTM of 3 layers of 700 (PTB's words), 2 of 600 (PTB's characters), 1 of 1,024 (text8); the "
    "GRU's settings are not known. Here: {config[model][num_layers]} layers of {config[model][dim]}, embeddings of "
    "{config[model][embedding_dim]}, dropout {config[model][dropout]:g}, Adam, learning rate "
    "{config[optimizer][learning_rate]:g} and cosine decay over {config[steps]:,} steps of {config[batch_size]} x "
    "{config[task][seq_len]} tokens, state carried over, the best evaluation, seeds {swept[seed]}.",
)
