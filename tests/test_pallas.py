"""The Pallas kernels: interpreted against the plain scan, compiled for TPUs, and how `form="auto"` chooses."""

import importlib.util
import json
import re
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import close
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from xlstm_jax import cells, models
from xlstm_jax.cells.gru import gru_rule
from xlstm_jax.kernels import pallas_plan
from xlstm_jax.kernels.choice import Target, choose, chosen_forms
from xlstm_jax.kernels.mlstm import initial_state, mlstm
from xlstm_jax.kernels.pallas_plan import Sizes, Tiles, plan, vmem_bytes
from xlstm_jax.kernels.recurrent import recurrent

B, T = 10, 11

RULES = {
    "gru: several heads, tiles of rows, blocks of time": (gru_rule, cells.gru.GRUState, 3, 2, 72, jnp.float64),
    "slstm: heads merged": (cells.slstm.slstm_rule, cells.slstm.SLSTMState, 4, 4, 6, jnp.float32),
}


def case(name):
    """Inputs that are gates, R, state and the rest of one rule."""
    rule, state, G, N, F, dtype = RULES[name]
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def draw(*shape):
        return jax.random.normal(next(keys), shape, dtype)

    start = state(*(abs(draw(B, N * F)) for _ in state._fields))
    params = (draw(1, N * F),) if rule is gru_rule else ()
    arrays = (draw(B, T, G, N * F), draw(N, F, G, F) * F**-0.5, start, draw(G, N * F), params)
    mask = jax.random.bernoulli(next(keys), 0.7, (B, T)).at[B - 1].set(False)
    reset = jax.random.bernoulli(next(keys), 0.2, (B, T))
    scale = jnp.where(jax.random.bernoulli(next(keys), 0.8, start.h.shape), 1.25, 0.0).astype(dtype)
    return rule, arrays, dict(mask=mask, reset=reset, reverse=rule is gru_rule, state_scale=scale), draw(B, T, N * F)


def run_recurrent(rule, arrays, options, weights, form, remat=False):
    """Outputs, last state and all gradients."""

    def loss(xs, R, state, b, params):
        ys, last = recurrent(rule, xs, R, state, b=b, params=params, form=form, remat=remat, **options)
        return jnp.sum(ys * weights) + sum(jnp.sum(jnp.sin(leaf)) for leaf in last), (ys, last)

    return jax.jit(jax.value_and_grad(loss, argnums=range(5), has_aux=True))(*arrays)


@cache
def plain(name):
    """By the scan; both kinds of kernels are compared with it."""
    return run_recurrent(*case(name), "scan")


@pytest.mark.parametrize("name", RULES)
def test_the_kernel_equals_the_scan(x64, name, monkeypatch):
    """Outputs, last state and all gradients, with tiles smaller than the sizes: 11 steps in blocks of 8 and 4."""
    rule, arrays, options, weights = case(name)
    both = Tiles(8, 1, 8), Tiles(8, 1, 4)
    monkeypatch.setattr(pallas_plan, "tiles_within", lambda sizes, budget, backward, cores: both[backward])
    got = run_recurrent(rule, arrays, options, weights, "pallas_interpret", rule is gru_rule)
    close(got, plain(name), 1e-10 if weights.dtype == jnp.float64 else 1e-5)


def test_a_cell_on_a_simulated_tpu():
    """Memory that nothing has written holds NaN there, so that nothing of a padded row, lane or step is read."""
    xs = jax.random.normal(jax.random.key(0), (3, 5, 4))

    def gradients(form):
        cell = cells.PeepholeLSTM(4, 6, num_heads=2, form=form, rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(cell)
        loss = lambda params, xs: jnp.sum(nnx.merge(graphdef, params)(xs)[0] ** 2)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, xs)

    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        got = gradients("pallas_interpret")
    close(got, gradients("scan"), 1e-5)


def test_bfloat16_and_runs_side_by_side():
    """Products in bfloat16 with a float32 state, under vmap over weights."""
    xs = jax.random.normal(jax.random.key(0), (2, 5, 4))

    def outputs(form, dtype):
        cell = cells.GRU(4, 6, form=form, dtype=dtype, rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(cell)
        pairs = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), params)
        return jax.jit(jax.vmap(lambda params: nnx.merge(graphdef, params)(xs)))(pairs)

    ys, state = outputs("pallas_interpret", jnp.bfloat16)
    want, _ = outputs("scan", None)
    assert ys.dtype == jnp.bfloat16 and state.h.dtype == jnp.float32
    assert float(jnp.max(jnp.abs(ys.astype(jnp.float32) - want))) < 0.03


