"""Which gates the mLSTM needs, on the King James Bible: xLSTM (arXiv 2405.04517), Tab. 2 (bottom), at small scale.

    CONFIG=configs/papers/xlstm_gating.py:reduced
    python -m experiments.sweep run --config=$CONFIG --workdir=runs/gating --launcher=local
    python -m experiments.table     --config=$CONFIG --workdir=runs/gating

| argument  | runs                                                      | time                    |
|-----------|-----------------------------------------------------------|-------------------------|
| `demo`    | no gates and both gates, 200 steps                        | 3 minutes on 2 cores    |
| `reduced` | xLSTM[1:0] with 8 kinds of gates, 2 seeds                 | 2 hours on 2 cores      |
| `paper`   | the same with 24 blocks of width 512 and 20,000 steps     | hours a run, H100       |

`debug` shrinks every run to seconds. Protocol and sizes are those of `xlstm_ablations.py`, of which this is the row
xLSTM[1:0]. The paper's perplexities are of 400 million parameters on SlimPajama.
"""

import itertools

from ml_collections import ConfigDict

from configs import common
from configs.papers import xlstm_ablations

OPEN = 1_000.0  # a forget bias at which sigmoid is 1, the paper's infinity
GATES = {  # label: the forget gate depends on, the input gate on, bias of the forget gate, of the input gate
    "none": ("constant", "constant", OPEN, 0.0),
    "none, forgetting": ("constant", "constant", "linspace(3, 6)", 0.0),
    "forget": ("inputs", "constant", "linspace(3, 6)", 0.0),
    "input": ("constant", "inputs", "linspace(3, 6)", "normal(0.1)"),
    "forget bias": ("bias", "constant", "linspace(3, 6)", 0.0),
    "both biases": ("bias", "bias", "linspace(3, 6)", "normal(0.1)"),
    "forget, input bias": ("inputs", "bias", "linspace(3, 6)", "normal(0.1)"),
    "both": ("inputs", "inputs", "linspace(3, 6)", "normal(0.1)"),
}
PRESETS = xlstm_ablations.PRESETS
SHOWN = {"demo": ("none, forgetting", "both"), "reduced": GATES, "paper": GATES}


def get_config(arg: str | None = None) -> ConfigDict:
    """One run: xLSTM[1:0] with both gates."""
    preset, debug = common.parse_arg(arg, PRESETS)
    config = xlstm_ablations.get_config(arg).unlock()
    config.label = "both"
    config.model.backbone = "xlstm[1:0]"
    if not debug:
        config.model.dim = PRESETS[preset]["dim"] or xlstm_ablations.STEPS["matrix memory"][1]
    return config.lock()


def sweep(arg: str | None = None):
    """Every run of the table."""
    preset, _ = common.parse_arg(arg, PRESETS)
    for label, seed in itertools.product(SHOWN[preset], PRESETS[preset]["seeds"]):
        names = ("forget_gate_of", "input_gate_of", "forget_bias", "input_bias")
        yield {"label": label} | {f"+model.{n}": value for n, value in zip(names, GATES[label])} | {"seed": seed}


expected_seconds = xlstm_ablations.expected_seconds

TABLE = dict(
    title="Gates of the mLSTM: bits a byte on the Bible's test split",
    row="label",
    rows={
        "none": "no gates, forget bias infinite",
        "none, forgetting": "no gates, forget bias in [3, 6]",
        "forget bias": "learned forget bias",
        "both biases": "learned forget and input bias",
        "input": "input gate",
        "forget": "forget gate",
        "forget, input bias": "forget gate, learned input bias",
        "both": "forget and input gate",
    },
    column="task.name",
    columns={"byte_lm": "Bits a byte"},
    metric="test_bits_per_byte",
    aggregate="mean",
    lower_is_better=True,
    digits=3,
    paper=dict(
        name="paper, perplexity",
        source="xLSTM (arXiv 2405.04517), Tab. 2: validation perplexity a token on SlimPajama 15B; without gates and "
        "with an infinite forget bias the training diverged",
        values={
            ("none, forgetting", "byte_lm"): 13.95,
            ("forget", "byte_lm"): 13.58,
            ("input", "byte_lm"): 13.69,
            ("forget bias", "byte_lm"): 13.76,
            ("both biases", "byte_lm"): 13.73,
            ("forget, input bias", "byte_lm"): 13.55,
            ("both", "byte_lm"): 13.43,
        },
        missing="diverged",
    ),
    protocol=xlstm_ablations.TABLE["protocol"],
    differences=xlstm_ablations.TABLE["differences"].replace("widths {swept[model.dim]}", "width {config[model][dim]}"),
)
