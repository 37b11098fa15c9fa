"""Language models at the sizes of the xLSTM papers on TPU pods, to be planned before they are paid for.

    python -m experiments.plan  --config=configs/scaling.py:xlstm_1.3b --topology=v5e:16x16
    python -m experiments.train --config=configs/scaling.py:xlstm_1.3b --workdir=runs/large

| argument     | model                                         | batch x steps in time | planned on             |
|--------------|-----------------------------------------------|-----------------------|------------------------|
| `xlstm_125m` | xLSTM[1:0] 125M (arXiv:2405.04517, table 3)   | 256 x 2,048           | v5e:4x4                |
| `xlstm_1.3b` | xLSTM[1:0] 1.3B                               | 512 x 2,048           | v5e:16x16              |
| `xlstm_7b`   | xLSTM 7B (arXiv:2503.13427)                   | 512 x 8,192           | v5p:8x8x8, v5e:16x16*2 |
| `lstm_1b`    | 24 LSTM blocks of width 2,048                 | 512 x 2,048           | v4:4x4x4               |

Or any of `models.SIZES`, in small letters and with "_" for the space: `"xlstm[7:1]_350m"`, `llama_1.3b`,
`xlstm_large_160m`. Published are their widths, blocks and heads, for the xLSTM paper's also 256 x 2,048 (1.3B: 512 x
2,048) and for xLSTM[a:b] and xLSTM 7B the learning rates (2.7B: that of 15 billion tokens); all else is as above.

The corpus is a file of token ids, `tokens.npy`, until `--config.task.corpus` names another. `debug` after any of them
shrinks it to seconds. The numbers of steps are those of 300 billion tokens (7B: of 2.3 trillion). `config.mesh` divides
over the axes of `xlstm_jax.sharding`. `--config.model.backbone="xlstm[7:1]"` has sLSTM blocks too; eight blocks are
compiled then instead of one.
"""

from ml_collections import ConfigDict

from configs import common
from xlstm_jax import models

LARGE = dict(chunk_size=128, num_heads=8, logit_cap=30.0)
MODELS = {  # model, (rows, steps in time), tokens, mesh
    "xlstm_125m": (dict(backbone="xlstm[1:0]", dim=768, num_layers=24, num_heads=4), (256, 2048), 300e9, dict(fsdp=-1)),
    "xlstm_1.3b": (
        dict(backbone="xlstm[1:0]", dim=2048, num_layers=48, num_heads=4),
        (512, 2048),
        300e9,
        dict(fsdp=-1),
    ),
    "xlstm_7b": (
        dict(backbone="xlstm_large", dim=4096, num_layers=32, **LARGE),
        (512, 8192),
        2.3e12,
        dict(data=-1, fsdp=256),
    ),
    "lstm_1b": (dict(backbone="lstm_block", dim=2048, num_layers=24), (512, 2048), 300e9, dict(fsdp=-1)),
}
RATES = {"125m": 1.5e-3, "350m": 7.5e-4, "760m": 6.25e-4, "1.3b": 5e-4, "2.7b": 8e-4}


def spelled(size: str) -> str:
    """How the argument names a size: "xlstm[7:1]_350m" for "xlstm[7:1] 350M"."""
    return size.lower().replace(" ", "_")


def published(size: str) -> tuple[dict, tuple[int, int], float, dict]:
    """What `MODELS` has of a model, for one of `models.SIZES`."""
    model = {name: value for name, value in models.SIZES[size].items() if name != "vocab_size"}
    if size == "xlstm_large 7B":
        return model, *MODELS["xlstm_7b"][1:]
    return model, (512 if model["dim"] >= 2048 else 256, 2048), 300e9, dict(fsdp=-1)


def learning_rate(name: str) -> float:
    """Published where that is known."""
    family, _, size = name.rpartition("_")
    if family in ("xlstm[1:0]", "xlstm[7:1]"):
        return RATES[size]
    return 5e-4 if name == "xlstm_large_7b" else 7e-4


def get_config(arg: str | None = None) -> ConfigDict:
    """One model."""
    sizes = {spelled(size): size for size in models.SIZES}
    name, debug = common.parse_arg(arg, (*MODELS, *sizes))
    model, (rows, seq_len), tokens, mesh = published(sizes[name]) if name in sizes else MODELS[name]
    config = ConfigDict()
    config.kind = "lm"
    config.model = dict(model, dtype="bfloat16", layer_remat="layer", dropout=0.0)
    config.task = dict(
        name="text_lm", corpus="file:tokens.npy", tokenizer="ids:50304", seq_len=seq_len, carries_state=False
    )
    config.steps = int(tokens / (rows * seq_len))
    config.optimizer = dict(
        name="adamw", learning_rate=learning_rate(name), warmup_steps=750, weight_decay=0.1, betas=(0.9, 0.95), clip=0.5
    )
    config.batch_size = config.eval_batch_size = rows
    config.seed = 0
    config.log_every, config.steps_per_dispatch, config.save_every, config.eval_every = 20, 10, 1000, 5000
    config.mesh = dict(mesh)
    if debug:
        common.shrink(config)
        config.model.num_layers = 2
        if name in sizes and "num_heads" in config.model:
            config.model.num_heads = 4
        if "slstm_at" in config.model:
            config.model.slstm_at = (1,)
        config.task.seq_len, config.batch_size, config.eval_batch_size = 16, 8, 8
        config.mesh = dict(data=-1)
    return config.lock()
