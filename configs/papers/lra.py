"""Long Range Arena: ListOps generated, the others from files (Tay et al., arXiv 2011.04006; xLSTM, Tab. 5).

    CONFIG=configs/papers/lra.py:reduced
    python -m experiments.sweep run --config=$CONFIG --workdir=runs/lra --launcher=local
    python -m experiments.table     --config=$CONFIG --workdir=runs/lra

| argument  | runs                                                                     | time                        |
|-----------|--------------------------------------------------------------------------|-----------------------------|
| `demo`    | LSTM, ListOps of 5 to 24 tokens                                          | about a minute on 2 cores   |
| `reduced` | 4 models, ListOps of 16 to 96 tokens, depth 4, 1 seed                    | about 50 minutes on 2 cores |
| `paper`   | 4 models, ListOps of 500 to 2,000 tokens, 3 learning rates, 80,000 steps | hours a run, H100           |

`listops` (as without), `text`, `retrieval`, `image` or `pathfinder` after the preset takes the task. All but ListOps
are read from lra/NAME in the data folder: train.npz, valid.npz and test.npz (see `tasks.labelled`). `debug` shrinks
every run to seconds.
"""

import itertools

from ml_collections import ConfigDict

from configs import common

SETS = {  # blocks, width, batch, steps of the xLSTM paper; text, which it has not, as retrieval; image: in grey
    "listops": (8, 128, 32, 80_000),
    "text": (6, 128, 64, 100_000),
    "retrieval": (6, 128, 64, 100_000),
    "image": (6, 512, 64, 180_000),
    "pathfinder": (6, 192, 64, 500_000),
}
MODELS = {  # backbone: its own options; the Transformer's context is the longest sequence
    "lstm": {},
    "lstm_block": {},
    "xlstm[1:0]": {},
    "transformer": {"+model.context": 4096},
}
PRESETS = {
    "demo": dict(models=("lstm",), lengths=(5, 24), depth=3, samples=(2_000, 256), steps=300, seconds=40),
    "reduced": dict(models=MODELS, lengths=(16, 96), depth=4, samples=(20_000, 1_000), steps=2_500, seconds=800),
    "paper": dict(models=MODELS, lengths=(500, 2000), depth=10, samples=(96_000, 2_000), steps=None, seconds=14_400),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """One run: the LSTM."""
    preset, name, debug = common.parse_arg(arg, PRESETS, SETS)
    numbers = PRESETS[preset]
    blocks, dim, batch_size, steps = SETS[name]
    if numbers["steps"]:
        blocks, dim, batch_size, steps = 2, 64, 32, numbers["steps"]
    config = ConfigDict()
    config.kind = "tagger"
    config.model = dict(backbone="lstm", dim=dim, num_layers=blocks, dropout=0.0)
    if name == "listops":
        train, evaluation = (64, 8) if debug else numbers["samples"]
        lengths = (5, 12) if debug else numbers["lengths"]
        config.task = dict(name=name, lengths=lengths, max_depth=numbers["depth"], num_train=train, num_eval=evaluation)
    else:
        config.task = dict(name="labelled", folder=f"lra/{name}", data_dir="")
    rate = 1e-3 if preset == "paper" else 3e-3
    config.optimizer = dict(
        name="adamw",
        learning_rate=rate,
        warmup_steps=steps // 10,
        schedule="cosine",
        min_learning_rate=rate / 100,
        weight_decay=0.05,
        betas=(0.9, 0.99),
        clip=1.0,
    )
    config.steps = steps
    config.batch_size = batch_size
    config.seed = 0
    config.eval_every = config.save_every = max(steps // 5, 1)
    config.log_every = config.steps_per_dispatch = 50
    config.eval_batch_size = 100
    if debug:
        common.shrink(config)
    return config.lock()


def sweep(arg: str | None = None):
    """Every run of the table."""
    preset, _, debug = common.parse_arg(arg, PRESETS, SETS)
    rates = (1e-3, 6e-4, 1e-4) if preset == "paper" and not debug else (None,)
    for model, rate in itertools.product(PRESETS[preset]["models"], rates):
        own = {"optimizer.learning_rate": rate, "optimizer.min_learning_rate": rate / 100} if rate else {}
        yield {"model.backbone": model} | MODELS[model] | own | {"seed": 0}


def expected_seconds(arg: str | None, overrides: dict) -> float:
    """On one of two CPU cores (paper: one H100); the sweep's time left begins from it."""
    preset, _, debug = common.parse_arg(arg, PRESETS, SETS)
    return 10 if debug else PRESETS[preset]["seconds"]


COLUMNS = {name: "listops" if name == "listops" else f"labelled/lra/{name}" for name in SETS}
PAPER = {  # ListOps, retrieval, image, pathfinder
    "lstm": (0.275, "chance", 0.675, "chance"),
    "lstm_block": (0.495, 0.880, 0.690, "chance"),
    "xlstm[1:0]": (0.411, 0.906, 0.695, 0.919),
    "transformer": (0.379, 0.845, 0.541, 0.887),
}
TAY = {"listops": 0.3637, "text": 0.6427, "retrieval": 0.5746, "image": 0.4244, "pathfinder": 0.7140}


def by_column(index: int) -> dict[str, int]:
    """One of the paper's numbers in SETS."""
    return {COLUMNS[name]: numbers[index] for name, numbers in SETS.items() if name != "text"}


TABLE = dict(
    title="Long Range Arena: test accuracy (ListOps: chance 0.1, always the commonest value about 0.17)",
    row="model.backbone",
    rows={"lstm": "LSTM", "lstm_block": "LSTM (Block)", "xlstm[1:0]": "xLSTM[1:0]", "transformer": "Transformer"},
    column=("task.name", "task.folder"),
    columns={COLUMNS[name]: "ListOps" if name == "listops" else name.capitalize() for name in SETS},
    metric="test_accuracy",
    select="valid_accuracy",
    select_over=["optimizer.learning_rate"],
    aggregate="mean",
    range=(0.0, 1.0),
    digits=3,
    paper=dict(
        name="paper",
        source="xLSTM (arXiv 2405.04517), Tab. 5, ListOps of 500 to 2,000 tokens, images in grey; xLSTM: better of "
        "[0:1] (image) and [1:0] (the others); Transformer: Llama; chance: not above it",
        values={
            (model, COLUMNS[name]): value
            for model, values in PAPER.items()
            for name, value in zip(("listops", "retrieval", "image", "pathfinder"), values)
        },
        missing="the paper has no text",
    ),
    references=[
        dict(
            name="LRA",
            source="Tay et al. (arXiv 2011.04006): bidirectional Transformer",
            values={("transformer", COLUMNS[name]): value for name, value in TAY.items()},
        )
    ],
    protocol={
        "model.num_layers": by_column(0),
        "model.dim": by_column(1),
        "batch_size": by_column(2),
        "steps": by_column(3) | {COLUMNS["text"]: "not run"},
    },
    differences="Paper: the best of 3 learning rates and 2 schedules. Here: {config[model][num_layers]} blocks of "
    "width {config[model][dim]}, batch {config[batch_size]}, {config[steps]:,} steps, learning rate "
    "{swept[optimizer.learning_rate]}, task {config[task]}.",
)
