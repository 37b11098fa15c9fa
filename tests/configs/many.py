"""Runs of two steps that differ in the seed, for the tests of the launchers: `tests/configs/many.py[:NUMBER]`."""

from ml_collections import ConfigDict


def get_config(arg=None):
    config = ConfigDict()
    config.kind = "tagger"
    config.model = dict(backbone="elman", dim=4, num_layers=1, dropout=0.0)
    config.task = dict(name="parity", num_eval=4)
    config.optimizer = dict(name="adamw", learning_rate=3e-3, warmup_steps=0, schedule="cosine", weight_decay=0.1)
    config.steps = 2
    config.batch_size = config.eval_batch_size = 4
    config.seed = config.eval_every = 0
    config.save_every = config.log_every = config.steps_per_dispatch = 1
    return config.lock()


def sweep(arg=None):
    for seed in range(int(arg or 8)):
        yield {"seed": seed}
