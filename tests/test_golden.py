"""Values and gradients of sLSTM and mLSTM beside those of NX-AI's implementations (tests/golden/README.md)."""

import functools

import jax
import numpy as np
import pytest
from golden_cases import CASES, check, gradients, jit, load, names

from xlstm_jax.cells.slstm import SLSTMState, slstm_rule
from xlstm_jax.kernels.mlstm import MLSTMState, mlstm
from xlstm_jax.kernels.recurrent import recurrent

CELL_FORMS = [("scan", "float64"), ("fused", "float64"), ("fused", "float32")]
EMPTY_M = -1e30  # m of a state that weighs nothing: m_t is then the plain maximum over the steps seen


# NX-AI's sLSTM cell ---------------------------------------------------------------------------------------------------


@functools.partial(jit, static_argnames="form")
def run_slstm(weights, xs, R, b, state, form):
    def apply(xs, R, b, state):
        ys, last = recurrent(slstm_rule, xs, R, state, b=b, form=form, chunk_size=5)
        return {"out/h": ys} | last._asdict()

    return gradients(apply, weights, xs, R, b, state)


@pytest.mark.parametrize("form, dtype", CELL_FORMS)
@pytest.mark.parametrize("name", names("slstm_cell_"))
def test_slstm(name, form, dtype):
    a = load(name, dtype)
    B, T, G, N, head_dim = a["in/gates"].shape
    D = N * head_dim

    def features(h):
        """(B, head, T, head dim) -> (B, T, D)."""
        return h.swapaxes(1, 2).reshape(B, T, D)

    def bias(b):
        """(head, gate, head dim) -> (G, D)."""
        return b.swapaxes(0, 1).reshape(G, D)

    def state(prefix):
        return {key: a[prefix + ("y" if key == "h" else key)] for key in SLSTMState._fields}

    with jax.enable_x64(dtype == "float64"):
        weights = {"out/h": features(a["cot/out/h"]), "c": a["cot/final/c"], "n": a["cot/final/n"]}
        xs, R, b = a["in/gates"].reshape(B, T, G, D), a["par/recurrent_kernel"], bias(a["par/bias"])
        outputs, grads = run_slstm(weights, xs, R, b, SLSTMState(**state("init/")), form=form)
        xs_grad, R_grad, b_grad, state_grad = grads
    check(name, outputs, {"out/h": features(a["out/h"])} | state("final/"), dtype)
    check(name, {"xs": xs_grad}, {"xs": a["grad/in/gates"].reshape(B, T, G, D)}, dtype)
    check(name, {"R": R_grad, "b": b_grad}, {"R": a["grad/par/recurrent_kernel"], "b": bias(a["grad/par/bias"])}, dtype)
    check(name, state_grad._asdict(), state("grad/init/"), dtype)


# NX-AI's mLSTM --------------------------------------------------------------------------------------------------------

INPUTS = "qkvif"


def time_first(x):
    """(B, H, T, ...) -> (B, T, H, ...)."""
    return x.swapaxes(1, 2)


def mlstm_state(inputs, m):
    """C = n = 0 and the same m everywhere."""
    (B, _, H, K), V, dtype = inputs[0].shape, inputs[2].shape[-1], inputs[0].dtype
    return MLSTMState(np.zeros((B, H, K, V), dtype), np.zeros((B, H, K), dtype), np.full((B, H), m, dtype))


def mlstm_case(a):
    """Inputs, and the initial state or None; what the case's state lacks of C, n, m is zero."""
    inputs = tuple(time_first(a[f"in/{key}"]) for key in INPUTS)
    if "init/C" not in a:
        return inputs, None
    return inputs, mlstm_state(inputs, 0)._replace(**in_our_layout(a, "init/"))


def in_our_layout(a, prefix=""):
    """The arrays that begin with `prefix`, by the rest of their names, in our layout."""
    found = {key.removeprefix(prefix): x for key, x in a.items() if key.startswith(prefix)}
    moved = {key: time_first(x) for key, x in found.items() if key.startswith(("in/", "out/"))}
    return found | moved | {key: x[..., 0] for key, x in found.items() if key.endswith("m")}


OPTIONS = ("form", "chunk_size", "input_gate", "normalize")


def apply_mlstm(inputs, state, **options):
    h, last = mlstm(*inputs, state, **options)
    return {"out/h": h} | {f"final/{key}": x for key, x in last._asdict().items()}


forward_mlstm = jit(apply_mlstm, static_argnames=OPTIONS)


@functools.partial(jit, static_argnames=OPTIONS)
def run_mlstm(weights, inputs, state, **options):
    outputs, (inputs_grad, state_grad) = gradients(functools.partial(apply_mlstm, **options), weights, inputs, state)
    grads = {f"in/{key}": x for key, x in zip(INPUTS, inputs_grad, strict=True)}
    return outputs, grads | {f"init/{key}": x for key, x in state_grad._asdict().items()}


