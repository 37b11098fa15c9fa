"""What the configs share: reading the one string argument, and the `debug` shrinking."""

from collections.abc import Iterable

from ml_collections import ConfigDict


def parse_arg(arg: str | None, *groups: Iterable[str]) -> tuple[str | bool, ...]:
    """Splits "reduced,lstm,debug" into one word of each group (its first word where none is named) and the debug flag.

    >>> parse_arg("paper,debug", ("demo", "reduced", "paper"))
    ("paper", True)
    """
    groups = [tuple(group) for group in groups]
    chosen, debug = [None] * len(groups), False
    for word in filter(None, (arg or "").split(",")):
        index = next((i for i, group in enumerate(groups) if word in group and chosen[i] is None), None)
        if word == "debug":
            debug = True
        elif index is not None:
            chosen[index] = word
        else:
            valid = "; one of ".join("|".join(group) for group in groups)
            raise ValueError(f"config argument {word!r} in {arg!r}: wanted are one of {valid}; and debug")
    return *(word or group[0] for word, group in zip(chosen, groups)), debug


def shrink(config: ConfigDict) -> ConfigDict:
    """The same run in seconds: a few steps of a tiny model."""
    config.model.dim, config.batch_size, config.eval_batch_size = 16, 4, 8
    config.steps, config.optimizer.warmup_steps = 4, 1
    config.eval_every = config.save_every = config.log_every = config.steps_per_dispatch = 2
    return config
