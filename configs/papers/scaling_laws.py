"""Scaling laws at small scale: loss over parameters and tokens, on the King James Bible (after arXiv 2510.02228).

    CONFIG=configs/papers/scaling_laws.py:reduced
    python -m experiments.sweep run      --config=$CONFIG --workdir=runs/scaling --launcher=local
    python -m experiments.scaling_laws   --config=$CONFIG --workdir=runs/scaling   # the fit, N*(C), D*(C), a figure

| argument  | runs                                                         | time                  |
|-----------|--------------------------------------------------------------|-----------------------|
| `demo`    | xLSTM[1:0], 3 widths, 2 numbers of tokens                    | 6 minutes on 2 cores  |
| `reduced` | xLSTM[1:0] and Transformer, 4 widths, 4 numbers of tokens    | 2 hours on 2 cores    |
| `paper`   | the same, 6 widths of 8 blocks, 6 numbers of tokens          | an hour a run, H100   |

`debug` shrinks every run to seconds. Every run has a cosine schedule of its own length, and sees no byte of the
corpus (3.7 million training bytes) much more than once in demo and reduced. The study has 80 million to 7 billion
parameters and 2 to 2,000 billion tokens, fits by isoFLOP parabolas, and finds xLSTM ahead at every budget.
"""

import itertools

from ml_collections import ConfigDict

from configs import common

MODELS = {"xlstm[1:0]": {}, "transformer": {"+model.context": 128}}
PRESETS = {
    "demo": dict(models=("xlstm[1:0]",), dims=(16, 32, 64), steps=(100, 300), layers=2, seconds=60),
    "reduced": dict(models=MODELS, dims=(16, 32, 64, 128), steps=(125, 250, 500, 1_000), layers=2, seconds=220),
    "paper": dict(
        models=MODELS,
        dims=(64, 128, 256, 512, 768, 1024),
        steps=(500, 1_000, 2_000, 4_000, 8_000, 16_000),
        layers=8,
        seconds=3_600,
    ),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """One run: the narrowest model with the fewest tokens."""
    preset, debug = common.parse_arg(arg, PRESETS)
    numbers = PRESETS[preset]
    config = ConfigDict()
    config.kind = "lm"
    config.model = dict(backbone="xlstm[1:0]", dim=numbers["dims"][0], num_layers=numbers["layers"], dropout=0.0)
    config.task = dict(name="byte_lm", corpus="bundled:kjv", seq_len=128, carries_state=False)
    config.optimizer = dict(
        name="adamw",
        learning_rate=4e-3 if preset != "paper" else 1e-3,
        warmup_steps=min(numbers["steps"]) // 10,
        schedule="cosine",
        min_learning_rate=1e-4,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        clip=1.0,
    )
    config.steps = numbers["steps"][0]
    config.batch_size = 32
    config.seed = 0
    config.eval_every = config.save_every = 0
    config.log_every = config.steps_per_dispatch = 25
    config.eval_batch_size = 32
    if debug:
        common.shrink(config)
        config.task.seq_len = 16
    return config.lock()


def sweep(arg: str | None = None):
    """Every run of the grid."""
    preset, debug = common.parse_arg(arg, PRESETS)
    numbers = PRESETS[preset]
    dims, steps = ((16, 32), (2, 4)) if debug else (numbers["dims"], numbers["steps"])
    for model, dim, each in itertools.product(numbers["models"], dims, steps):
        yield {"model.backbone": model, "model.dim": dim, "steps": each} | MODELS[model] | {"seed": 0}


def expected_seconds(arg: str | None, overrides: dict) -> float:
    """On one of two CPU cores (paper: one H100); the sweep's time left begins from it."""
    preset, debug = common.parse_arg(arg, PRESETS)
    return 10 if debug else PRESETS[preset]["seconds"]


TABLE = dict(
    title="Loss in nats a byte on the test split, the best of all numbers of tokens by the validation split",
    row="model.backbone",
    rows={"xlstm[1:0]": "xLSTM[1:0]", "transformer": "Transformer"},
    column="model.dim",
    columns={str(dim): f"width {dim}" for dim in (16, 32, 64, 128, 256, 512, 768, 1024)},
    metric="test_loss",
    select="valid_loss",
    aggregate="mean",
    lower_is_better=True,
    digits=3,
    differences="No paper reports this grid. {config[model][num_layers]} blocks, {swept[steps]} steps of "
    "{config[batch_size]} x {config[task][seq_len]} bytes, learning rate {config[optimizer][learning_rate]:g}.",
)
