"""Polyphonic music with LSTM and GRU: the TCN paper's Table 1 (Bai, Kolter and Koltun 2018, arXiv 1803.01271).

    export XLSTM_JAX_DATA=DIR        # holds JSB_Chorales.mat (and Nottingham.mat); experiments.data prepare gets them
    CONFIG=configs/papers/tcn_music.py:reduced
    python -m experiments.sweep run --config=$CONFIG --workdir=runs/music --launcher=local
    python -m experiments.table     --config=$CONFIG --workdir=runs/music

| argument  | runs                                                            | time                        |
|-----------|-----------------------------------------------------------------|-----------------------------|
| `demo`    | LSTM and GRU, 1 seed, 2 passes over the data                    | about a minute on 2 cores   |
| `reduced` | LSTM (2 forget biases) and GRU, 2 regularisations, 60 passes    | 40 minutes on 2 cores       |
| `paper`   | the same, 3 learning rates, 3 seeds, 120 passes                 | some minutes a run, H100    |

`jsb` (as without) or `nottingham` after the preset takes the set; `debug` shrinks every run to seconds. As in the paper
the weights of the pass that is best on the validation split are those tested.

Expected with `reduced`: 8.40 nats a frame on JSB for the LSTM, 8.54 for the GRU, where the keys' frequencies alone give
11.06 (Nottingham: 10.25).
"""

import itertools

from ml_collections import ConfigDict

from configs import common

SETS = {  # training pieces; settings of Table 2 of the paper's appendix, the LSTM's (the GRU's are not known)
    "jsb": dict(corpus="local:jsb", pieces=229, layers=2, dim=200, dropout=0.2, clip=1.0, forget_bias=10.0),
    "nottingham": dict(
        corpus="local:nottingham", pieces=694, layers=3, dim=280, dropout=0.1, clip=0.5, forget_bias=1.0
    ),
}
PLAIN, DROPPED = {}, {"model.dropout": 0.5, "+model.weight_drop": 0.5}  # the paper's dropout; more, and of R's weights
PRESETS = {  # seconds: of a pass
    "demo": dict(batch_size=16, passes=2, seeds=(0,), rates=(4e-3,), drops=(PLAIN,), max_frames=64, seconds=6),
    "reduced": dict(
        batch_size=1, passes=60, seeds=(0,), rates=(3e-3,), drops=(PLAIN, DROPPED), max_frames=64, seconds=6
    ),
    "paper": dict(
        batch_size=1,
        passes=120,
        seeds=(0, 1, 2),
        rates=(1e-2, 3e-3, 1e-3),
        drops=(PLAIN, DROPPED),
        max_frames=0,
        seconds=9,
    ),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """One run: the LSTM."""
    preset, name, debug = common.parse_arg(arg, PRESETS, SETS)
    numbers, data = PRESETS[preset], SETS[name]
    one_pass = data["pieces"] // numbers["batch_size"]
    steps = one_pass * numbers["passes"]
    config = ConfigDict()
    config.kind = "features"
    config.model = dict(
        backbone="lstm", dim=data["dim"], num_layers=data["layers"], dropout=data["dropout"], final_norm="none"
    )
    config.task = dict(name="music", corpus=data["corpus"], data_dir="", max_frames=numbers["max_frames"])
    config.optimizer = dict(
        name="adamw",
        learning_rate=numbers["rates"][0],
        warmup_steps=min(steps // 10, 100),
        schedule="cosine",
        min_learning_rate=numbers["rates"][0] / 100,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        clip=data["clip"],
    )
    config.steps = steps
    config.batch_size = numbers["batch_size"]
    config.seed = 0
    config.eval_every, config.save_every = one_pass, max(steps // 4, 1)
    config.keep_best = "nll"
    config.log_every = config.steps_per_dispatch = 20
    config.eval_batch_size = 32
    if debug:
        common.shrink(config)
        config.task.max_frames = 8
    return config.lock()


def sweep(arg: str | None = None):
    """Every run of the table; the seeds of one setting follow each other, so that they share a compiled program."""
    preset, name, debug = common.parse_arg(arg, PRESETS, SETS)
    numbers, data = PRESETS[preset], SETS[name]
    settings = [{"model.backbone": "gru"}]
    for forget_bias in sorted({data["forget_bias"], 1.0}):  # 10 keeps what it should forget for very long
        settings.append({"model.backbone": "lstm", "+model.forget_bias": forget_bias})
    choices = itertools.product(settings, numbers["drops"], numbers["rates"], numbers["seeds"])
    for own, drops, rate, seed in choices:
        yield own | drops | {"optimizer.learning_rate": rate, "seed": seed}


def expected_seconds(arg: str | None, overrides: dict) -> float:
    """On one of two CPU cores (paper: one H100); the sweep's time left begins from it."""
    preset, name, debug = common.parse_arg(arg, PRESETS, SETS)
    numbers, data = PRESETS[preset], SETS[name]
    if debug:
        return 10
    return 10 + numbers["seconds"] * numbers["passes"] * data["pieces"] / 229


TABLE = dict(
    title="Polyphonic music: negative log-likelihood in nats a frame on the test split",
    row="model.backbone",
    rows={"lstm": "LSTM", "gru": "GRU"},
    column="task.corpus",
    columns={"local:jsb": "JSB Chorales", "local:nottingham": "Nottingham"},
    metric="test_nll",
    select="valid_nll",  # chooses regularisation, learning rate and the LSTM's forget bias
    aggregate="mean",
    lower_is_better=True,
    digits=2,
    protocol={"batch_size": 1, "task.max_frames": 0},
    paper=dict(
        name="paper",
        source="TCN (arXiv 1803.01271), Tab. 1; a plain RNN has 8.91 and 4.05, the TCN 8.10 and 3.07",
        values={
            ("lstm", "local:jsb"): 8.45,
            ("gru", "local:jsb"): 8.43,
            ("lstm", "local:nottingham"): 3.29,
            ("gru", "local:nottingham"): 3.46,
        },
    ),
    differences="Paper: rows of one piece, SGD or Adam, the best epoch by the validation split, models of about 300 "
    "thousand parameters (JSB) and 1 million (Nottingham), LSTM of 2 layers of 200 (3 of 280), dropout 0.2 (0.1), clip "
    "1 (0.5), forget bias 10 (JSB; not given for Nottingham: 1); settings of the GRU not known, here the LSTM's. Here: "
    "rows of {config[batch_size]}, at most {config[task][max_frames]} frames of a piece in training (0: all), Adam, "
    "learning rate {swept[optimizer.learning_rate]} and cosine decay over {config[steps]:,} steps, the best pass, "
    "regularisation (the paper's dropout, or 0.5 and half of the recurrent weights dropped) and the LSTM's forget bias "
    "(the paper's or 1) chosen on the validation split, seeds {swept[seed]}; dropout on outputs of layers.",
)
