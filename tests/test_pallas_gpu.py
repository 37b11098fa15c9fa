"""The kernels for GPUs: interpreted against the plain scan, and lowered for cuda."""

import jax
import jax.numpy as jnp
import pytest
import test_pallas
from contract import close
from flax import nnx

from xlstm_jax import cells
from xlstm_jax.kernels import pallas_recurrent_gpu
from xlstm_jax.kernels.choice import chosen_forms

GPU = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu"))


@pytest.mark.parametrize("name", test_pallas.RULES)
def test_the_kernel_equals_the_scan(x64, name, monkeypatch):
    """Outputs, last state and all gradients, of 10 rows in tiles of 16."""
    rule, arrays, options, weights = test_pallas.case(name)
    monkeypatch.setattr(pallas_recurrent_gpu, "ON_CHIP", 2**19)  # float64 is for tests
    with jax.sharding.use_abstract_mesh(GPU):
        remat = rule is test_pallas.gru_rule
        got = test_pallas.run_recurrent(rule, arrays, options, weights, "pallas_interpret", remat)
    close(got, test_pallas.plain(name), 1e-10 if weights.dtype == jnp.float64 else 1e-5)


@pytest.mark.parametrize("options", [{}, {"input_gate": "sigmoid", "normalize": False}], ids=["exp", "sigmoid"])
def test_the_mlstm_kernel_equals_the_chunkwise_form(x64, options):
    with jax.sharding.use_abstract_mesh(GPU):
        got = test_pallas.run_mlstm("pallas_interpret", jnp.float64, **options)
    close(got, test_pallas.plain_mlstm(**options), 1e-10)


CASES = {
    "lstm": (cells.LSTM, 64, {}),
    "gru, bfloat16": (cells.GRU, 48, {"dtype": jnp.bfloat16}),
    "slstm, heads": (cells.SLSTM, 128, {"num_heads": 4}),
    "mlstm": (cells.MLSTM, 128, {"num_heads": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_both_kernels_lower_for_cuda(name):
    make, features, options = CASES[name]
    graphdef, params = nnx.split(make(32, features, form="pallas", rngs=nnx.Rngs(0), **options))
    flags = None if name == "lstm" else jnp.ones((4, 40), bool)

    def loss(params, xs):
        return jnp.sum(nnx.merge(graphdef, params)(xs, None, flags, flags)[0].astype(jnp.float32))

    arguments = params, jax.ShapeDtypeStruct((4, 40, 32), jnp.float32)
    with jax.sharding.use_abstract_mesh(GPU):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*arguments)
        assert traced.lower(lowering_platforms=("cuda",)).as_text().count("xla.gpu.triton") == 2
        (choice,) = chosen_forms(loss, *arguments)
        assert choice.form == "pallas"


def test_auto_on_a_gpu_and_what_does_not_fit():
    xs = jnp.ones((2, 5, 3))
    with jax.sharding.use_abstract_mesh(GPU):
        (choice,) = chosen_forms(cells.LSTM(3, 4, form="auto", rngs=nnx.Rngs(0)), xs)
        assert choice[:2] == ("fused", "no committed measurement shows the kernel to be faster on a GPU")
        message = r"form='pallas': 4 recurrent gates of a head of 512 features need \d+ bytes on the chip; 163840 may"
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(cells.LSTM(3, 512, recurrent_init="zeros", form="pallas", rngs=nnx.Rngs(0)), xs)
        with pytest.raises(ValueError, match=r"form='pallas': a memory of 256 x 256 numbers a head needs \d+ bytes"):
            jax.eval_shape(cells.MLSTM(3, 256, num_heads=1, form="pallas", rngs=nnx.Rngs(0)), xs)
