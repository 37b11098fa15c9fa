"""Nearest-neighbour search: may a stored value be revised? xLSTM (arXiv 2405.04517), Fig. 2 left.

    CONFIG=configs/papers/nearest_neighbour.py:reduced
    python -m experiments.sweep run --config=$CONFIG --workdir=runs/nearest --launcher=local
    python -m experiments.table     --config=$CONFIG --workdir=runs/nearest

| argument  | runs                                            | time                        |
|-----------|-------------------------------------------------|-----------------------------|
| `demo`    | LSTM and sLSTM, context 16, 1 seed              | about a minute on 2 cores   |
| `reduced` | 5 models, context 64, 1 seed                    | about 40 minutes on 2 cores |
| `paper`   | 5 models, context 64, 4 learning rates, 5 seeds | half an hour a run, H100    |

`debug` shrinks every run to seconds. The paper shows curves only: with exponential gating the error is lower than the
LSTM's, which cannot revise what it has stored. Answering 1/2 has the squared error 0.083.
"""

import itertools

from ml_collections import ConfigDict

from configs import common

MODELS = {  # backbone: its own options
    "lstm_block": {},
    "xlstm[0:1]": {"+model.slstm_conv_width": 0},
    "xlstm[1:0]": {},
    "xlstm[1:1]": {},
    "transformer": {"+model.context": 64},
}
PRESETS = {
    "demo": dict(
        models=("lstm_block", "xlstm[0:1]"), rates=(3e-3,), seeds=(0,), length=16, dim=32, steps=400, seconds=30
    ),
    "reduced": dict(models=MODELS, rates=(2e-3,), seeds=(0,), length=64, dim=64, steps=3_000, seconds=900),
    "paper": dict(
        models=MODELS, rates=(1e-4, 1e-3, 1e-2, 1e-1), seeds=range(5), length=64, dim=128, steps=100_000, seconds=1_800
    ),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """One run: the LSTM in residual blocks."""
    preset, debug = common.parse_arg(arg, PRESETS)
    numbers = PRESETS[preset]
    config = ConfigDict()
    config.kind = "features"
    dropout = 0.1 if preset == "paper" else 0.0
    config.model = dict(backbone="lstm_block", dim=numbers["dim"], num_layers=2, dropout=dropout)
    config.task = dict(
        name="nearest_neighbour", length=numbers["length"], num_eval=8_192 if preset == "paper" else 1_024
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=numbers["rates"][0],
        warmup_steps=numbers["steps"] // 10,
        schedule="cosine",
        min_learning_rate=1e-7,
        weight_decay=0.01,
        betas=(0.9, 0.99),
        clip=1.0,
    )
    config.steps = numbers["steps"]
    config.batch_size = 256 if preset == "paper" else 32
    config.seed = 0
    config.eval_every = config.save_every = max(numbers["steps"] // 5, 1)
    config.log_every = config.steps_per_dispatch = 50
    config.eval_batch_size = 256
    if debug:
        common.shrink(config)
        config.task.num_eval, config.task.length = 8, 8
    return config.lock()


def sweep(arg: str | None = None):
    """Every run of the table."""
    preset, _ = common.parse_arg(arg, PRESETS)
    numbers = PRESETS[preset]
    for model, rate, seed in itertools.product(numbers["models"], numbers["rates"], numbers["seeds"]):
        rates = {"optimizer.learning_rate": rate} if len(numbers["rates"]) > 1 else {}
        yield {"model.backbone": model} | MODELS[model] | rates | {"seed": seed}


def expected_seconds(arg: str | None, overrides: dict) -> float:
    """On one of two CPU cores (paper: one H100); the sweep's time left begins from it."""
    preset, debug = common.parse_arg(arg, PRESETS)
    return 10 if debug else PRESETS[preset]["seconds"]


TABLE = dict(
    title="Nearest-neighbour search: squared error at the end of the context",
    row="model.backbone",
    rows={
        "lstm_block": "LSTM (Block)",
        "xlstm[0:1]": "xLSTM[0:1] (sLSTM)",
        "xlstm[1:0]": "xLSTM[1:0] (mLSTM)",
        "xlstm[1:1]": "xLSTM[1:1]",
        "transformer": "Transformer",
    },
    column="task.name",
    columns={"nearest_neighbour": "Squared error"},
    metric="test_loss",
    select="valid_loss",  # chooses the learning rate
    aggregate="mean",
    lower_is_better=True,
    digits=4,
    baselines={"answering 1/2": {"nearest_neighbour": 1 / 12}},
    paper=dict(
        name="paper",
        source="xLSTM (arXiv 2405.04517), Fig. 2 left",
        values={},
        missing="the paper shows curves only",
    ),
    protocol={"task.length": 64, "model.dim": 128, "model.dropout": 0.1, "steps": 100_000},
    differences="Paper: contexts up to 64, 8,192 training sequences, 2 blocks of width 128, dropout 0.1, 100,000 "
    "steps, best of 4 learning rates, 5 seeds. Here: context {config[task][length]}, fresh training samples, 2 blocks "
    "of width {config[model][dim]}, dropout {config[model][dropout]:g}, {config[steps]:,} steps of batch "
    "{config[batch_size]}, learning rate {swept[optimizer.learning_rate]}, seeds {swept[seed]}.",
)
