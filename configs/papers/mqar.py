"""Multi-query associative recall: Zoology (arXiv 2312.04927), Fig. 2; xLSTM (arXiv 2405.04517), Fig. 5, 14, 15, 16.

    CONFIG=configs/papers/mqar.py:reduced
    python -m experiments.sweep run --config=$CONFIG --workdir=runs/mqar --launcher=local
    python -m experiments.table     --config=$CONFIG --workdir=runs/mqar

| argument        | runs                                                                  | time                  |
|-----------------|-----------------------------------------------------------------------|-----------------------|
| `demo`          | mLSTM and LSTM, 4 pairs, 1 seed                                       | 2 minutes on 2 cores  |
| `reduced`       | 6 models, 4 and 8 pairs, 1 seed                                       | 40 minutes on 2 cores |
| `paper`         | 6 models, 4, 8 and 16 pairs, 4 widths, 4 learning rates: experiment 1 | an hour a run, H100   |
| `long`          | contexts of 756 to 2,048, 48 to 256 pairs: experiment 2               | hours a run, H100     |
| `extrapolation` | context 2,048, tested at 4,096, 6,144 and 8,192: experiment 3         | hours a run, H100     |

`debug` after a preset shrinks every run to seconds. The papers only plot their accuracies; their text says: attention
and both xLSTM with a matrix memory solve experiment 1 at all widths; sLSTM is better than the LSTM, both fall short.

Expected with `reduced`: mLSTM, xLSTM[1:1] and Transformer at least 0.99, LSTM below 0.5 with 8 pairs. (With 128 tokens
in place of 32 the Transformer only guesses among the row's values: results/mqar_reduced/tried.jsonl.)
"""

import itertools

from ml_collections import ConfigDict

from configs import common

MODELS = {  # backbone: its own options
    "lstm": {},
    "gru": {},
    "xlstm[0:1]": {},
    "xlstm[1:0]": {},
    "xlstm[1:1]": {},
    "transformer": {"+model.num_heads": 1},
}
BATCH = {64: 512, 128: 512, 256: 256, 756: 128, 1024: 96, 2048: 24}  # by context, as in the xLSTM paper
SAMPLES, EPOCHS = 100_000, 64  # as many drawn samples as the papers' fixed ones are seen
RATES = (1e-2, 2.15e-3, 4.6e-4, 1e-4)
AT_24 = (1e-3, 2.2e-4, 5e-5, 1e-5)  # with batches of 24

PRESETS = {
    "demo": dict(
        models=("lstm", "xlstm[1:0]"), grid=[(64, 4, 0)], dims=(64,), vocab_size=64, steps=400, rate=5e-3, seconds=60
    ),
    "reduced": dict(
        models=MODELS, grid=[(64, 4, 0), (64, 8, 0)], dims=(64,), vocab_size=32, steps=1_500, rate=2e-3, seconds=250
    ),
    "paper": dict(models=MODELS, grid=[(64, 4, 0), (128, 8, 0), (256, 16, 0)], dims=(64, 128, 256, 512)),
    "long": dict(
        models=MODELS, grid=[(c, p, 0) for c in (756, 1024, 2048) for p in (48, 96, 256)], dims=(128, 256, 512)
    ),
    "extrapolation": dict(
        models=MODELS, grid=[(2048, 256, tested) for tested in (4096, 6144, 8192)], dims=(128, 256, 512)
    ),
}
FULL = dict(vocab_size=8192, seconds=3_600)  # of the papers' presets


