"""Byte-level language model of the King James Bible, which ships inside the package; bits a byte on the last 5 %.

    python -m experiments.sweep run --config=configs/bible.py:reduced --workdir=runs/bible --launcher=local
    python -m experiments.table     --config=configs/bible.py:reduced --workdir=runs/bible
    python -m experiments.train     --config=configs/bible.py:reduced,lstm --workdir=runs/lstm      # one model alone

| argument  | time a model                            |
|-----------|-----------------------------------------|
| `demo`    | about two minutes on one CPU core       |
| `reduced` | up to 30 minutes on 2 CPU cores         |

A model's name after the preset takes that model as its row of the table has it; without one, `get_config` is the base
that the rows start from, a small LSTM that belongs to no row. `debug` after either shrinks it to a run of seconds.
There is no `paper` preset: no paper reports this split. `--config.task.corpus=file:PATH` reads any other file instead
(.xz decompressed), its last 5 % as the test split. `--config.+task.ar=2.0` and `+task.tar=1.0` regularise the outputs.

Expected with `reduced`: the best model below 1.75 bits a byte on the test split; `xz -9e`, having seen the training
split, needs 1.93. Training is truncated back-propagation through time: each row of a batch reads its own part of the
text, and its state is carried over.
"""

from ml_collections import ConfigDict

from configs import common

MODELS = ("lstm", "xlstm[1:1]")

PRESETS = {
    "demo": dict(
        steps=600,
        batch_size=32,
        seq_len=64,
        learning_rate=4e-3,
        weight_decay=0.05,
        dropout=0.0,
        evaluations=6,
        models={
            "lstm": {"model.dim": 192, "model.num_layers": 1, "model.embedding_dim": 64},
            "xlstm[1:1]": {"model.dim": 96, "model.num_layers": 2, "model.embedding_dim": 96},
        },
        seconds={"lstm": 90, "xlstm[1:1]": 90},
    ),
    "reduced": dict(
        steps=2_600,
        batch_size=32,
        seq_len=128,
        learning_rate=4e-3,
        weight_decay=0.05,
        dropout=0.1,
        evaluations=5,
        models={
            "lstm": {"model.dim": 448, "model.num_layers": 1, "model.embedding_dim": 64},
            "xlstm[1:1]": {"model.dim": 192, "model.num_layers": 2, "model.embedding_dim": 192, "steps": 1_600},
        },
        seconds={"lstm": 1_800, "xlstm[1:1]": 1_800},
    ),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """One run: preset and model, say "reduced,lstm"; without a model the base of the sweep's rows."""
    if "paper" in (arg or "").split(","):
        raise ValueError("bible.py has no preset 'paper', as no paper reports this split: take demo or reduced")
    preset, model, debug = common.parse_arg(arg, PRESETS, MODELS)
    numbers = PRESETS[preset]
    config = ConfigDict()
    config.kind = "lm"
    config.model = dict(backbone=model, dim=64, num_layers=1, embedding_dim=64, dropout=numbers["dropout"])
    config.task = dict(name="byte_lm", corpus="bundled:kjv", seq_len=numbers["seq_len"], carries_state=True)
    config.optimizer = dict(
        name="adamw",
        learning_rate=numbers["learning_rate"],
        warmup_steps=numbers["steps"] // 20,
        schedule="cosine",
        min_learning_rate=numbers["learning_rate"] / 100,
        weight_decay=numbers["weight_decay"],
        betas=(0.9, 0.99),
        clip=1.0,
    )
    config.steps = numbers["steps"]
    config.batch_size = numbers["batch_size"]
    config.seed = 0
    config.eval_every = config.save_every = max(numbers["steps"] // numbers["evaluations"], 1)
    config.log_every = 20
    # streams that a split is read in, each from an empty state: few, so that little is read cold
    config.eval_batch_size = 8
    config.steps_per_dispatch = 20
    if named(model, arg):
        config.update_from_flattened_dict(numbers["models"][model])
    if debug:
        common.shrink(config)
        config.model.num_layers, config.model.embedding_dim, config.task.seq_len = 2, config.model.dim, 16
    return config.lock()


def named(model: str, arg: str | None) -> bool:
    """Whether the argument names the model, which is the first one otherwise."""
    return model in (arg or "").split(",")


def sweep(arg: str | None = None):
    """Both models, or the one that the argument names."""
    preset, model, debug = common.parse_arg(arg, PRESETS, MODELS)
    for name in [model] if named(model, arg) else MODELS:
        yield {"model.backbone": name} | ({} if debug else PRESETS[preset]["models"][name])


def expected_seconds(arg: str | None, overrides: dict) -> float:
    """On one of two CPU cores; the sweep's time left begins from it."""
    preset, _, debug = common.parse_arg(arg, PRESETS, MODELS)
    return 10 if debug else PRESETS[preset]["seconds"][overrides["model.backbone"]]


TABLE = dict(
    title="King James Bible, byte level: bits a byte on the test split (the last 5 %)",
    row="model.backbone",
    rows={"lstm": "LSTM", "xlstm[1:1]": "xLSTM[1:1]"},
    column="task.name",
    columns={"byte_lm": "Bits a byte"},
    metric="test_bits_per_byte",
    aggregate="mean",
    digits=3,
    lower_is_better=True,
    # what needs no network (xlstm_jax/data/baselines.py); both have seen the training split
    baselines={"xz -9e": {"byte_lm": 1.928}, "byte frequencies (order 0)": {"byte_lm": 4.340}},
    differences="No paper reports this split. {config[steps]:,} steps (reduced: xLSTM 1,600) of "
    "{config[batch_size]} x {config[task][seq_len]} bytes, one run a model.",
)