@pytest.mark.parametrize(
    "make, plain",
    [
        (partial(cells.LSTM, 4, 6), "scan"),
        (partial(cells.SLSTM, 4, 6, num_heads=2, recurrent_init="orthogonal"), "scan"),
        (partial(cells.MLSTM, 4, 6, num_heads=2, chunk_size=4), "recurrent"),
    ],
    ids=["lstm", "slstm", "mlstm"],
)
def test_bfloat16_stays_near_float32(make, plain):
    """Outputs, last state and gradients, each within 4 eps of its largest number: eight roundings of half an eps, of an
    input, a weight, a product, an output and of the gradients on their way back; sums and states are float32."""
    xs, weights = jax.random.normal(jax.random.key(0), (2, 5, 4)), jax.random.normal(jax.random.key(9), (2, 5, 6))

    def gradients(form, dtype):
        graphdef, params = nnx.split(make(form=form, dtype=dtype, rngs=nnx.Rngs(0)))

        def loss(params, xs):
            ys, last = nnx.merge(graphdef, params)(xs)
            return jnp.sum(ys.astype(jnp.float32) * weights), (ys, last)

        (_, out), pulled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, xs)
        return *out, pulled

    (ys, last, pulled), want = gradients("pallas_interpret", jnp.bfloat16), gradients(plain, None)
    assert ys.dtype == jnp.bfloat16 and {a.dtype for a in jax.tree.leaves((last, pulled))} == {jnp.dtype(jnp.float32)}
    for a, b in zip(jax.tree.leaves((ys, last, pulled)), jax.tree.leaves(want)):
        limit = 4 * float(jnp.finfo(jnp.bfloat16).eps) * jnp.max(jnp.abs(b))
        assert jnp.max(jnp.abs(a.astype(jnp.float32) - b)) <= limit


def run_mlstm(form, dtype=jnp.float32, **options):
    """Outputs, last state and all gradients of 11 steps in chunks of 4, with any mask, resets and a state."""
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def draw(*shape):
        return jax.random.normal(next(keys), shape, dtype)

    state = initial_state(2, 2, 5, 3, dtype)
    state = jax.tree.map(lambda leaf: leaf + draw(*leaf.shape), state)
    arrays = (draw(2, T, 2, 5), draw(2, T, 2, 5), draw(2, T, 2, 3), 3 * draw(2, T, 2), 3 * draw(2, T, 2), state)
    weights, mask, reset = draw(2, T, 2, 3), draw(2, T) < 1, draw(2, T) > 1

    def loss(*arrays):
        h, last = mlstm(*arrays, form=form, chunk_size=4, mask=mask, reset=reset, **options)
        return jnp.sum(h * weights) + sum(jnp.sum(jnp.sin(leaf)) for leaf in last), (h, last)

    return jax.jit(jax.value_and_grad(loss, argnums=range(6), has_aux=True))(*arrays)


@cache
def plain_mlstm(**options):
    """By the chunkwise form."""
    return run_mlstm("chunkwise", jnp.float64, **options)


@pytest.mark.parametrize("options", [{}, {"input_gate": "sigmoid", "normalize": False}], ids=["exp", "sigmoid"])
def test_the_mlstm_kernel_equals_the_chunkwise_form(x64, options):
    close(run_mlstm("pallas_interpret", jnp.float64, **options), plain_mlstm(**options), 1e-10)


def test_the_mlstm_on_a_simulated_tpu():
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        got = run_mlstm("pallas_interpret")
    close(got, run_mlstm("chunkwise"), 1e-4)


