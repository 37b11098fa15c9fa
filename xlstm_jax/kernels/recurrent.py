"""Any non-linear cell as a rule (`rules.py`): one engine turns it into every form.

"scan"   one `lax.scan` over time, differentiated by JAX: the obvious form, which tests compare the others with
"fused"  a scan over chunks of time with its own gradient (`fused.py`), exact, without a forward-mode derivative.
         `remat=True` keeps one state a chunk and computes the others again; `memory_budget` chooses chunk length
         and remat (`memory.py`)
"pallas" one kernel forward and one backward, for TPUs (`pallas_recurrent.py`) or GPUs (`pallas_recurrent_gpu.py`),
         of rules that are elementwise in the features, with Dense maps and without `inner` and noise, where R fits
         onto the chip. "pallas_interpret" is the same kernel interpreted, slowly and on any device, for tests
"cudnn"  cuDNN's LSTM (`cudnn.py`): the plain one in float32, on an NVIDIA GPU
"auto"   "pallas" where the program is for one TPU and the kernel serves it within the `memory_budget`, else "fused"
         (`choice.py`)
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ..names import unknown
from . import feature_major, local
from .choice import CHOSEN_FORMS, choose, record, target
from .fused import fused, fused_bytes
from .memory import check_budget, check_chunk, fitting, within
from .rules import DENSE, Dense, Given, Rule, Spec, State, Weights, emptied, project, step


def recurrent(
    rule: Rule,
    xs: Float[Array, "B T ..."],
    R: Float[Array, "..."],
    state: State,
    *,
    S: Float[Array, "..."] | None = None,
    W: Float[Array, "..."] | None = None,
    b: Float[Array, "G D"] | None = None,
    params: Any = (),
    maps: Any = DENSE,
    dtype: DTypeLike | None = None,
    form: str = "scan",
    chunk_size: int = 64,
    remat: bool = False,
    memory_budget: int | float | str | None = None,
    mask: Bool[Array, "B T"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    reverse: bool = False,
    state_scale: Float[Array, "B ..."] | None = None,
    noise: tuple[Array, ...] = (),
) -> tuple[Float[Array, "B T ..."], State]:
    """Runs `rule` over time: xs (B, T, D_in), or gate inputs (B, T, G, D) if W is None, to outputs and the last state.

    dtype: of the products (default: R's); the weights may be wider, and the gates are summed in the state's dtype.
    A step with mask False copies the state through and outputs zeros; one with reset True starts from an empty
    (zero) state. `reverse` runs from the last step to the first. `state_scale` (B, D) multiplies h before each product
    with R and before `inner` sees it; `noise`, arrays (B, T, ...), is handed to the rule step by step; neither has a
    gradient. `memory_budget`, in bytes or "auto", lets the fused form take the chunk length nearest to `chunk_size`,
    and remat only where it must, so that what forward and backward set aside fits. Without remat, and with the rows
    last (`feature_major.py`), a chunk has at most 16 steps.
    """
    forms = (*FORMS, *CHOSEN_FORMS, "cudnn")
    if form not in forms:
        raise ValueError(unknown("form of a recurrent cell", form, forms))
    if xs.shape[1] == 0:
        raise ValueError("xs has no time step (T = 0); at least one is needed")
    check_chunk(chunk_size)
    check_budget(memory_budget)
    given = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), Given(mask, reset, noise))
    weights = Weights(R, S, W, b, params)
    spec = Spec(rule, maps, jnp.dtype(dtype or R.dtype), remat, reverse)
    arguments = xs, weights, state, given, state_scale
    specs = _divided(spec, *arguments)
    rows, *heads = specs[2]
    out_specs = P(rows, None, *heads), specs[2]
    return local.run(partial(_run, form, spec, chunk_size, memory_budget), arguments, specs, out_specs)


def _run(form, spec, chunk_size, memory_budget, *arguments):
    """Outputs (B, T, D) and the last state, in the form that serves the arguments."""
    choice = choose(form, target(), partial(_plan, form, memory_budget, spec, *arguments))
    _, weights, state, *_ = arguments
    if choice.form == "fused" and not spec.remat and feature_major.serves(spec, weights, state):
        chunk_size = min(chunk_size, feature_major.LONGEST_CHUNK)
    if memory_budget is not None and choice.form == "fused":
        costs = [(remat, cost) for remat, cost in fused_bytes(spec, *arguments).items() if remat or not spec.remat]
        fit = fitting(arguments[0].shape[1], chunk_size, memory_budget, costs)
        chunk_size, spec = fit.L, spec._replace(remat=fit.remat)
        choice = choice._replace(reason=f"{choice.reason}; chunks of {fit.L}, remat={fit.remat}: {fit.bytes} bytes")
    elif memory_budget is not None and form == "auto":
        choice = choice._replace(reason=f"{choice.reason}; sets aside {choice.plan.bytes} bytes")
    elif memory_budget is not None:
        raise ValueError(f"memory_budget is for form='fused', which chooses by it, and not for form={form!r}")
    record(choice)
    with jax.named_scope("time"):
        if choice.form == "pallas":
            return _kernel().run(choice.plan, spec, *arguments)
        if choice.form == "cudnn":
            return _cudnn(spec, *arguments)
        return FORMS[choice.form](spec, chunk_size, *arguments)


def _kernel():
    """The module of the target's kernels; imported here because Pallas is slow to load, and not needed on a CPU."""
    from . import pallas_recurrent, pallas_recurrent_gpu

    return pallas_recurrent_gpu if target().platform == "gpu" else pallas_recurrent


def _divided(spec, xs, weights, state, given, scale):
    """How a mesh divides the arguments: rows, and heads where there are several and the rule couples no features."""
    rows = local.axes_for(xs.shape[0], local.ROWS)
    heads = None
    if local.sizes().get("tensor", 1) > 1 and isinstance(spec.maps, Dense) and weights.S is None:
        heads = _heads(spec, xs, weights, state)
    if heads is None:
        return P(rows), Weights(*(P(),) * 5), P(rows), Given(*(P(None, rows),) * 3), P(rows)
    return (
        P(rows, None, None, heads) if weights.W is None else P(rows),
        Weights(P(heads), P(), P(None, None, heads), P(None, heads), P(None, heads)),
        P(rows, heads),
        Given(P(None, rows), P(None, rows), P(None, rows, heads)),
        P(rows, heads),
    )


def _heads(spec, xs, weights, state):
    """The mesh axis of the heads, None where the recurrence cannot be divided."""
    from .pallas_plan import equal_gradients

    N, E, K, F = weights.R.shape
    G = xs.shape[2] if weights.W is None else weights.W.shape[1]
    apart = all(a.shape[1:] == (N * F,) for a in jax.tree.leaves((state, weights.params)))
    if N == 1 or E != F or not apart or equal_gradients(spec, G, K, state, weights.params) is None:
        return None
    return local.axes_for(N, ("tensor",))


def _plan(form, memory_budget, *arguments):
    """The kernel's plan for the target, for "auto" within the budget."""
    *arguments, target = arguments
    if target.platform == "gpu":
        return _kernel().plan_for(*arguments, interpret=form == "pallas_interpret")
    from .pallas_plan import plan_for

    planned = plan_for(*arguments, vmem=target.vmem, cores=target.cores, interpret=form == "pallas_interpret")
    return within(memory_budget if form == "auto" else None, planned)


def _cudnn(spec, xs, weights, state, given, scale):
    """cuDNN's LSTM, or one line that says why not."""
    from . import cudnn

    why = cudnn.refusal(spec, weights, state, given, scale)
    if target().platform != "gpu":
        why = f"an NVIDIA GPU is needed, and this program is for a {target().platform}"
    if why:
        raise ValueError(f"form='cudnn': {why}; form='fused' would serve it")
    return cudnn.run(spec, xs, weights, state, given)


def _scan(spec, chunk_size, xs, weights, state, given, scale):
    products = (lambda h: spec.product(h, weights.R)), (lambda v: spec.product(v, weights.S))

    def body(state, inputs):
        x, given = inputs
        return step(spec, products, weights, emptied(given.reset, state), x, given, scale)[1:]

    if spec.remat:
        body = jax.checkpoint(body)
    x = spec.maps.unstack(project(spec, xs, weights, state.h.dtype))
    state, ys = jax.lax.scan(body, state, (x, given), reverse=spec.reverse)
    return jnp.swapaxes(ys, 0, 1), state


FORMS = {"scan": _scan, "fused": fused}
