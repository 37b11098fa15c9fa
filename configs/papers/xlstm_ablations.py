"""From LSTM to xLSTM step by step, on the King James Bible: xLSTM (arXiv 2405.04517), Tab. 2, at small scale.

    CONFIG=configs/papers/xlstm_ablations.py:reduced
    python -m experiments.sweep run --config=$CONFIG --workdir=runs/ablations --launcher=local
    python -m experiments.table     --config=$CONFIG --workdir=runs/ablations

| argument  | runs                                                      | time                    |
|-----------|-----------------------------------------------------------|-------------------------|
| `demo`    | LSTM and xLSTM[1:0], 200 steps                            | 3 minutes on 2 cores    |
| `reduced` | 6 models of about 700 thousand parameters, 2 seeds        | 1 1/2 hours on 2 cores  |
| `paper`   | the same with 24 blocks of width 512 and 20,000 steps     | hours a run, H100       |

`debug` shrinks every run to seconds. The paper's perplexities are of 400 to 600 million parameters on SlimPajama. Its
ablation of the mLSTM's gates is `xlstm_gating.py`.
"""

import itertools

from ml_collections import ConfigDict

from configs import common

STEPS = {  # label: backbone, width of the reduced models, options
    "LSTM": ("lstm", 208, {}),
    "blocks": ("lstm_block", 152, {}),
    "exponential gates": ("xlstm[0:1]", 192, {}),
    "matrix memory": ("xlstm[1:0]", 160, {}),
    "both": ("xlstm[1:1]", 176, {}),
    "no convolution": ("xlstm[1:0]", 160, {"+model.conv_width": 0}),
}
PRESETS = {
    "demo": dict(models=("LSTM", "matrix memory"), layers=2, dim=64, steps=200, batch_size=16, seeds=(0,), seconds=60),
    "reduced": dict(models=STEPS, layers=2, dim=None, steps=1_500, batch_size=16, seeds=(0, 1), seconds=800),
    "paper": dict(models=STEPS, layers=24, dim=512, steps=20_000, batch_size=64, seeds=(0, 1), seconds=7_200),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """One run: the LSTM."""
    preset, debug = common.parse_arg(arg, PRESETS)
    numbers = PRESETS[preset]
    config = ConfigDict()
    config.kind = "lm"
    config.label = "LSTM"
    config.model = dict(
        backbone="lstm", dim=numbers["dim"] or STEPS["LSTM"][1], num_layers=numbers["layers"], dropout=0.0
    )
    config.task = dict(name="byte_lm", corpus="bundled:kjv", seq_len=128, carries_state=True)
    config.optimizer = dict(
        name="adamw",
        learning_rate=4e-3 if preset != "paper" else 1e-3,
        warmup_steps=numbers["steps"] // 20,
        schedule="cosine",
        min_learning_rate=1e-5,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        clip=1.0,
    )
    config.steps = numbers["steps"]
    config.batch_size = numbers["batch_size"]
    config.seed = 0
    config.eval_every = config.save_every = max(numbers["steps"] // 3, 1)
    config.log_every = config.steps_per_dispatch = 20
    config.eval_batch_size = 16
    if debug:
        common.shrink(config)
        config.model.num_layers, config.task.seq_len = 2, 16
    return config.lock()


def sweep(arg: str | None = None):
    """Every run of the table."""
    preset, debug = common.parse_arg(arg, PRESETS)
    numbers = PRESETS[preset]
    for label, seed in itertools.product(numbers["models"], numbers["seeds"]):
        backbone, dim, options = STEPS[label]
        own = {} if debug or numbers["dim"] else {"model.dim": dim}
        yield {"label": label, "model.backbone": backbone} | own | options | {"seed": seed}


def expected_seconds(arg: str | None, overrides: dict) -> float:
    """On one of two CPU cores (paper: one H100); the sweep's time left begins from it."""
    preset, debug = common.parse_arg(arg, PRESETS)
    return 10 if debug else PRESETS[preset]["seconds"]


TABLE = dict(
    title="From LSTM to xLSTM: bits a byte on the Bible's test split",
    row="label",
    rows={
        "LSTM": "LSTM",
        "blocks": "+ residual, norm, feed-forward: LSTM (Block)",
        "exponential gates": "+ exponential gates: xLSTM[0:1]",
        "both": "+ matrix memory: xLSTM[1:1] (paper: [7:1])",
        "matrix memory": "matrix memory alone: xLSTM[1:0]",
        "no convolution": "xLSTM[1:0] without convolution",
    },
    column="task.name",
    columns={"byte_lm": "Bits a byte"},
    metric="test_bits_per_byte",
    aggregate="mean",
    lower_is_better=True,
    digits=3,
    paper=dict(
        name="paper, perplexity",
        source="xLSTM (arXiv 2405.04517), Tab. 1, 2 and 8: validation perplexity a token on SlimPajama 15B; residual "
        "and norm without the up-projection of the block: 35.46",
        values={
            ("LSTM", "byte_lm"): 2417.86,
            ("blocks", "byte_lm"): 26.01,
            ("exponential gates", "byte_lm"): 17.70,
            ("both", "byte_lm"): 13.48,
            ("matrix memory", "byte_lm"): 13.43,
            ("no convolution", "byte_lm"): 15.41,
        },
    ),
    protocol={"task.seq_len": 2_048, "steps": 28_170, "batch_size": 256},
    differences="Paper: 400 to 600 million parameters, context 2,048, 28,170 steps of batch 256. Here: "
    "{config[model][num_layers]} layers of widths {swept[model.dim]}, {config[steps]:,} steps of {config[batch_size]} "
    "x {config[task][seq_len]} bytes, state carried over, learning rate {config[optimizer][learning_rate]:g}, seeds "
    "{swept[seed]}.",
)
