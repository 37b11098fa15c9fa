"""Any non-linear cell as a rule: one engine turns it into every form.

A rule is the elementwise heart of a cell in its paper's symbols,

    rule(x, r, state, params) -> (state, output)

with x the input's share and r the recurrent share of the pre-activations, each a tuple of one (B, D) array a gate, and
a NamedTuple state that has a field `h` (B, D), the vector that the recurrent matrix multiplies. A rule that needs a
second product within a step (a reset gate before the product, a projection after the output gate) is an object with a
method `inner(x, r, state, params)`: its value times S is appended to r. The linear maps of the inputs and of h are
`Dense` or anything with its two methods (a convolution), so that a gate may have any shape (B, ..., D). The forms:

    "scan"   one `lax.scan` over time, differentiated by JAX: the obvious form, which tests compare the others with
    "fused"  a scan over chunks of time with its own gradient. The input projection runs inside the chunk; backward,
             the rule is linearised for all steps of a chunk at once, the reverse loop holds only that linear map and
             the recurrent products, and the gradients of R, S, W and b are one product each a chunk. `remat=True` keeps
             one state a chunk and computes the others again. Its gradient is exact; it has no forward-mode derivative.
             `memory_budget` chooses chunk length and remat (`memory.py`)
    "pallas" one kernel forward and one backward, for TPUs (`pallas_recurrent.py`) or GPUs (`pallas_recurrent_gpu.py`),
             of rules that are elementwise in the features, with Dense maps and without `inner` and noise, where R fits
             onto the chip. "pallas_interpret" is the same kernel interpreted, slowly and on any device, for tests
    "cudnn"  cuDNN's LSTM (`cudnn.py`): the plain one in float32, on an NVIDIA GPU
    "auto"   "pallas" where the program is for one TPU and the kernel serves it, else "fused" (`choice.py`)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ..names import unknown
from . import local
from .choice import CHOSEN_FORMS, choose, record, target
from .memory import Bytes, check_budget, fitting, size

State = Any  # a NamedTuple of arrays (B, ...) with a field h
Gates = tuple[Array, ...]  # (B, ..., D) each
Rule = Callable[..., tuple[State, Array]]


class Maps:
    """The linear maps of a cell: `project` and `product`."""

    def pull(self, R: Array, like: Array) -> Callable[[Gates], Array]:
        """The transposed map of h -> `product(h, R)`, for an h like this, from one array a gate."""
        return lambda d_r: jax.linear_transpose(lambda h: self.product(h, R), like)(stack(d_r))[0]


@dataclass(frozen=True)
class Dense(Maps):
    """The linear maps of a dense cell: W (D_in, G, D), and R (N, E, G, F), block-diagonal over N heads."""

    def project(self, xs: Float[Array, "T B D_in"], W: Array, dtype: DTypeLike) -> Float[Array, "T B G D"]:
        """The input's share of all gates of all steps, one product, summed in `dtype`."""
        T, B, D_in = xs.shape
        _, G, D = W.shape
        x = jnp.matmul(xs.reshape(-1, D_in), W.reshape(D_in, G * D), preferred_element_type=dtype)
        return x.reshape(T, B, G, D)

    def product(self, h: Float[Array, "*M D"], R: Float[Array, "N E G F"]) -> Float[Array, "*M G NF"]:
        """h R by head: in R's dtype, summed in h's."""
        (N, E, G, F), lead = R.shape, h.shape[:-1]
        if N == 1:
            r = jnp.matmul(h.astype(R.dtype), R.reshape(E, G * F), preferred_element_type=h.dtype)
            return r.reshape(*lead, G, F)
        r = jnp.matmul(by_head(h.astype(R.dtype), N), R.reshape(N, E, G * F), preferred_element_type=h.dtype)
        return jnp.moveaxis(r.reshape(N, *lead, G, F), 0, -2).reshape(*lead, G, N * F)

    def pull(self, R: Float[Array, "N E G F"], like: Float[Array, "*M D"]) -> Callable[[Gates], Array]:
        """With R turned before the loop, as XLA on a CPU would turn it at each step."""
        N, E, G, F = R.shape
        turned = jnp.swapaxes(R.reshape(N, E, G * F), 1, 2)

        def run(d_r):
            d_r = stack(tuple(by_head(d, N) for d in d_r)).reshape(N, -1, G * F).astype(R.dtype)
            d_h = jnp.matmul(d_r, turned, preferred_element_type=like.dtype)
            return jnp.swapaxes(d_h, 0, 1).reshape(like.shape)

        return run


