"""Images pixel by pixel, in order and permuted: the TCN paper's Table 1 (arXiv 1803.01271).

    CONFIG=configs/papers/pixels.py:reduced
    python -m experiments.sweep run --config=$CONFIG --workdir=runs/pixels --launcher=local
    python -m experiments.table     --config=$CONFIG --workdir=runs/pixels

| argument  | runs                                                              | time                      |
|-----------|-------------------------------------------------------------------|---------------------------|
| `demo`    | LSTM, Fashion-MNIST pooled to 7 x 7, in order, 300 steps          | about a minute on 2 cores |
| `reduced` | LSTM and GRU, Fashion-MNIST pooled to 14 x 14, in order, permuted | about an hour on 2 cores  |
| `paper`   | LSTM and GRU, 784 pixels, in order and permuted, 10 passes        | an hour a run, H100       |

Fashion-MNIST is read from the idx files of Debian's dataset-fashion-mnist (or of the data folder). `mnist` after the
preset is MNIST, from idx files in the data folder; `--config.task.images=tfds:mnist` from what tensorflow-datasets
prepared. `debug` shrinks every run to seconds. The paper's numbers are MNIST's, which is the easier set.
"""

import itertools

from ml_collections import ConfigDict

from configs import common

IMAGES = ("fashion_mnist", "mnist")
MODELS = ("lstm", "gru")
FORGET_BIAS = {False: 1.0, True: 10.0}  # of the LSTM in order and permuted, as in the paper
PRESETS = {
    "demo": dict(models=("lstm",), orders=(False,), pool=4, dim=64, steps=300, seconds=40),
    "reduced": dict(models=MODELS, orders=(False, True), pool=2, dim=96, steps=3_000, seconds=900),
    "paper": dict(models=MODELS, orders=(False, True), pool=1, dim=130, steps=8_590, seconds=3_600),  # 10 passes
}


def get_config(arg: str | None = None) -> ConfigDict:
    """One run: the LSTM, pixels in order."""
    preset, images, debug = common.parse_arg(arg, PRESETS, IMAGES)
    numbers = PRESETS[preset]
    config = ConfigDict()
    config.kind = "features"
    config.model = dict(backbone="lstm", dim=numbers["dim"], num_layers=1, dropout=0.0, final_norm="none")
    config.task = dict(name="pixels", images=images, data_dir="", permuted=False, pool=numbers["pool"])
    config.optimizer = dict(
        name="adamw",
        learning_rate=2e-3,
        warmup_steps=numbers["steps"] // 20,
        schedule="cosine",
        min_learning_rate=2e-5,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        clip=1.0,
    )
    config.steps = numbers["steps"]
    config.batch_size = 64
    config.seed = 0
    config.eval_every = config.save_every = max(numbers["steps"] // 5, 1)
    config.log_every = config.steps_per_dispatch = 50
    config.eval_batch_size = 250
    if debug:
        common.shrink(config)
        config.task.pool = 14
    return config.lock()


def sweep(arg: str | None = None):
    """Every run of the table."""
    preset, _, debug = common.parse_arg(arg, PRESETS, IMAGES)
    numbers = PRESETS[preset]
    for model, permuted in itertools.product(numbers["models"], numbers["orders"]):
        own = {"+model.forget_bias": FORGET_BIAS[permuted]} if model == "lstm" else {}
        yield {"model.backbone": model, "task.permuted": permuted} | own | {"seed": 0}


def expected_seconds(arg: str | None, overrides: dict) -> float:
    """On one of two CPU cores (paper: one H100); the sweep's time left begins from it."""
    preset, _, debug = common.parse_arg(arg, PRESETS, IMAGES)
    return 10 if debug else PRESETS[preset]["seconds"]


TABLE = dict(
    title="Images pixel by pixel: test accuracy",
    row="model.backbone",
    rows={"lstm": "LSTM", "gru": "GRU"},
    column="task.permuted",
    columns={"False": "In order", "True": "Permuted"},
    metric="test_accuracy",
    aggregate="mean",
    range=(0.0, 1.0),
    digits=3,
    paper=dict(
        name="paper, MNIST",
        source="TCN (arXiv 1803.01271), Tab. 1, on MNIST; a plain RNN has 0.215 and 0.253, the TCN 0.990 and 0.972",
        values={
            ("lstm", "False"): 0.872,
            ("gru", "False"): 0.962,
            ("lstm", "True"): 0.857,
            ("gru", "True"): 0.873,
        },
    ),
    protocol={"task.images": "mnist", "task.pool": 1, "model.dim": 130},
    differences="Paper: MNIST, 784 pixels, one layer of 130, clip 1, RMSprop 1e-3, forget bias 1 in order and 10 "
    "permuted (the GRU's settings are not known). Here: {config[task][images]}, pooled {config[task][pool]} x "
    "{config[task][pool]}, width {config[model][dim]}, Adam, learning rate {config[optimizer][learning_rate]:g} and "
    "cosine decay, {config[steps]:,} steps of batch {config[batch_size]}.",
)
