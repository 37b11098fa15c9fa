"""Compiles the Pallas kernels for the TPU topologies named on the command line; one JSON row a case.

A process of its own: libtpu ends one whose XLA_FLAGS has flags of the CPU compiler. Each compile is held to the VMEM
that `vmem_bytes` states.
"""

import json
import sys
import time

if __name__ == "__main__":
    import experiments.without_tpu  # noqa: F401

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xlstm_jax import cells
from xlstm_jax.kernels import pallas_mlstm, pallas_plan
from xlstm_jax.kernels.choice import chosen_forms

BFLOAT16 = {"dtype": jnp.bfloat16}
INPUTS = 64  # features: the products outside the kernels are not what is compiled here
CASES = {  # cell, (B, T, width), its options, with masks and resets
    "LSTM of the Bible's config": ("lstm", (32, 128, 448), {}, False),
    "sLSTM, bfloat16, masks": ("slstm", (16, 1024, 768), {"num_heads": 4} | BFLOAT16, True),
    "mLSTM of the Bible's config": ("mlstm", (32, 128, 384), {"num_heads": 4}, True),
    "mLSTM, 8 heads of 256 x 512, bfloat16": (
        "mlstm",
        (1, 4096, 4096),
        {"num_heads": 8, "qk_features": 2048, "chunk_size": 128, "input_gate": "sigmoid"} | BFLOAT16,
        False,
    ),
}
CONFIGS = [name for name in CASES if "config" in name]


def held(plan_for):
    """The same plan, but no more VMEM for the compiler than is stated."""

    def plan(*args, **kwargs):
        planned = plan_for(*args, **kwargs)
        return planned if isinstance(planned, str) else planned._replace(budget=planned.vmem)

    return plan


def compile_case(topology: str, name: str) -> dict:
    """The gradient's program, which has both kernels: what was chosen, bytes of VMEM, calls of kernels, seconds."""
    kind, (B, T, D), options, flags = CASES[name]
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    mesh = Mesh([device], ("x",))

    def shaped(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    cell = nnx.eval_shape(lambda: cells.CELLS[kind](INPUTS, D, form="auto", rngs=nnx.Rngs(0), **options))
    graphdef, params = nnx.split(cell)
    params = jax.tree.map(lambda a: shaped(a.shape, a.dtype), params)
    arguments = (params, shaped((B, T, INPUTS), jnp.float32), *(shaped((B, T), bool) if flags else None,) * 2)

    def loss(params, xs, mask, reset):
        return jnp.sum(nnx.merge(graphdef, params)(xs, None, mask, reset)[0].astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        (choice,) = chosen_forms(loss, *arguments)
        start = time.time()
        program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile().as_text()
    row = dict(topology=topology, case=name, form=choice.form, vmem=choice.plan.vmem)
    return row | dict(kernels=program.count('"tpu_custom_call"'), seconds=round(time.time() - start, 1))


for module in (pallas_plan, pallas_mlstm):
    module.plan_for = held(module.plan_for)
for number, topology in enumerate(sys.argv[1:]):
    for name in CASES if number == 0 else CONFIGS:  # the others on the first topology alone
        print(json.dumps(compile_case(topology, name)), flush=True)