def by_head(a: Float[Array, "*M D"], N: int) -> Float[Array, "N M E"]:
    """Heads first: products with one matrix a head are then batched, and XLA does not turn R at every step."""
    return jnp.swapaxes(a.reshape(-1, N, a.shape[-1] // N), 0, 1)


class Weights(NamedTuple):
    """R of h, S of the rule's inner value or None, W of the inputs or None if they are gates, b (G, D) or None; the
    rule's own."""

    R: Array
    S: Array | None
    W: Array | None
    b: Array | None
    params: Any


class Given(NamedTuple):
    """What is not differentiated, time-major (T, B, ...); None where there is none, so that it costs nothing.

    noise: arrays that the rule gets after its params, one entry a step.
    """

    mask: Array | None
    reset: Array | None
    noise: tuple[Array, ...]


class Spec(NamedTuple):
    """What is known when a program is traced."""

    rule: Rule
    maps: Any
    dtype: DTypeLike
    remat: bool
    reverse: bool

    def product(self, h: Array, R: Array) -> Array:
        """h R in the compute dtype; the cast is here so that gradients of R are summed in R's own dtype."""
        return self.maps.product(h, R.astype(self.dtype))

    def pull(self, R: Array, like: Array) -> Callable[[Gates], Array]:
        """Gradients of the shares, one array a gate, to that of an h like this."""
        return self.maps.pull(R.astype(self.dtype), like)


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
    maps: Any = Dense(),
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
    and remat only where it must, so that what forward and backward set aside fits.
    """
    forms = (*FORMS, *CHOSEN_FORMS, "cudnn")
    if form not in forms:
        raise ValueError(unknown("form of a recurrent cell", form, forms))
    if xs.shape[1] == 0:
        raise ValueError("xs has no time step (T = 0); at least one is needed")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    check_budget(memory_budget)
    given = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), Given(mask, reset, noise))
    weights = Weights(R, S, W, b, params)
    spec = Spec(rule, maps, jnp.dtype(dtype or R.dtype), remat, reverse)
    arguments = xs, weights, state, given, state_scale
    specs = _divided(spec, *arguments)
    out_specs = specs[3].noise, specs[2]
    ys, state = local.run(partial(_run, form, spec, chunk_size, memory_budget), arguments, specs, out_specs)
    return jnp.swapaxes(ys, 0, 1), state


def _run(form, spec, chunk_size, memory_budget, *arguments):
    """Outputs (T, B, D) and the last state, in the form that serves the arguments."""
    choice = choose(form, target(), partial(_plan, form, spec, *arguments))
    if memory_budget is not None and choice.form == "fused":
        costs = [(remat, cost) for remat, cost in fused_bytes(spec, *arguments).items() if remat or not spec.remat]
        fit = fitting(arguments[0].shape[1], chunk_size, memory_budget, costs)
        chunk_size, spec = fit.L, spec._replace(remat=fit.remat)
        choice = choice._replace(reason=f"{choice.reason}; chunks of {fit.L}, remat={fit.remat}: {fit.bytes} bytes")
    elif memory_budget is not None and form != "auto":
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


def _plan(form, *arguments):
    """The kernel's plan for the target."""
    *arguments, target = arguments
    if target.platform == "gpu":
        return _kernel().plan_for(*arguments, interpret=form == "pallas_interpret")
    from .pallas_plan import plan_for

    return plan_for(*arguments, vmem=target.vmem, cores=target.cores, interpret=form == "pallas_interpret")


def _cudnn(spec, xs, weights, state, given, scale):
    """cuDNN's LSTM, or one line that says why not."""
    from . import cudnn

    why = cudnn.refusal(spec, weights, state, given, scale)
    if target().platform != "gpu":
        why = f"an NVIDIA GPU is needed, and this program is for a {target().platform}"
    if why:
        raise ValueError(f"form='cudnn': {why}; form='fused' would serve it")
    return cudnn.run(spec, xs, weights, state, given)


def project(spec: Spec, xs: Float[Array, "B T ..."], weights: Weights, dtype: DTypeLike) -> Float[Array, "T B ..."]:
    """The input's share of all gates of all steps, time-major."""
    x = jnp.swapaxes(xs, 0, 1)  # before the product: the inputs are smaller than the gates
    if weights.W is None:
        x = x.astype(dtype)
    else:
        x = spec.maps.project(x.astype(spec.dtype), weights.W.astype(spec.dtype), dtype)
    if weights.b is None:
        return x
    return x + weights.b.reshape((1,) * (x.ndim - 2) + weights.b.shape).astype(dtype)


def unstack(gates: Array) -> Gates:
    """One array a gate, from the last axis but one.

    Loops over time take their steps from one array a gate: where a step is cut out of an array of all gates and then
    into gates, XLA does not vectorise the rule on a CPU (an LSTM's forward loop took 1.8 to 2.8 times as long).
    """
    return jnp.unstack(gates, axis=-2)


def stack(gates: Gates) -> Array:
    """The inverse of `unstack`; on a CPU written gate by gate, as XLA there does not vectorise what it concatenates."""
    if target().platform != "cpu":
        return jnp.stack(gates, axis=-2)
    stacked = jnp.empty((*gates[0].shape[:-1], len(gates), gates[0].shape[-1]), gates[0].dtype)
    for n, gate in enumerate(gates):
        stacked = stacked.at[..., n, :].set(gate)
    return stacked


def select(keep: Bool[Array, "*M"] | None, new: State, old: State) -> State:
    """new where `keep`, old elsewhere, for every leaf (*M, ...); `keep` None keeps all."""
    if keep is None:
        return new
    return jax.tree.map(lambda n, o: jnp.where(keep.reshape(keep.shape + (1,) * (n.ndim - keep.ndim)), n, o), new, old)


def emptied(reset: Bool[Array, "*M"] | None, state: State) -> State:
    """The state with the rows that `reset` names set to zero: nothing of them remains, in values and gradients."""
    return state if reset is None else select(~reset, state, jax.tree.map(jnp.zeros_like, state))


def scaled(h: Array, scale: Array | None) -> Array:
    """h (*M, B, ..., D) times a scale (B, ..., D), if there is one."""
    return h if scale is None else h * jnp.broadcast_to(scale, h.shape)


def inner(spec: Spec, x: Gates, r: Gates, state: State, params: Any, scale: Array | None) -> Array:
    """What S multiplies; the rule sees h as the products do."""
    return spec.rule.inner(x, r, state._replace(h=scaled(state.h, scale)), params)


def masked_rule(spec: Spec, x: Gates, r: Gates, state: State, params: Any, given: Given) -> tuple[State, Array]:
    """The rule on one step: a False mask copies the state through and outputs zeros."""
    new, y = spec.rule(x, r, state, params, *given.noise)
    return select(given.mask, new, state), select(given.mask, y, jnp.zeros_like(y))


def _step(spec, weights, state, x, given, scale):
    """Both recurrent shares of the gates (the second empty without S), the next state and the output."""
    r, u = unstack(spec.product(scaled(state.h, scale), weights.R)), ()
    if weights.S is not None:
        u = unstack(spec.product(inner(spec, x, r, state, weights.params, scale), weights.S))
    return (r, u), *masked_rule(spec, x, (*r, *u), state, weights.params, given)


def _scan(spec, chunk_size, xs, weights, state, given, scale):
    def body(state, inputs):
        x, given = inputs
        return _step(spec, weights, emptied(given.reset, state), x, given, scale)[1:]

    if spec.remat:
        body = jax.checkpoint(body)
    x = unstack(project(spec, xs, weights, state.h.dtype))
    state, ys = jax.lax.scan(body, state, (x, given), reverse=spec.reverse)
    return ys, state


def _fused(spec, chunk_size, xs, weights, state, given, scale):
    """Whole chunks first and the shorter tail after them (before them in reverse)."""
    T = xs.shape[1]
    L = min(chunk_size, T)
    bounds = [(0, T - T % L), (T - T % L, T)] if T % L else [(0, T)]
    pieces = []
    for start, stop in reversed(bounds) if spec.reverse else bounds:
        part = jax.tree.map(lambda a, cut=slice(start, stop): a[cut], given)
        ys, state = _chunks(spec, min(L, stop - start), xs[:, start:stop], weights, state, part, scale)
        pieces.append(ys)
    return jnp.concatenate(pieces[::-1] if spec.reverse else pieces) if len(pieces) > 1 else pieces[0], state


FORMS = {"scan": _scan, "fused": _fused}


def fused_bytes(spec, xs, weights, state, given, scale) -> dict[bool, Bytes]:
    """What the fused form sets aside, by remat: the traced shapes of one step, counted as often as they are held."""

    def step(xs, weights, state, given, scale):
        x = project(spec, xs[:, :1], weights, state.h.dtype)
        state, ys, kept = _run_chunk(spec, unstack(x), weights, state, jax.tree.map(first, given), scale, keep=True)
        one = jax.tree.map(lambda a: a[0], kept)
        given = jax.tree.map(lambda a: a[0], given)
        return x, ys, kept, linearised(spec, weights, one, given, scale)

    def first(a):
        return a[:1]

    x, ys, kept, linear = jax.eval_shape(step, xs, weights, state, given, scale)
    x, ys, kept, linear, step_in = (size(a) for a in (x, ys, kept, linear, xs[:, 0]))
    outside = max(ys, step_in)  # the outputs, then the gradients of the inputs
    work = linear + 3 * x  # the transposed rule; the gates, and their gradients as one array and as one a gate
    return {False: Bytes(outside + kept, 0, work), True: Bytes(outside, size(state), work)}


# The fused form: T is a multiple of the chunk length L from here on.


def _chunk_inputs(n, L, xs, given):
    """Chunk n: its slice of the batch-major inputs and of what is given time-major."""
    x = jax.lax.dynamic_slice_in_dim(xs, n * L, L, axis=1)
    return x, jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, n * L, L), given)


