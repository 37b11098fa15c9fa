"""The reference numbers in tests/golden (README.md there), or in the folder GOLDEN, and how they are compared with."""

import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

GOLDEN = pathlib.Path(os.environ.get("GOLDEN", pathlib.Path(__file__).parent / "golden"))
CASES = {case["name"]: case for case in json.loads((GOLDEN / "cases.json").read_text())}

# Nearly all of the time here is compilation, and these programs run once or twice.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def names(*prefixes):
    """Names of the cases that begin with one of the prefixes."""
    return [name for name in CASES if name.startswith(prefixes)]


def load(name, dtype):
    """The case's arrays, floating ones in `dtype`."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: x.astype(dtype) if x.dtype.kind == "f" else x for key, x in arrays.items()}


def check(name, got, want, dtype, pair=None):
    """|got - want| <= atol + rtol |want| for every key of `want`, with the case's tolerances.

    `pair` names another of its pairs. In float32 atol grows with the largest value wanted, and with the peer's own
    error against its float64 run.
    """
    tolerance = CASES[name]["tolerance"]
    if "rtol" not in tolerance:
        chosen = tolerance[pair or dtype]
    elif dtype == "float64" or name.startswith("mlstm_kernel"):
        chosen = tolerance
    else:
        chosen = {"rtol": 1e-4, "atol": 1e-5}  # the sLSTM's float32 pair: torch's cases have a float64 pair only
    for key, expected in want.items():
        atol = chosen["atol"]
        if dtype == "float32":
            atol *= max(1.0, np.abs(expected).max())
            atol = max(atol, 4 * tolerance.get("peer_float32_max_abs_error", {}).get(key, 0.0))
        assert got[key].dtype == dtype, (key, got[key].dtype)
        np.testing.assert_allclose(got[key], expected, rtol=chosen["rtol"], atol=atol, err_msg=f"{name} {key}")


def gradients(function, weights, *arguments):
    """function(*arguments) and the gradients of sum(weights * outputs) with respect to the arguments."""

    def loss(*arguments):
        outputs = function(*arguments)
        return sum(jnp.vdot(w, outputs[key]) for key, w in weights.items()), outputs

    grads, outputs = jax.grad(loss, argnums=tuple(range(len(arguments))), has_aux=True)(*arguments)
    return outputs, grads