def get_config(arg: str | None = None) -> ConfigDict:
    """One run: the preset's first model, context and width."""
    preset, debug = common.parse_arg(arg, PRESETS)
    numbers = FULL | PRESETS[preset]
    small = "steps" in numbers
    length, pairs, eval_length = numbers["grid"][0]
    config = ConfigDict()
    config.kind = "tagger"
    config.model = dict(backbone="lstm", dim=numbers["dims"][0], num_layers=2, dropout=0.0)
    config.task = dict(
        name="associative_recall",
        length=length,
        pairs=pairs,
        eval_length=eval_length,
        vocab_size=numbers["vocab_size"],
        num_eval=512 if small else 3_000,
    )
    config.batch_size = 32 if small else BATCH[length]
    config.steps = numbers.get("steps", SAMPLES * EPOCHS // config.batch_size)
    rate = numbers.get("rate", RATES[0])
    config.optimizer = dict(
        name="adamw",
        learning_rate=rate,
        warmup_steps=config.steps // 10,
        schedule="cosine",
        min_learning_rate=rate / 100,
        weight_decay=0.01 if small else 0.1,
        betas=(0.9, 0.98) if small else (0.9, 0.999),
        clip=1.0,
    )
    config.seed = 0
    config.eval_every = config.save_every = max(config.steps // 5, 1)
    config.log_every = config.steps_per_dispatch = 50
    config.eval_batch_size = min(config.batch_size * 2, 256)
    if debug:
        common.shrink(config)
        config.model.dim = numbers["dims"][0]  # a row of the table
        config.task.num_eval, config.task.vocab_size = 8, 2 * pairs + 2
    return config.lock()


def sweep(arg: str | None = None):
    """Every run of the table; contexts, widths and learning rates beside the models."""
    preset, debug = common.parse_arg(arg, PRESETS)
    numbers = FULL | PRESETS[preset]
    small = "steps" in numbers
    for (length, pairs, eval_length), model, dim in itertools.product(
        numbers["grid"], numbers["models"], numbers["dims"]
    ):
        overrides = {"task.length": length, "task.pairs": pairs, "model.backbone": model} | MODELS[model]
        if eval_length:
            overrides["task.eval_length"] = eval_length
        if model == "transformer":
            overrides["+model.context"] = max(length, eval_length)
        if debug:
            overrides["task.vocab_size"] = 2 * pairs + 2
            if dim == numbers["dims"][0]:
                yield overrides | {"seed": 0}
            continue
        overrides["model.dim"] = dim
        if small:
            yield overrides | {"seed": 0}
            continue
        batch_size = BATCH[length]
        steps = SAMPLES * EPOCHS // batch_size
        overrides |= {"batch_size": batch_size, "steps": steps, "optimizer.warmup_steps": steps // 10}
        for rate in AT_24 if batch_size == 24 else RATES:
            least = 1e-5 if rate <= 1e-4 else 1e-4  # of the papers' two the one below the rate
            rates = {"optimizer.learning_rate": rate, "optimizer.min_learning_rate": min(least, rate)}
            yield overrides | rates | {"seed": 0}


def expected_seconds(arg: str | None, overrides: dict) -> float:
    """On one of two CPU cores (papers' presets: one H100); the sweep's time left begins from it."""
    preset, debug = common.parse_arg(arg, PRESETS)
    return 10 if debug else (FULL | PRESETS[preset])["seconds"]


NAMES = {
    "lstm": "LSTM",
    "gru": "GRU",
    "xlstm[0:1]": "xLSTM[0:1] (sLSTM)",
    "xlstm[1:0]": "xLSTM[1:0] (mLSTM)",
    "xlstm[1:1]": "xLSTM[1:1]",
    "transformer": "Transformer",
}
TABLE = dict(
    title="Multi-query associative recall: accuracy on the queries",
    row=("model.backbone", "model.dim"),  # the papers plot the accuracy by the width
    rows={f"{model}/{dim}": f"{name}, width {dim}" for model, name in NAMES.items() for dim in (64, 128, 256, 512)},
    column=("task.length", "task.pairs", "task.eval_length"),
    columns={
        f"{length}/{pairs}/{tested}": f"{pairs} pairs in {length:,}" + (f", tested in {tested:,}" if tested else "")
        for preset in PRESETS.values()
        for length, pairs, tested in preset["grid"]
    },
    metric="test_accuracy",
    select="valid_accuracy",
    select_over=["optimizer.learning_rate"],
    aggregate="mean",
    range=(0.0, 1.0),
    digits=2,
    paper=dict(
        name="paper",
        source="xLSTM (arXiv 2405.04517), Fig. 5 and 14, Zoology (arXiv 2312.04927), Fig. 2",
        values={},
        missing="the papers show accuracies in images only; their text says that attention, xLSTM[1:0] and xLSTM[1:1] "
        "solve experiment 1 at all widths and that xLSTM[0:1] is better than the LSTM, both below those",
    ),
    protocol={
        "task.vocab_size": 8_192,
        "batch_size": list(BATCH.values()),
        "optimizer.learning_rate": [*RATES, *AT_24],
    },
    differences="Papers: contexts of 64, 128 and 256 with 4, 8 and 16 pairs, vocabulary 8,192, widths 64 to 512, "
    "100,000 samples seen 64 times in batches of 512 (256), best of 4 learning rates. Here: contexts of "
    "{swept[task.length]} with {swept[task.pairs]} pairs, vocabulary {config[task][vocab_size]:,}, 2 blocks of width "
    "{swept[model.dim]}, {config[steps]:,} steps of batch {config[batch_size]} of fresh samples, learning rate "
    "{swept[optimizer.learning_rate]}, seeds {swept[seed]}, {config[task][num_eval]:,} test samples.",
)