class Kept(NamedTuple):
    """What the backward pass of a chunk reads: the state before each step and all shares of the gates; a gate that the
    rule only adds to its recurrent share is kept as their sum, in x, with None in r."""

    state: State
    x: Gates
    r: tuple[Array | None, ...]
    u: Gates


def _run_chunk(spec, x, weights, state, given, scale, keep):
    """One chunk forward from its projected inputs x (L, B, ..., D), and what its backward pass needs, if asked for."""

    def body(state, inputs):
        x, given = inputs
        before = emptied(given.reset, state)
        (r, u), state, y = _step(spec, weights, before, x, given, scale)
        if not keep:
            return state, (y, None)
        added = only_added(spec, x, r, u, before, weights, given, scale)
        x = tuple(a + b if add else a for a, b, add in zip_longest(x, r[: len(x)], added[: len(x)]))
        return state, (y, Kept(before, x, tuple(None if add else b for b, add in zip(r, added)), u))

    state, (ys, kept) = jax.lax.scan(body, state, (x, given), reverse=spec.reverse)
    return state, ys, kept


def only_added(spec, x, r, u, state, weights, given, scale) -> tuple[bool, ...]:
    """For each recurrent share whether the rule, traced, has no other use of it and the input's than their sum."""

    def rule(x, r):
        return masked_rule(spec, x, (*r, *u), state, weights.params, given)

    def before_S(x, r):
        return inner(spec, x, r, state, weights.params, scale)

    traces = [jax.make_jaxpr(f)(x, r).jaxpr for f in (rule, *(() if weights.S is None else (before_S,)))]
    return tuple(
        n < len(x) and all(only_summed(trace, trace.invars[n], trace.invars[len(x) + n]) for trace in traces)
        for n in range(len(r))
    )


