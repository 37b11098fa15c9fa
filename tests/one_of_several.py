"""One process of those that train the stand-in together: python tests/one_of_several.py WORKDIR --processes=..."""

import sys
import time

import jax

from tests.stand_in import Recall, model
from xlstm_jax import distributed, optim, sharding, train


def fit(workdir, told=lambda: False, steps=44):
    """On two devices, of one process or of two."""
    with sharding.use(sharding.make_mesh({"data": 2}, jax.devices()[:2])):
        return train.fit(
            model(dropout=0.1),
            Recall(carries_state=True),
            optim.make(learning_rate=1e-2, steps=steps),
            **dict(steps=steps, batch_size=4, eval_every=20, save_every=8, log_every=3, eval_batch_size=8),
            **dict(workdir=workdir, steps_per_dispatch=4, progress=False, record={"id": "run"}, told=told),
        )


def main(workdir, processes):
    """The exit code."""
    distributed.join(processes.removeprefix("--processes="), wait=60, heartbeat=5)
    with distributed.Stop() as stop:

        def told():
            time.sleep(0.3)  # signals come while it trains
            return stop.told()

        try:
            fit(workdir, told)
        except train.Stopped as error:
            print(error, flush=True)
            return distributed.leave(distributed.AGAIN)
        except jax.errors.JaxRuntimeError as error:
            print(error, flush=True)
            return distributed.leave(1)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
