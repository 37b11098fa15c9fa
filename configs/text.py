"""What the configs of language models on text share: five models of equal size, and one run of truncated BPTT."""

from collections.abc import Iterable, Iterator

from ml_collections import ConfigDict

from configs import common
from experiments.planning import override

# 0.94 to 0.98 million parameters each with the 65 characters of tiny Shakespeare, 0.99 to 1.05 with 256 bytes.
MODELS = {
    "LSTM": {"model.backbone": "lstm", "model.dim": 416, "model.num_layers": 1, "+model.embedding_dim": 128},
    # AWD-LSTM (Merity et al. 2017, arXiv:1708.01009): tied weights, weight drop, AR and TAR; the rates for little data
    # and a small model are a tenth to a half of the paper's; its dropout of whole tokens (`embedding_dropout`) and
    # wider inner layers (`inner_dim`) are left out
    "AWD-LSTM": {
        "model.backbone": "lstm",
        "model.dim": 240,
        "model.num_layers": 2,
        "+model.tie_weights": True,
        "+model.weight_drop": 0.2,
        "+model.output_dropout": 0.1,
        "+task.ar": 0.2,
        "+task.tar": 0.1,
    },
    "xLSTM[1:0]": {"model.backbone": "xlstm[1:0]", "model.dim": 192, "model.num_layers": 4},
    "xLSTM[1:1]": {"model.backbone": "xlstm[1:1]", "model.dim": 192, "model.num_layers": 4},
    "Transformer": {"model.backbone": "transformer", "model.dim": 136, "model.num_layers": 4, "+model.context": 256},
}
SIZES = ("model.dim", "model.num_layers", "model.embedding_dim")


def name(label: str) -> str:
    """How a config's argument names a model: "awd_lstm" for AWD-LSTM."""
    return label.lower().replace("-", "_")


def with_rates(**rates: float) -> dict[str, dict]:
    """`MODELS`, some with a learning rate of their own."""
    return {
        label: overrides | ({"optimizer.learning_rate": rates[label]} if label in rates else {})
        for label, overrides in MODELS.items()
    }


def parse_arg(arg: str | None, presets: Iterable[str]) -> tuple[str, str | None, bool]:
    """Preset, the model that is named or None, debug."""
    names = [name(label) for label in MODELS]
    preset, model, debug = common.parse_arg(arg, presets, names)
    return preset, model if model in (arg or "").split(",") else None, debug


def config(numbers: dict, task: dict) -> ConfigDict:
    """The base of a sweep's rows: a small LSTM that belongs to no row, trained as `numbers` say on the task."""
    config = ConfigDict()
    config.kind = "lm"
    config.label = ""
    config.model = dict(backbone="lstm", dim=64, num_layers=1, dropout=numbers["dropout"])
    config.task = dict(task, carries_state=True)
    config.optimizer = dict(
        name="adamw",
        learning_rate=numbers["learning_rate"],
        warmup_steps=numbers["steps"] // 20,
        schedule="cosine",
        min_learning_rate=numbers["learning_rate"] / 100,
        weight_decay=numbers["weight_decay"],
        betas=(0.9, 0.99),
        clip=1.0,
    )
    config.steps = numbers["steps"]
    config.batch_size = numbers["batch_size"]
    config.seed = 0
    config.eval_every = config.save_every = max(numbers["steps"] // numbers["evaluations"], 1)
    config.log_every = 20
    # streams that a split is read in, each from an empty state: few, so that little is read cold
    config.eval_batch_size = 8
    config.steps_per_dispatch = 20
    return config


def finish(config: ConfigDict, models: dict[str, dict], model: str | None, debug: bool) -> ConfigDict:
    """The config locked; of the model that is named, if one is; in `debug` a run of seconds."""
    if debug:
        common.shrink(config)
        config.model.num_layers, config.task.seq_len = 2, 16
    (overrides,) = rows(models, model, debug) if model else ({},)
    return override(config, overrides)


def rows(models: dict[str, dict], model: str | None, debug: bool) -> Iterator[dict]:
    """The overrides of each model, or of the one that is named; `debug` leaves out its size."""
    if model and model not in map(name, models):
        raise ValueError(f"{model} has no row in this preset: {', '.join(map(name, models))} have")
    for label, overrides in models.items():
        if model in (None, name(label)):
            yield {"label": label} | {k: v for k, v in overrides.items() if not (debug and k.lstrip("+") in SIZES)}