def only_summed(trace, a, b) -> bool:
    """Whether each use of a or b is a + b."""
    uses = [equation for equation in trace.eqns if any(v is a or v is b for v in equation.invars)]
    return not any(v is a or v is b for v in trace.outvars) and all(
        equation.primitive.name == "add" and {id(v) for v in equation.invars} == {id(a), id(b)} for equation in uses
    )


def linearised(spec, weights, kept, given, scale):
    """One step's transposed rule, of x, the shares in r that are kept, u, the state and the parameters; where there is
    an S, the inner value's transposed map and the value too."""

    def shares(r):
        r = iter(r)
        return tuple(jnp.zeros_like(kept.x[n]) if own is None else next(r) for n, own in enumerate(kept.r))

    def rule(x, r, u, state, params):
        return masked_rule(spec, x, (*shares(r), *u), state, params, given)

    r = tuple(own for own in kept.r if own is not None)
    pull = jax.vjp(rule, kept.x, r, kept.u, kept.state, weights.params)[1]
    if weights.S is None:
        return pull, None, None
    v, pull_inner = jax.vjp(
        lambda x, r, state, params: inner(spec, x, shares(r), state, params, scale),
        kept.x,
        r,
        kept.state,
        weights.params,
    )
    return pull, pull_inner, v