XS = jnp.ones((2, 5, 3))
REFUSED = {
    "inner": (lambda form: cells.GRU(3, 4, reset_after=False, form=form, rngs=nnx.Rngs(0)), "ResetBeforeRule has a se"),
    "noise": (lambda form: cells.LSTM(3, 4, zoneout=0.1, form=form, rngs=nnx.Rngs(0)), "Zoneout draws noise"),
    "norm": (lambda form: cells.LayerNormLSTM(3, 4, form=form, rngs=nnx.Rngs(0)), "LSTMRule has a state or parameters"),
    "maps": (
        lambda form: cells.ConvLSTM(3, 4, (3,), form=form, rngs=nnx.Rngs(0)),
        "the linear maps of LSTMRule are Convolution",
    ),
    "sizes": (
        lambda form: cells.LSTM(3, 2048, recurrent_init="zeros", form=form, rngs=nnx.Rngs(0)),
        r"4 recurrent gates of 1 heads of 2048 features need \d+ bytes of VMEM at least; 14680064 may be used",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_kernel_is_refused_in_one_line(name):
    make, message = REFUSED[name]
    xs = XS[:, :, None] if name == "maps" else XS
    with pytest.raises(ValueError, match=f"form='pallas_interpret': {message}") as error:
        jax.eval_shape(lambda xs: make("pallas_interpret")(xs, key=jax.random.key(0)), xs)
    assert "\n" not in str(error.value)


def test_a_rule_that_mixes_features_is_refused():
    def rule(x, r, state, params):
        h = jnp.roll(jnp.tanh(x[0] + r[0]), 1, axis=-1)
        return cells.gru.GRUState(h), h

    state = cells.gru.GRUState(jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="rule is not elementwise in the features"):
        recurrent(rule, jnp.ones((2, 5, 1, 4)), jnp.ones((1, 4, 1, 4)), state, form="pallas_interpret")


@pytest.mark.parametrize("cell, runs", [(cells.LSTM, "fused"), (cells.MLSTM, "chunkwise")])
def test_a_tpu_is_needed(cell, runs):
    with pytest.raises(
        ValueError, match=f"form='pallas' needs a TPU or a GPU, and this program is for a cpu; form='{runs}' ru"
    ):
        cell(3, 4, form="pallas", rngs=nnx.Rngs(0))(XS)


def test_a_chunk_that_does_not_fit():
    q = jax.ShapeDtypeStruct((1, 2048, 1, 64), jnp.float32)
    gate = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
    message = (
        r"chunks of 2048 steps with 64 x 64 numbers a head need \d+ bytes of VMEM; 14680064 may be used \(a smaller"
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda *args: mlstm(*args, form="pallas_interpret", chunk_size=2048), q, q, q, gate, gate)


def test_auto_names_its_reason():
    tpu = Target("tpu", vmem=2**27)
    plans = {"fits": lambda target: SimpleNamespace(vmem=target.vmem), "does not": lambda target: "too wide for VMEM"}
    served = "the kernel serves this rule and these sizes; 134217728 bytes of VMEM"
    assert choose("auto", tpu, plans["fits"]) == ("pallas", served, SimpleNamespace(vmem=2**27))
    assert choose("auto", tpu, plans["does not"])[:2] == ("fused", "too wide for VMEM")
    assert choose("auto", tpu._replace(devices=4), plans["fits"]).form == "fused"
    assert choose("auto", Target("gpu"), plans["fits"]).form == "fused"
    assert choose("scan", Target("gpu"), plans["fits"]).form == "scan"


TPU = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu"))


def chosen_on_a_tpu(cell, T=64, B=4):
    """The one choice of a cell that sees 3 features, on v5e; nothing is computed."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: cell(rngs=nnx.Rngs(0))))
    xs = jax.ShapeDtypeStruct((B, T, 3), jnp.float32)
    with jax.sharding.use_abstract_mesh(TPU):
        (choice,) = chosen_forms(lambda params, xs: nnx.merge(graphdef, params)(xs)[0], params, xs)
    return choice


@pytest.mark.parametrize(
    "cell, form, reason",
    [
        (partial(cells.LSTM, 3, 512), "pallas", "serves this rule and these sizes; [0-9]+ bytes of VMEM"),
        (
            partial(cells.LSTM, 3, 4096, recurrent_init="zeros"),
            "fused",
            "gates of 1 heads of 4096 features need 305135616 bytes of VMEM at least; 117440512 may be used",
        ),
        (
            partial(cells.MLSTM, 3, 2048, num_heads=1),
            "chunkwise",
            "chunks of 64 steps with 2048 x 2048 numbers a head need [0-9]+ bytes of VMEM; 117440512 may be used",
        ),
    ],
    ids=["fits", "a wide LSTM", "a wide mLSTM"],
)
def test_auto_on_a_tpu_says_what_fits(cell, form, reason):
    choice = chosen_on_a_tpu(partial(cell, form="auto"))
    assert choice.form == form and re.search(f"{reason}$", choice.reason)


@pytest.mark.parametrize(
    "cell, form",
    [(partial(cells.LSTM, 3, 128), "fused"), (partial(cells.MLSTM, 3, 128, num_heads=2), "chunkwise")],
    ids=["lstm", "mlstm"],
)
def test_auto_on_a_tpu_keeps_to_the_memory_budget(cell, form):
    """The kernel where what it sets aside fits, else the form that can choose, which may have no plan either."""
    cell = partial(cell, form="auto")
    kernel = chosen_on_a_tpu(partial(cell, memory_budget=10**9))
    assert kernel.form == "pallas" and kernel.reason.endswith(f"; sets aside {kernel.plan.bytes} bytes")
    less = chosen_on_a_tpu(partial(cell, memory_budget=kernel.plan.bytes - 1))
    assert less.form == form
    assert less.reason.startswith(f"the kernel would set aside {kernel.plan.bytes} bytes; memory_budget is ")
    with pytest.raises(ValueError, match="memory_budget: 10 bytes fit nothing for 64 steps"):
        chosen_on_a_tpu(partial(cell, memory_budget=10))


def test_auto_is_fused_on_a_cpu_and_a_model_says_so():
    make = lambda form: models.LM(5, backbone="lstm", dim=4, num_layers=2, form=form, rngs=nnx.Rngs(0))  # noqa: E731
    tokens = jnp.zeros((2, 6), int)
    chosen = chosen_forms(make("auto"), tokens)
    assert [(choice.form, choice.reason) for choice in chosen] == [
        ("fused", "the kernels are for TPUs and GPUs, and this program is for a cpu")
    ] * len(chosen)
    assert chosen
    assert np.array_equal(make("auto")(tokens)[0], make("fused")(tokens)[0])


def test_tiles_shrink_with_the_budget_and_cores_share_the_work():
    sizes = Sizes(64, 100, 4, 256, 4, 4, 2, 0, False, False, True, 2, 4)
    large, small = plan(sizes, 2**27), plan(sizes, 2**24)
    assert large.forward.heads == 4 and large.forward.rows == 64
    for p, budget in ((large, 2**27), (small, 2**24)):
        assert vmem_bytes(sizes, p.forward, False) <= budget and vmem_bytes(sizes, p.backward, True) <= budget
    rows, heads, _ = plan(sizes, 2**27, cores=2).grid(plan(sizes, 2**27, cores=2).forward)
    assert rows * heads == 2


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, of the extra [tpu], is not installed"
)


TOPOLOGIES = ("v5e:2x2", "v4:2x2x1", "v5p:2x2x1", "v6e:2x2")


NO_KERNEL = {  # heads of 1,024 x 1,024 in chunks of 64, and R of a width of 2,048
    ("v4:2x2x1", "MLSTMLayer of xlstm_1.3b"),
    ("v5p:2x2x1", "MLSTMLayer of xlstm_1.3b"),
    ("v4:2x2x1", "LSTM of lstm_1b"),
}


@needs_libtpu
@pytest.mark.parametrize(
    "group, topologies",
    [("text", TOPOLOGIES), *(pytest.param("scaling", (each,), marks=pytest.mark.long) for each in TOPOLOGIES)],
)
def test_both_kernels_compile_for_tpus(group, topologies):
    """At the sizes of the shipped configs, within the VMEM that is stated; or the reason for none names it."""
    command = [sys.executable, "-m", "tests.compile_for_tpu", group, *topologies]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 7 * len(topologies)
    for row in rows:
        if (row["topology"], row["case"]) in NO_KERNEL:
            assert row["form"] != "pallas" and "bytes of VMEM" in row["reason"], row
        else:
            assert row["form"] == "pallas" and row["kernels"] == 2, row
            assert row["reason"].endswith(f"; {row['vmem']} bytes of VMEM")
            assert row["set_aside"] < 1.1 * row["bytes"], row
