"""A run folder of kind lm over bytes, with parameters as they start: what a run leaves behind, without training it."""

import json
from pathlib import Path

from flax import nnx

from experiments.build import build_model, build_task, resolve
from tests.configs import tiny
from xlstm_jax.checkpoint import Checkpoints


def write(folder: Path, **model) -> Path:
    """model: options over those of tests/configs/tiny.py."""
    plain = resolve(tiny.get_config("lm"))
    plain["model"] |= model
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": plain}))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(1, {"params": nnx.state(build_model(plain, build_task(plain), 0))})
    return folder
