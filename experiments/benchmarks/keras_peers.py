"""keras layers on its JAX backend, with our weights."""

from collections.abc import Callable

import jax.numpy as jnp
import keras
import numpy as np

from experiments.benchmarks import layers
from experiments.benchmarks.cases import Case
from experiments.benchmarks.layers import Data, Layer
from experiments.benchmarks.timing import Program
from xlstm_jax import convert


def rnn(case: Case, given: Data) -> Callable[[str], Program]:
    """keras LSTM, GRU, ConvLSTM2D or Bidirectional as a pure function of its weights."""
    if keras.backend.backend() != "jax":
        raise RuntimeError(f"keras runs on {keras.backend.backend()}: set KERAS_BACKEND=jax")
    H, ours, mask = case.sizes["H"], layers.cell(case, {}), None
    if case.kind == "convlstm":
        module = keras.layers.ConvLSTM2D(H, 3, padding="same", return_sequences=True)
    elif case.kind == "gru":
        module = keras.layers.GRU(H, return_sequences=True, reset_after=True)
    else:
        module = keras.layers.LSTM(H, return_sequences=True)
    each = [ours]
    if case.kind == "bilstm":
        module, each = keras.layers.Bidirectional(module), [ours.forward, ours.backward]
        mask = jnp.arange(case.sizes["T"])[None] < jnp.asarray(given.lengths)[:, None]
    module.build(given.inputs[0].shape)
    module.set_weights([np.asarray(a) for one in each for a in convert.to_keras(one).values()])
    params = [variable.value for variable in module.trainable_variables]
    rest = [variable.value for variable in module.non_trainable_variables]
    options = {} if mask is None else {"mask": mask}
    apply = lambda params, inputs: module.stateless_call(params, rest, *inputs, **options)[0]  # noqa: E731
    layer = Layer(apply, params, tuple(map(jnp.asarray, given.inputs)))
    return lambda pass_: layers.program(layer, pass_, given.cotangent)


PEERS = {
    "keras": {
        "lstm": {"keras LSTM": rnn},
        "gru": {"keras GRU": rnn},
        "bilstm": {"keras Bidirectional": rnn},
        "convlstm": {"keras ConvLSTM2D": rnn},
    }
}
