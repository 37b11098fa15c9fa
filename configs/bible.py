"""Byte-level language models of the King James Bible, which ships inside the package; bits a byte on the last 5 %.

    python -m experiments.sweep run --config=configs/bible.py:reduced --workdir=runs/bible --launcher=local
    python -m experiments.table     --config=configs/bible.py:reduced --workdir=runs/bible
    python -m experiments.train     --config=configs/bible.py:reduced,lstm --workdir=runs/lstm      # one model alone

| argument  | models                                               | time a model                          |
|-----------|------------------------------------------------------|---------------------------------------|
| `demo`    | LSTM, xLSTM[1:1], small                              | about two minutes on one CPU core     |
| `reduced` | five of equal size (`text.py`): 1.0 million numbers  | 10 to 30 minutes on 2 CPU cores       |

A model's name after the preset (lstm, awd_lstm, xlstm[1:0], xlstm[1:1], transformer) takes that model as its row of
the table has it; without one, `get_config` is the base that the rows start from, a small LSTM that belongs to no row.
`debug` after either shrinks it to a run of seconds. There is no `paper` preset: no paper reports this split.
`--config.task.corpus=file:PATH` reads any other file instead (.xz decompressed), its last 5 % as the test split.

Training is truncated back-propagation through time: each row of a batch reads its own part of the text, and its state
(of the Transformer: its cache) is carried over. Windows of `reduced` are 256 bytes: what its models do at other lengths
is `experiments.evaluate`'s question.
"""

from ml_collections import ConfigDict

from configs import text

DEMO = {
    "LSTM": {"model.backbone": "lstm", "model.dim": 192, "model.num_layers": 1, "+model.embedding_dim": 64},
    "xLSTM[1:1]": {"model.backbone": "xlstm[1:1]", "model.dim": 96, "model.num_layers": 2},
}

PRESETS = {
    "demo": dict(
        steps=600,
        batch_size=32,
        seq_len=64,
        learning_rate=4e-3,
        weight_decay=0.05,
        dropout=0.0,
        evaluations=6,
        models=DEMO,
        seconds=90,
    ),
    "reduced": dict(
        steps=800,
        batch_size=16,
        seq_len=256,
        learning_rate=4e-3,
        weight_decay=0.05,
        dropout=0.1,
        evaluations=4,
        models=text.with_rates(**{"Transformer": 2e-3}),
        seconds=1_200,
    ),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """One run: preset and model, say "reduced,lstm"; without a model the base of the sweep's rows."""
    if "paper" in (arg or "").split(","):
        raise ValueError("bible.py has no preset 'paper', as no paper reports this split: take demo or reduced")
    preset, model, debug = text.parse_arg(arg, PRESETS)
    numbers = PRESETS[preset]
    base = text.config(numbers, dict(name="byte_lm", corpus="bundled:kjv", seq_len=numbers["seq_len"]))
    return text.finish(base, numbers["models"], model, debug)


def sweep(arg: str | None = None):
    """Every model, or the one that the argument names."""
    preset, model, debug = text.parse_arg(arg, PRESETS)
    yield from text.rows(PRESETS[preset]["models"], model, debug)


def expected_seconds(arg: str | None, overrides: dict) -> float:
    """On one of two CPU cores; the sweep's time left begins from it."""
    preset, _, debug = text.parse_arg(arg, PRESETS)
    return 10 if debug else PRESETS[preset]["seconds"]


TABLE = dict(
    title="King James Bible, byte level: bits a byte on the test split (the last 5 %)",
    row="label",
    rows={label: label for label in text.MODELS},
    column="task.name",
    columns={"byte_lm": "Bits a byte"},
    metric="test_bits_per_byte",
    aggregate="mean",
    digits=3,
    lower_is_better=True,
    # what needs no network (xlstm_jax/data/baselines.py); both have seen the training split
    baselines={"xz -9e": {"byte_lm": 1.928}, "byte frequencies (order 0)": {"byte_lm": 4.340}},
    differences="No paper reports this split. {config[steps]:,} steps of {config[batch_size]} x "
    "{config[task][seq_len]} bytes, one run a model.",
)