def _forward(spec, L, xs, weights, state, given, scale, keep):
    def body(state, n):
        x, part = _chunk_inputs(n, L, xs, given)
        x = unstack(project(spec, x, weights, state.h.dtype))
        new, ys, kept = _run_chunk(spec, x, weights, state, part, scale, keep and not spec.remat)
        return new, (ys, state if keep and spec.remat else kept)

    state, (ys, kept) = jax.lax.scan(body, state, jnp.arange(xs.shape[1] // L), reverse=spec.reverse)
    return ys.reshape(-1, *ys.shape[2:]), state, kept


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunks(spec, L, xs, weights, state, given, scale):
    ys, state, _ = _forward(spec, L, xs, weights, state, given, scale, keep=False)
    return ys, state


def _chunks_forward(spec, L, xs, weights, state, given, scale):
    ys, state, kept = _forward(spec, L, xs, weights, state, given, scale, keep=True)
    return (ys, state), (xs, weights, given, scale, kept)


def _chunks_backward(spec, L, residuals, cotangents):
    xs, weights, given, scale, kept = residuals
    d_ys, d_state = cotangents
    d_ys = d_ys.reshape(-1, L, *d_ys.shape[1:])

    def product(h, R):
        return spec.product(scaled(h, scale), R)

    def body(carry, inputs):
        d_state, d_weights = carry
        n, d_y, kept = inputs
        x_in, part = _chunk_inputs(n, L, xs, given)
        x, pull_projection = jax.vjp(lambda x, w: project(spec, x, w, d_state.h.dtype), x_in, weights)
        if spec.remat:
            kept = _run_chunk(spec, unstack(x), weights, kept, part, scale, keep=True)[2]
        linear = jax.vmap(lambda kept, given: linearised(spec, weights, kept, given, scale))  # all steps at once
        pull, pull_inner, v = jax.lax.optimization_barrier(linear(kept, part))
        added_all = len(kept.r) == len(kept.x) and all(share is None for share in kept.r)
        pull_R = spec.pull(weights.R, d_state.h)
        pull_S = None if v is None else spec.pull(weights.S, v[0])

        def reverse_step(carry, inputs):
            d_state, d_params = carry
            pull, pull_inner, d_y, reset = inputs
            dx, dr, du, d_state, dp = pull((d_state, d_y))
            if weights.S is not None:
                dx, dr, d_state, dp = jax.tree.map(jnp.add, (dx, dr, d_state, dp), pull_inner(pull_S(du)))
            own = iter(dr)
            dr = tuple(dx[n] if share is None else next(own) for n, share in enumerate(kept.r))
            d_h = scaled(pull_R(dr), scale)
            d_state = emptied(reset, d_state._replace(h=d_state.h + d_h))
            return (d_state, jax.tree.map(jnp.add, d_params, dp)), (dx, None if added_all else dr, du)

        (d_state, d_params), (dx, dr, du) = jax.lax.scan(
            reverse_step, (d_state, d_weights.params), (pull, pull_inner, d_y, part.reset), reverse=not spec.reverse
        )
        dx, dr = stack(dx), None if added_all else stack(dr)
        d_R = jax.vjp(lambda R: product(kept.state.h, R), weights.R)[1](dx if added_all else dr)[0]
        d_S = None if v is None else jax.vjp(lambda S: spec.product(v, S), weights.S)[1](stack(du))[0]
        d_x_in, d_projection = pull_projection(dx)
        d_projection = d_projection._replace(R=d_R, S=d_S, params=jax.tree.map(jnp.zeros_like, d_params))
        d_weights = jax.tree.map(jnp.add, d_weights._replace(params=d_params), d_projection)
        return (d_state, d_weights), d_x_in

    wide = jax.tree.map(lambda w: jnp.promote_types(w.dtype, jnp.float32), weights)
    zeros = jax.tree.map(lambda w, dtype: jnp.zeros_like(w, dtype), weights, wide)  # sums over chunks
    steps = jnp.arange(d_ys.shape[0])
    (d_state, d_weights), d_xs = jax.lax.scan(body, (d_state, zeros), (steps, d_ys, kept), reverse=not spec.reverse)
    d_weights = jax.tree.map(lambda d, w: d.astype(w.dtype), d_weights, weights)
    return jnp.moveaxis(d_xs, 0, 1).reshape(xs.shape), d_weights, d_state, None, None


_chunks.defvjp(_chunks_forward, _chunks_backward)
