"""A search space odyssey: LSTM variants against the vanilla one, on JSB Chorales (Greff et al., arXiv 1503.04069).

    export XLSTM_JAX_DATA=DIR        # holds JSB_Chorales.mat
    CONFIG=configs/papers/odyssey.py:reduced
    python -m experiments.sweep run --config=$CONFIG --workdir=runs/odyssey --launcher=local
    python -m experiments.odyssey   --config=$CONFIG --workdir=runs/odyssey      # variants, and which setting matters

| argument  | runs                                                     | time                  |
|-----------|----------------------------------------------------------|-----------------------|
| `demo`    | 2 variants, 4 trials each, 2 passes over the data        | 4 minutes on 2 cores  |
| `reduced` | 9 variants, 12 trials each, 10 passes                    | 2 hours on 2 cores    |
| `paper`   | 9 variants, 200 trials each, 100 passes, rows of a piece | an hour a run, H100   |

`debug` shrinks every run to seconds. All variants are tried with the same settings. The paper's finding: none is much
better than the vanilla LSTM; without forget gate or output activation it is worse; the learning rate matters most.
"""

import random

from ml_collections import ConfigDict

from configs import common

VANILLA = {"peephole": True}  # the paper's has peepholes
VARIANTS = {  # options of the cell, changes to the vanilla one
    "V": {},
    "NIG": {"input_gate": False},
    "NFG": {"forget_gate": False},
    "NOG": {"output_gate": False},
    "NIAF": {"input_activation": False},
    "NOAF": {"output_activation": False},
    "NP": {"peephole": False},
    "CIFG": {"coupled": True},
    "FGR": {"gate_recurrence": True},
}
# field: smallest, largest, whether uniform in the logarithm. The paper: blocks 20 to 200, rates 1e-6 to 1e-2 and
# 1 - momentum 0.01 to 1 of SGD, noise on the inputs 0 to 1, for which dropout of inputs stands here
SEARCH = {
    "model.dim": (20, 200, True),
    "optimizer.learning_rate": (1e-4, 3e-2, True),
    "+model.input_dropout": (0.0, 0.5, False),
}
PRESETS = {
    "demo": dict(variants=("V", "NFG"), trials=4, passes=2, batch_size=8, max_frames=64, seconds=30),
    "reduced": dict(variants=VARIANTS, trials=12, passes=10, batch_size=8, max_frames=64, seconds=130),
    "paper": dict(variants=VARIANTS, trials=200, passes=100, batch_size=1, max_frames=0, seconds=3_600),
}
PIECES = 229


def get_config(arg: str | None = None) -> ConfigDict:
    """One run: the vanilla LSTM."""
    preset, debug = common.parse_arg(arg, PRESETS)
    numbers = PRESETS[preset]
    steps = PIECES // numbers["batch_size"] * numbers["passes"]
    config = ConfigDict()
    config.kind = "features"
    config.label = "V"
    config.model = dict(backbone="lstm", dim=100, num_layers=1, dropout=0.0, final_norm="none", peephole=True)
    config.task = dict(name="music", corpus="local:jsb", data_dir="", max_frames=numbers["max_frames"])
    config.optimizer = dict(
        name="adamw",
        learning_rate=3e-3,
        warmup_steps=0,
        schedule="cosine",
        min_learning_rate=0.0,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        clip=1.0,
    )
    config.steps = steps
    config.batch_size = numbers["batch_size"]
    config.seed = 0
    config.eval_every = config.save_every = 0
    config.log_every = config.steps_per_dispatch = 20
    config.eval_batch_size = 32
    if debug:
        common.shrink(config)
        config.task.max_frames = 8
    return config.lock()


def sweep(arg: str | None = None):
    """Every trial of every variant; trial n has the same settings in all of them."""
    preset, debug = common.parse_arg(arg, PRESETS)
    numbers, draw = PRESETS[preset], random.Random(0)
    trials = []
    for _ in range(numbers["trials"]):
        trial = {}
        for field, (low, high, logarithmic) in SEARCH.items():
            share = draw.random()
            value = low * (high / low) ** share if logarithmic else low + (high - low) * share
            trial[field] = round(value) if isinstance(low, int) else float(f"{value:.4g}")
        trials.append(trial)
    for name in numbers["variants"]:
        own = VANILLA | VARIANTS[name]
        options = {"model.peephole": own.pop("peephole")} | {f"+model.{option}": value for option, value in own.items()}
        for trial in trials[:2] if debug else trials:
            yield {"label": name} | options | trial | {"seed": 0}


def expected_seconds(arg: str | None, overrides: dict) -> float:
    """On one of two CPU cores (paper: one H100); the sweep's time left begins from it."""
    preset, debug = common.parse_arg(arg, PRESETS)
    return 10 if debug else PRESETS[preset]["seconds"]


TABLE = dict(
    title="LSTM variants on JSB Chorales: nats a frame on the test split, the best trial by the validation split",
    row="label",
    rows={
        "V": "vanilla (peepholes)",
        "NIG": "no input gate",
        "NFG": "no forget gate",
        "NOG": "no output gate",
        "NIAF": "no input activation",
        "NOAF": "no output activation",
        "NP": "no peepholes",
        "CIFG": "coupled input and forget gate",
        "FGR": "full gate recurrence",
    },
    column="task.corpus",
    columns={"local:jsb": "JSB Chorales"},
    metric="test_nll",
    select="valid_nll",
    aggregate="mean",
    lower_is_better=True,
    digits=2,
    paper=dict(
        name="paper",
        source="Greff et al. (arXiv 1503.04069), Fig. 3",
        values={},
        missing="the paper shows boxes only; on JSB it reports no variant significantly better than the vanilla one, "
        "NFG and NOAF worse",
    ),
    protocol={"optimizer.name": "sgd"},
    differences="Paper: one layer, 200 trials a variant, SGD with Nesterov momentum, width 20-200, learning rate 1e-6 "
    "to 1e-2, momentum 0 to 0.99, input noise 0 to 1, early stopping. Here: {config[steps]:,} steps of batch "
    "{config[batch_size]}, Adam with cosine decay, width 20-200, learning rate 1e-4 to 3e-2, input dropout 0 to 0.5.",
)
