"""Selective copying with minLSTM and minGRU by number of layers: "Were RNNs all we needed?" (arXiv 2410.01201).

    CONFIG=configs/papers/selective_copying.py:reduced
    python -m experiments.sweep run --config=$CONFIG --workdir=runs/selective --launcher=local
    python -m experiments.table     --config=$CONFIG --workdir=runs/selective

| argument  | runs                                                        | time                      |
|-----------|-------------------------------------------------------------|---------------------------|
| `demo`    | minGRU, 1 and 2 layers, 32 steps and 4 symbols, 1 seed      | about a minute on 2 cores |
| `reduced` | minLSTM, minGRU and mLSTM, 1 to 3 layers, 128 steps, 1 seed | about an hour on 2 cores  |
| `paper`   | the same at 4,096 steps and 16 symbols, 3 seeds             | hours a run, H100         |

`debug` shrinks every run to seconds. Gates of minLSTM and minGRU see the input alone, so that one layer cannot count
the symbols, and two can: accuracy rises with the number of layers. (The mLSTM's convolution and normaliser count too.)
"""

import itertools

from ml_collections import ConfigDict

from configs import common

PRESETS = {
    "demo": dict(
        models=("min_gru_block",), layers=(1, 2), seeds=(0,), length=32, symbols=4, dim=48, steps=400, seconds=25
    ),
    "reduced": dict(
        models=("min_lstm_block", "min_gru_block", "xlstm[1:0]"),
        layers=(1, 2, 3),
        seeds=(0,),
        length=128,
        symbols=8,
        dim=64,
        steps=3_000,
        seconds=600,
    ),
    "paper": dict(
        models=("min_lstm_block", "min_gru_block", "xlstm[1:0]"),
        layers=(1, 2, 3),
        seeds=(0, 1, 2),
        length=4_096,
        symbols=16,
        dim=64,
        steps=400_000,
        seconds=10_800,
    ),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """One run: the preset's first model with its fewest layers."""
    preset, debug = common.parse_arg(arg, PRESETS)
    numbers = PRESETS[preset]
    config = ConfigDict()
    config.kind = "tagger"
    config.model = dict(backbone=numbers["models"][0], dim=numbers["dim"], num_layers=numbers["layers"][0], dropout=0.0)
    config.task = dict(
        name="selective_copying", length=numbers["length"], symbols=numbers["symbols"], vocab_size=16, num_eval=1_024
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=3e-4 if preset == "paper" else 3e-3,
        warmup_steps=numbers["steps"] // 20,
        schedule="cosine",
        min_learning_rate=3e-5,
        weight_decay=0.01,
        betas=(0.9, 0.99),
        clip=1.0,
    )
    config.steps = numbers["steps"]
    config.batch_size = 64 if preset == "paper" else 32
    config.seed = 0
    config.eval_every = config.save_every = max(numbers["steps"] // 5, 1)
    config.log_every = config.steps_per_dispatch = 50
    config.eval_batch_size = 64
    if debug:
        common.shrink(config)
        config.task.num_eval, config.task.length = 8, 2 * config.task.symbols
    return config.lock()


def sweep(arg: str | None = None):
    """Every run of the table."""
    preset, _ = common.parse_arg(arg, PRESETS)
    numbers = PRESETS[preset]
    for model, layers, seed in itertools.product(numbers["models"], numbers["layers"], numbers["seeds"]):
        yield {"model.backbone": model, "model.num_layers": layers, "seed": seed}


def expected_seconds(arg: str | None, overrides: dict) -> float:
    """On one of two CPU cores (paper: one H100); the sweep's time left begins from it."""
    preset, debug = common.parse_arg(arg, PRESETS)
    return 10 if debug else PRESETS[preset]["seconds"] * overrides["model.num_layers"] / 2


TABLE = dict(
    title="Selective copying: accuracy on the copied symbols, by number of layers",
    row="model.backbone",
    rows={"min_lstm_block": "minLSTM", "min_gru_block": "minGRU", "xlstm[1:0]": "xLSTM[1:0] (mLSTM)"},
    column="model.num_layers",
    columns={"1": "1 layer", "2": "2 layers", "3": "3 layers"},
    metric="test_accuracy",
    aggregate="mean",
    range=(0.0, 1.0),
    digits=2,
    paper=dict(
        name="paper",
        source="Feng et al. (arXiv 2410.01201), selective copying (as quoted by later texts)",
        values={
            ("min_lstm_block", "1"): 0.376,
            ("min_lstm_block", "2"): 0.857,
            ("min_lstm_block", "3"): 0.960,
            ("min_gru_block", "1"): 0.370,
            ("min_gru_block", "2"): 0.968,
            ("min_gru_block", "3"): 0.995,
        },
        missing="no such row in the paper",
    ),
    protocol={"task.length": 4_096, "task.symbols": 16},
    differences="Paper: 4,096 steps, 16 symbols of an alphabet of 16, layers with a feed-forward part. "
    "Here: {config[task][length]:,} steps, {config[task][symbols]} symbols of 14, width {config[model][dim]}, "
    "{config[steps]:,} steps of batch {config[batch_size]} of fresh samples, learning rate "
    "{config[optimizer][learning_rate]:g}, seeds {swept[seed]}, {config[task][num_eval]:,} test samples.",
)
