"""State tracking: parity, modular arithmetic, and the word problems of S3, A5 and S5. Grazzi et al. (arXiv 2411.12537).

    CONFIG=configs/papers/state_tracking.py:reduced
    python -m experiments.sweep run --config=$CONFIG --workdir=runs/state --launcher=local
    python -m experiments.table     --config=$CONFIG --workdir=runs/state
    python -m experiments.lengths   --config=$CONFIG --workdir=runs/state      # accuracy by length

| argument  | runs                                                  | time                                |
|-----------|-------------------------------------------------------|-------------------------------------|
| `demo`    | LSTM and mLSTM on S3, 1 seed                          | a minute or two on 2 CPU cores      |
| `reduced` | 7 models; parity, S3, A5, S5; 2 seeds                 | half an hour on 2 CPU cores         |
| `paper`   | 7 models, 6 tasks, 4 learning rates, 3 seeds each     | an hour or two a run on one H100    |

`debug` after a preset (`reduced,debug`) shrinks every run to seconds.

Expected: who solves parity tracks S3 too; A5 and S5 need more steps. The mLSTM and the Transformer track none.
"""

import itertools

from ml_collections import ConfigDict

from configs import common

TASKS = {
    "parity": "Parity",
    "modular_arithmetic": "Modular arithmetic",
    "modular_arithmetic_brackets": "Modular arithmetic, brackets",
    "s3": "S3",
    "a5": "A5",
    "s5": "S5",
}
SLSTM = {"+model.slstm_conv_width": 0, "+model.recurrent_init": "orthogonal", "+model.num_heads": 1}
MODELS = {
    "lstm": {},
    "gru": {},
    "elman": {},
    "xlstm[0:1]": SLSTM,
    "xlstm[1:0]": {"+model.num_heads": 1},
    "min_lstm_block": {},
    "transformer": {"+model.context": 256},  # all of a sequence
}
BARE = {"model.num_layers": 1, "model.dim": 64, "steps": 1_500, "optimizer.warmup_steps": 150}
PAPER = {  # its parity runs are smaller; the paper has no bare cells and no groups
    "parity": {"model.num_layers": 2, "model.dim": 128},
}

PRESETS = {
    "demo": dict(
        models=("lstm", "xlstm[1:0]"), tasks=("s3",), seeds=(0,), learning_rates=(1e-2,), layers=2, dim=32,
        batch_size=32, steps=500, min_learning_rate=1e-4, weight_decay=0.01, num_eval=512, seconds=35,
    ),
    "reduced": dict(
        models=tuple(MODELS), tasks=("parity", "s3", "a5", "s5"), seeds=(0, 1), learning_rates=(1e-2,), layers=2,
        dim=32, batch_size=32, steps=500, min_learning_rate=1e-4, weight_decay=0.01, num_eval=512, seconds=35,
    ),
    "paper": dict(
        models=tuple(MODELS), tasks=tuple(TASKS), seeds=(0, 1, 2), learning_rates=(1e-2, 1e-3, 5e-4, 1e-4), layers=3,
        dim=64, batch_size=1_024, steps=100_000, min_learning_rate=1e-6, weight_decay=0.1, num_eval=8_192,
        seconds=5_000,
    ),
}  # fmt: skip


