"""Character-level language models of tiny Shakespeare: nats a character on the last 10 %, the usual validation split.

    python -m experiments.sweep run --config=configs/shakespeare.py:reduced --workdir=runs/shakespeare --launcher=local
    python -m experiments.table     --config=configs/shakespeare.py:reduced --workdir=runs/shakespeare

`local:tinyshakespeare` is looked up in $XLSTM_JAX_DATA (`python -m experiments.data info local:tinyshakespeare` says
where it comes from). The split is nanoGPT's, 90/10, so that valid and test are the same text. Presets `demo` (a minute
or two) and `reduced` (up to an hour a model on 2 cores), the models of `text.py`; arguments as in `bible.py`.
"""

from ml_collections import ConfigDict

from configs import text

PRESETS = {
    "demo": dict(
        steps=300,
        batch_size=32,
        seq_len=64,
        learning_rate=4e-3,
        weight_decay=0.05,
        dropout=0.0,
        evaluations=3,
        models=text.MODELS,
        seconds=120,
    ),
    "reduced": dict(
        steps=3_000,
        batch_size=16,
        seq_len=128,
        learning_rate=4e-3,
        weight_decay=0.1,
        dropout=0.2,
        evaluations=6,
        models=text.with_rates(**{"Transformer": 2e-3}),
        seconds=2_400,
    ),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """One run: preset and model, say "reduced,lstm"; without a model the base of the sweep's rows."""
    preset, model, debug = text.parse_arg(arg, PRESETS)
    numbers = PRESETS[preset]
    task = dict(name="text_lm", corpus="local:tinyshakespeare", tokenizer="characters", data_dir="")
    base = text.config(numbers, task | {"seq_len": numbers["seq_len"]})
    return text.finish(base, numbers["models"], model, debug)


def sweep(arg: str | None = None):
    """Every model, or the one that the argument names."""
    preset, model, debug = text.parse_arg(arg, PRESETS)
    yield from text.rows(PRESETS[preset]["models"], model, debug)


def expected_seconds(arg: str | None, overrides: dict) -> float:
    """On one of two CPU cores; the sweep's time left begins from it."""
    preset, _, debug = text.parse_arg(arg, PRESETS)
    return 10 if debug else PRESETS[preset]["seconds"]


TABLE = dict(
    title="Tiny Shakespeare, character level: nats a character on the validation split (the last 10 %)",
    row="label",
    rows={label: label for label in text.MODELS},
    column="task.name",
    columns={"text_lm": "Nats a character"},
    metric="test_loss",
    aggregate="mean",
    digits=3,
    lower_is_better=True,
    # its README; the second after 2,000 steps of 12 x 64 characters; neither is of our size
    baselines={
        "nanoGPT, 10.7 million parameters, GPU": {"text_lm": 1.47},
        "nanoGPT, 0.8 million, CPU": {"text_lm": 1.88},
    },
    differences="{config[steps]:,} steps of {config[batch_size]} x {config[task][seq_len]} characters, "
    "one run a model.",
)
