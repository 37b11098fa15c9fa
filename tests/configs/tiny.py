"""A run of seconds, for the tests of the command line: `--config=tests/configs/tiny.py[:lm]`."""

from ml_collections import ConfigDict


def get_config(arg=None):
    if arg not in (None, "", "lm"):
        raise ValueError(f"tiny.py takes no argument or lm, not {arg!r}")
    config = ConfigDict()
    config.kind = "lm" if arg else "tagger"
    config.model = dict(backbone="elman", dim=8, num_layers=1, dropout=0.1)
    config.task = dict(name="byte_lm", seq_len=16, carries_state=True) if arg else dict(name="parity", num_eval=16)
    config.optimizer = dict(name="adamw", learning_rate=3e-3, warmup_steps=2, schedule="cosine", weight_decay=0.1)
    config.steps = 20
    config.batch_size = 8
    config.eval_batch_size = 64 if arg else 8
    config.seed = 0
    config.eval_every = 0
    config.save_every = 5
    config.log_every = 4
    config.steps_per_dispatch = 3
    return config.lock()
