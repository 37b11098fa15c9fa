"""Compiles the Pallas kernels for TPUs, at the sizes of the shipped configs: -m tests.compile_for_tpu GROUP TOPOLOGY...

A JSON row for each topology and each size of a group, "text" (bible and shakespeare) or "scaling": the program of the
gradient, which has both kernels, held to the VMEM that the plan states, or why these sizes have no kernel. Widths,
heads, rows of a device and dtypes are read from the configs; of the steps in time there are 256, two blocks or chunks
at least, because they only set the grid.

A process of its own: libtpu ends one whose XLA_FLAGS has flags of the CPU compiler.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator

if __name__ == "__main__":
    import experiments.without_tpu  # noqa: F401

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from configs import bible, scaling, shakespeare, text
from xlstm_jax import models
from xlstm_jax.blocks import MLSTMLayer
from xlstm_jax.blocks_large import MLSTMLargeLayer
from xlstm_jax.cells.base import Cell, RecurrentCell
from xlstm_jax.cells.wrappers import layers_apart
from xlstm_jax.kernels import pallas_mlstm, pallas_plan
from xlstm_jax.kernels.choice import chosen_forms
from xlstm_jax.kernels.mlstm import mlstm

STEPS = 256
CHIPS = {  # that a model is planned on (configs/scaling.py)
    "xlstm_125m": 16,
    "xlstm_1.3b": 256,
    "xlstm_7b": 512,
    "lstm_1b": 64,
    "xlstm[7:1]_125m": 16,
    "xlstm[7:1]_1.3b": 256,
}
FLAGS = ("bible:demo, xlstm[1:1]", "xlstm[7:1]_125m")  # compiled with masks and resets


def shipped(group: str) -> Iterator[tuple[str, ConfigDict, int]]:
    """Name, config and rows of a device."""
    if group == "text":
        for module in (bible, shakespeare):
            for preset, numbers in module.PRESETS.items():
                for model in map(text.name, numbers["models"]):
                    config = module.get_config(f"{preset},{model}")
                    if config.model.backbone != "transformer":
                        yield f"{module.__name__.split('.')[-1]}:{preset}, {model}", config, config.batch_size
        return
    for name, chips in CHIPS.items():
        config = scaling.get_config(name)
        yield name, config, config.batch_size // chips
    config = scaling.get_config("xlstm_7b")
    with config.unlocked():
        config.model.update(input_gate="sigmoid", normalize=False)
    yield "xlstm_7b, sigmoid gate", config, config.batch_size // CHIPS["xlstm_7b"]


def mixers(config: ConfigDict) -> list[Cell]:
    """The layers of its model that have kernels, without weights."""
    options = config.model.to_dict() | {"vocab_size": 256, "form": "auto"}
    model = nnx.eval_shape(lambda: layers_apart(models.LM(**options, rngs=nnx.Rngs(0))))
    return [m for _, m in nnx.iter_graph(model) if isinstance(m, RecurrentCell | MLSTMLayer | MLSTMLargeLayer)]


def loss_of(mixer: Cell, B: int, dtype: str | None, flags: bool) -> tuple[Callable, tuple]:
    """A sum of the outputs of a recurrent layer, or of the memory of an mLSTM, and its arguments' shapes."""
    shaped, lead, dtype = jax.ShapeDtypeStruct, (B, STEPS), dtype or jnp.float32
    given = (shaped(lead, jnp.bool_) if flags else None,) * 2
    if isinstance(mixer, RecurrentCell):
        graphdef, params = nnx.split(mixer)

        def outputs(params, xs, *given):
            return nnx.merge(graphdef, params)(xs, None, *given)[0]

        arguments = params, shaped((*lead, *mixer.input_shape(None)), dtype)
    else:
        state = jax.eval_shape(lambda: mixer.initial_state(B))
        _, H, K, V = getattr(state, "memory", state).C.shape
        options = {name: getattr(mixer, name) for name in ("input_gate", "normalize") if hasattr(mixer, name)}

        def outputs(*args):
            *args, mask, reset = args
            options_of_all = dict(form=mixer.form, chunk_size=mixer.chunk_size, mask=mask, reset=reset)
            return mlstm(*args, **options_of_all, **options)[0]

        q, v, gate = (shaped((*lead, H, *width), kind) for *width, kind in ((K, dtype), (V, dtype), (jnp.float32,)))
        arguments = q, q, v, gate, gate
    return lambda *args: jnp.sum(outputs(*args).astype(jnp.float32)), (*arguments, *given)


def compiled(topology: str, loss: Callable, arguments: tuple, done: dict) -> dict:
    """What was chosen and why, bytes of VMEM, calls of kernels, seconds; of kernels in `done` what was found there."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    mesh = Mesh([device], ("x",))
    place = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments)
    differentiable = [n for n, a in enumerate(arguments[:-2])]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        (choice,) = chosen_forms(loss, *arguments)
        row = dict(form=choice.form, reason=choice.reason)
        if choice.form != "pallas":
            return row
        plan = choice.plan
        if hasattr(plan, "sizes"):  # features are filled up to whole lanes outside of the kernels
            plan = plan._replace(sizes=plan.sizes._replace(width=plan.sizes.lanes))
            if plan in done:
                return done[plan]
        start = time.time()
        program = jax.jit(jax.grad(loss, argnums=differentiable)).lower(*arguments).compile()
    row |= dict(vmem=choice.plan.vmem, kernels=program.as_text().count('"tpu_custom_call"'))
    row |= dict(bytes=choice.plan.bytes, set_aside=program.memory_analysis().temp_size_in_bytes)
    done[plan] = row | dict(seconds=round(time.time() - start, 1))
    return done[plan]


def held(plan_for: Callable) -> Callable:
    """The same plan, but no more VMEM for the compiler than is stated."""

    def plan(*args, **kwargs):
        planned = plan_for(*args, **kwargs)
        return planned if isinstance(planned, str) else planned._replace(budget=planned.vmem)

    return plan


if __name__ == "__main__":
    for module in (pallas_plan, pallas_mlstm):
        module.plan_for = held(module.plan_for)
    cases = {}  # of layers that differ in their rows alone the one with most
    for name, config, rows in sorted(shipped(sys.argv[1]), key=lambda case: -case[2]):
        for mixer in mixers(config):
            kind, shapes = type(mixer).__name__, jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(mixer)))
            case = f"{kind} of {name}", *loss_of(mixer, rows, config.model.get("dtype"), name in FLAGS)
            cases.setdefault((kind, str(shapes), getattr(mixer, "input_gate", "exp")), case)
    for topology in sys.argv[2:]:
        done = {}
        for name, loss, arguments in cases.values():
            row = compiled(topology, loss, arguments, done)
            print(json.dumps(dict(topology=topology, case=name) | row), flush=True)