def get_config(arg: str | None = None) -> ConfigDict:
    """One run of the table: the LSTM on the first task; `sweep` changes model, task, learning rate and seed."""
    preset, debug = common.parse_arg(arg, PRESETS)
    numbers = PRESETS[preset]
    config = ConfigDict()
    config.kind = "tagger"
    config.model = dict(backbone="lstm", dim=numbers["dim"], num_layers=numbers["layers"], dropout=0.0)
    config.task = dict(name=numbers["tasks"][0], num_eval=numbers["num_eval"])
    config.optimizer = dict(
        name="adamw",
        learning_rate=numbers["learning_rates"][0],
        warmup_steps=numbers["steps"] // 10,
        schedule="cosine",
        min_learning_rate=numbers["min_learning_rate"],
        weight_decay=numbers["weight_decay"],
        betas=(0.9, 0.99),
        clip=1.0,
    )
    config.steps = numbers["steps"]
    config.batch_size = numbers["batch_size"]
    config.seed = 0
    config.eval_every = 0  # at the end
    config.save_every = max(numbers["steps"] // 4, 1)
    config.log_every = 50
    config.eval_batch_size = 256
    config.steps_per_dispatch = 50
    if debug:
        common.shrink(config)
        config.task.num_eval = 16
    return config.lock()


def sweep(arg: str | None = None):
    """Every run of the table; the seeds of one setting follow each other, so that they share a compiled program."""
    preset, debug = common.parse_arg(arg, PRESETS)
    numbers = PRESETS[preset]
    for task, model, learning_rate, seed in itertools.product(
        numbers["tasks"], numbers["models"], numbers["learning_rates"], numbers["seeds"]
    ):
        overrides = {"task.name": task, "model.backbone": model} | MODELS[model]
        if preset == "paper":
            overrides |= PAPER.get(task, {}) | ({"batch_size": 512} if model == "xlstm[1:0]" else {})
            if task == "parity" and "+model.num_heads" in overrides:
                overrides["+model.num_heads"] = 4
        elif model in ("lstm", "gru", "elman") and not debug:
            overrides |= BARE
        if len(numbers["learning_rates"]) > 1:
            overrides["optimizer.learning_rate"] = learning_rate
        yield overrides | {"seed": seed}


def expected_seconds(arg: str | None, overrides: dict) -> float:
    """On one of two CPU cores (paper: one H100); the sweep's time left begins from it."""
    preset, debug = common.parse_arg(arg, PRESETS)
    return 10 if debug else PRESETS[preset]["seconds"]


TABLE = dict(
    title="State tracking: scaled accuracy at lengths 40-256, training lengths 3-40, the best run",
    row="model.backbone",
    rows={
        "lstm": "LSTM",
        "gru": "GRU",
        "elman": "Elman",
        "xlstm[0:1]": "xLSTM[0:1] (sLSTM)",
        "xlstm[1:0]": "xLSTM[1:0] (mLSTM)",
        "min_lstm_block": "minLSTM (block)",
        "transformer": "Transformer",
    },
    column="task.name",
    columns=TASKS,
    metric="test_scaled_accuracy",
    aggregate="max",
    range=(0.0, 1.0),
    digits=3,
    paper=dict(
        name="paper",
        source="Grazzi et al. (arXiv 2411.12537), Tab. 3: the best of 3 seeds",
        values={
            ("transformer", "parity"): 0.022,
            ("transformer", "modular_arithmetic"): 0.031,
            ("transformer", "modular_arithmetic_brackets"): 0.067,
            ("xlstm[1:0]", "parity"): 0.087,
            ("xlstm[1:0]", "modular_arithmetic"): 0.040,
            ("xlstm[1:0]", "modular_arithmetic_brackets"): 0.114,
            ("xlstm[0:1]", "parity"): 1.000,
            ("xlstm[0:1]", "modular_arithmetic"): 0.787,
            ("xlstm[0:1]", "modular_arithmetic_brackets"): 0.178,
        },
        missing="the paper has no such model in that table, or the value is not known here (S3, A5, S5)",
    ),
    protocol={"steps": 100_000, "batch_size": [1_024, 512]},
    references=[
        dict(
            name="median",
            source="Grazzi et al., Tab. 5: the median of 3 seeds",
            values={
                ("transformer", "parity"): 0.003,
                ("transformer", "modular_arithmetic"): 0.018,
                ("transformer", "modular_arithmetic_brackets"): 0.064,
                ("xlstm[1:0]", "parity"): 0.018,
                ("xlstm[1:0]", "modular_arithmetic"): 0.027,
                ("xlstm[1:0]", "modular_arithmetic_brackets"): 0.114,
                ("xlstm[0:1]", "parity"): 1.000,
                ("xlstm[0:1]", "modular_arithmetic"): 0.124,
                ("xlstm[0:1]", "modular_arithmetic_brackets"): 0.163,
            },
        ),
        dict(
            name="xLSTM",
            source="xLSTM (arXiv 2405.04517), Fig. 4, as Grazzi et al. quote it; they could not reproduce the sLSTM's "
            "values on modular arithmetic",
            values={
                ("xlstm[1:0]", "parity"): 0.04,
                ("xlstm[1:0]", "modular_arithmetic"): 0.04,
                ("xlstm[1:0]", "modular_arithmetic_brackets"): 0.03,
                ("xlstm[0:1]", "parity"): 1.00,
                ("xlstm[0:1]", "modular_arithmetic"): 1.00,
                ("xlstm[0:1]", "modular_arithmetic_brackets"): 0.57,
            },
        ),
    ],
    differences="Paper: 100,000 steps of batch 1,024 (mLSTM 512), the learning rates 1e-2, 1e-3, 5e-4 and 1e-4, 3 "
    "seeds, 3 layers (parity: 2 of width 128, 4 heads), xLSTM of width 64. Here: {config[steps]:,} steps of batch "
    "{config[batch_size]}, learning rates {swept[optimizer.learning_rate]}, seeds {swept[seed]}, "
    "{config[model][num_layers]} blocks of width {config[model][dim]} (demo and reduced: LSTM, GRU and Elman one bare "
    "layer of width 64, 1,500 steps), {config[task][num_eval]:,} test samples. S3, A5 and S5 ask for the product at "
    "every step.",
)