PARALLEL = [name for name in names("mlstm_") if CASES[name]["config"].get("form") == "parallel"]
FORWARD_ONLY = names("mlstm_kernel_", "mlstm_backend_")  # float32; the kernels' own gradients are not the true ones
FORMS = ["recurrent", "parallel", "chunkwise"]


def plan():
    """(name, form, chunk size, dtype): all forms in float64, the case's own in float32; equal programs side by side."""
    rows = []
    for name in names("mlstm_"):
        if name in FORWARD_ONLY:
            continue
        config = CASES[name]["config"]
        own = {"siging": "parallel"}.get(config["form"], config["form"])
        rows += [(name, form, 16, "float64") for form in FORMS] + [(name, own, 16, "float32")]
        if config["S"] == 32:
            rows.append((name, "chunkwise", 7, "float64"))  # 32 = 4 * 7 + 4; 16 leaves a tail at 23, 24, 29 and 37
    return sorted(rows, key=lambda row: (row[1:], CASES[row[0]]["config"]["S"], row[0]))


def mlstm_options(name, form, chunk_size):
    input_gate = "sigmoid" if "siging" in name else "exp"
    normalize = CASES[name]["config"].get("normalize", True)
    return {"form": form, "chunk_size": chunk_size, "input_gate": input_gate, "normalize": normalize}


def run_mlstm_case(name, a, m, options):
    """Outputs, gradients of the case's loss, and those of its loss that also counts the last C and n (or None)."""
    inputs, state = mlstm_case(a)
    empty = mlstm_state(inputs, m)
    C, n, _ = mlstm_state(inputs, 0)
    weights = {"out/h": time_first(a["cot/out/h"]), "final/C": C, "final/n": n}
    outputs, grads = run_mlstm(weights, inputs, state or empty, **options)
    if "cot_states/C" not in a:
        return outputs, grads, None
    weights |= {f"final/{key}": a[f"cot_states/{key}"] for key in "Cn"}
    return outputs, grads, run_mlstm(weights, inputs, state or empty, **options)[1]


@pytest.mark.parametrize("name, form, chunk_size, dtype", plan())
def test_mlstm(name, form, chunk_size, dtype):
    """Every form under the case's own tolerances: m is the same in all of ours."""
    a = load(name, dtype)
    with jax.enable_x64(dtype == "float64"):
        m = EMPTY_M if name in PARALLEL else 0
        outputs, grads, states_grads = run_mlstm_case(name, a, m, mlstm_options(name, form, chunk_size))
        want = {key: x for key, x in in_our_layout(a).items() if key.startswith(("out/", "final/"))}
        check(name, outputs, want, dtype)
        check(name, grads, in_our_layout(a, "grad/"), dtype)
        if states_grads:
            check(name, states_grads, in_our_layout(a, "grad_states/"), dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PARALLEL)
def test_mlstm_from_zero_m(name, form):
    """The parallel cases from our own empty state: its m = 0 moves eps, which no form then shares with them exactly.

    So the pair for other forms, for gradients in units of the largest: an element that is itself of the size of eps
    (the gradient of q at the first step, where h = v whatever q is) follows eps.
    """
    a = load(name, "float64")
    with jax.enable_x64(True):
        outputs, grads, _ = run_mlstm_case(name, a, 0, mlstm_options(name, form, 16))
    check(name, outputs, {"out/h": time_first(a["out/h"])}, "float64", pair="other_forms")
    rtol, atol = CASES[name]["tolerance"]["other_forms"].values()
    for key, want in in_our_layout(a, "grad/").items():
        atol_key = max(atol, rtol * np.abs(want).max())
        np.testing.assert_allclose(grads[key], want, rtol=rtol, atol=atol_key, err_msg=f"{name} {key}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FORWARD_ONLY)
def test_mlstm_forward(name, form):
    """Production kernels and the backend for inference: outputs and last states, whole and in three calls."""
    a = load(name, "float32")
    inputs, state = mlstm_case(a)
    want = {key: x for key, x in in_our_layout(a).items() if key.startswith(("out/h", "final/"))}
    want_in_pieces = want.pop("out/h_in_pieces", None)
    run = functools.partial(forward_mlstm, **mlstm_options(name, form, 24))
    with jax.enable_x64(False):
        check(name, run(inputs, state), want, "float32")
        if want_in_pieces is None:
            return
        pieces = []
        for steps in (slice(0, 33), slice(33, 34), slice(34, None)):
            piece = run(tuple(x[:, steps] for x in inputs), state)
            state = MLSTMState(*(piece[f"final/{key}"] for key in "Cnm"))
            pieces.append(piece["out/h"])
        got = piece | {"out/h": np.concatenate(pieces, axis=1)}
        check(name, got, want | {"out/h": want_in_pieces}, "float32")
