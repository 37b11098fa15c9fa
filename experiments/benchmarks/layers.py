"""Our layers of a case: what is timed in each form, what it must agree with, its matrix products and its loop alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.benchmarks.cases import BOTH, Case
from experiments.benchmarks.timing import Program, jax_program
from xlstm_jax import cells
from xlstm_jax.kernels.feature_major import LEAST_ROWS, LONGEST_CHUNK, FeatureMajor, serves, turned
from xlstm_jax.kernels.fused import fused
from xlstm_jax.kernels.mlstm import mlstm
from xlstm_jax.kernels.rules import Given, Maps, Spec, Weights

RULE_FORMS = {
    "default": {},
    "scan": dict(form="scan"),
    "fused 16": dict(form="fused", chunk_size=16),
    "fused 64": dict(form="fused", chunk_size=64),
    "fused 256": dict(form="fused", chunk_size=256),
    "fused 64 remat": dict(form="fused", chunk_size=64, remat=True),
}
MEMORY_FORMS = {
    "default": {},
    "recurrent": dict(form="recurrent"),
    "parallel": dict(form="parallel"),
    "chunkwise 32": dict(form="chunkwise", chunk_size=32),
    "chunkwise 64": dict(form="chunkwise", chunk_size=64),
    "chunkwise 128": dict(form="chunkwise", chunk_size=128),
    "chunkwise 256": dict(form="chunkwise", chunk_size=256),
}
KINDS = ("lstm", "gru", "bilstm", "slstm", "convlstm", "mlstm")
LONGEST_PARALLEL = 2048  # steps
CHECKED = dict(B=2, T=272)  # sizes of the gradient check, at most; the others are the case's own
TOLERANCE = 1e-9  # of a gradient, relative to its largest entry
PRODUCT_CHUNK = 64  # the chunk that the mLSTM's products are counted for


class Data(NamedTuple):
    """Numpy arrays, the same for all; xs and what follows are differentiated, a cotangent per output."""

    inputs: tuple[np.ndarray, ...]
    lengths: np.ndarray | None
    cotangent: np.ndarray


class Layer(NamedTuple):
    """apply(params, inputs) -> outputs, in JAX."""

    apply: Callable[[Any, tuple], Any]
    params: Any
    inputs: tuple


def data(case: Case) -> Data:
    """Noise, from one seed."""
    random, s = np.random.default_rng(0), case.sizes
    noise = lambda *shape: random.standard_normal(shape, np.float32)  # noqa: E731
    B, T = s["B"], s["T"]
    if case.kind == "mlstm":
        q, k, v = (noise(B, s["N"], T, s[width]) for width in ("K", "K", "V"))  # heads first, as all peers take them
        return Data((q, k, v, noise(B, s["N"], T), noise(B, s["N"], T) + 3), None, noise(*v.shape))
    if case.kind == "slstm":
        return Data((noise(B, T, 4, s["H"]),), None, noise(B, T, s["H"]))
    if case.kind == "convlstm":
        return Data((noise(B, T, s["S"], s["S"], s["C"]),), None, noise(B, T, s["S"], s["S"], s["H"]))
    if case.kind == "bilstm":
        lengths = random.integers(T // 2, T + 1, B)
        lengths[0] = T  # as long as the padded batch
        valid = np.arange(T)[None, :, None] < lengths[:, None, None]
        return Data((noise(B, T, s["D"]),), lengths, noise(B, T, 2 * s["H"]) * valid)
    return Data((noise(B, T, s["D"]),), None, noise(B, T, s["H"]))


def cell(case: Case, options: dict[str, Any], param_dtype=jnp.float32) -> cells.Cell:
    """From one seed; the mLSTM case is its kernel and has none."""
    s, shared = case.sizes, dict(param_dtype=param_dtype) | options
    if case.kind == "gru":
        return cells.GRU(s["D"], s["H"], reset_after=True, rngs=nnx.Rngs(0), **shared)
    if case.kind == "slstm":
        return cells.SLSTM(None, s["H"], num_heads=s["N"], recurrent_init="orthogonal", rngs=nnx.Rngs(0), **shared)
    if case.kind == "convlstm":
        return cells.ConvLSTM(s["C"], s["H"], 3, space=(s["S"], s["S"]), rngs=nnx.Rngs(0), **shared)
    if case.kind == "bilstm":
        return cells.Bidirectional(*(cells.LSTM(s["D"], s["H"], rngs=nnx.Rngs(n), **shared) for n in range(2)))
    return cells.LSTM(s["D"], s["H"], rngs=nnx.Rngs(0), **shared)


def forms(case: Case) -> dict[str, dict[str, Any]]:
    """Options by name; the second is the plain form that the others must agree with."""
    known = MEMORY_FORMS if case.kind == "mlstm" else RULE_FORMS
    T = case.sizes["T"]

    def useful(name, options):
        return options.get("chunk_size", 0) <= T and not (name == "parallel" and T > LONGEST_PARALLEL)

    return {name: options for name, options in known.items() if useful(name, options)}


def layer(case: Case, options: dict[str, Any], given: Data, dtype=jnp.float32) -> Layer:
    """Ours, in a form."""
    inputs = tuple(jnp.asarray(a, dtype) for a in given.inputs)
    if case.kind == "mlstm":
        turned = lambda arrays: [jnp.swapaxes(a, 1, 2) for a in arrays]  # noqa: E731
        return Layer(lambda params, inputs: turned([mlstm(*turned(inputs), **options)[0]])[0], (), inputs)
    graphdef, params = nnx.split(cell(case, options, dtype))
    mask = None
    if given.lengths is not None:
        mask = jnp.arange(given.inputs[0].shape[1])[None] < jnp.asarray(given.lengths)[:, None]
    return Layer(lambda params, inputs: nnx.merge(graphdef, params)(*inputs, mask=mask)[0], params, inputs)


def both(apply: Callable) -> Callable:
    """(params, inputs, cotangent) to the outputs and the gradients of params and inputs."""

    def run(params, inputs, cotangent):
        ys, pull = jax.vjp(apply, params, inputs)
        return ys, pull(cotangent)

    return run


def program(layer: Layer, pass_: str, cotangent: np.ndarray) -> Program:
    """A JAX layer, ours or another's, in one pass."""
    if pass_ == BOTH:
        return jax_program(both(layer.apply), layer.params, layer.inputs, jnp.asarray(cotangent))
    return jax_program(layer.apply, layer.params, layer.inputs)


def plain(case: Case) -> str:
    return "recurrent" if case.kind == "mlstm" else "scan"


def check(case: Case) -> dict[str, dict[str, Any]]:
    """By form: the error of its float64 gradients, relative to the plain form's by autodiff."""
    least = CHECKED | (dict(B=LEAST_ROWS) if case.sizes["B"] >= LEAST_ROWS else {})  # a CPU has as many last
    sizes = {axis: min(size, least.get(axis, size)) for axis, size in case.sizes.items()}
    small = case._replace(sizes=sizes)
    given, found, want = data(small), {}, None
    with jax.enable_x64(True):
        for name in (plain(case), *(name for name in forms(case) if name != plain(case))):
            each = layer(small, forms(case)[name], given, jnp.float64)
            got = jax.jit(both(each.apply))(each.params, each.inputs, jnp.asarray(given.cotangent, jnp.float64))
            want = got if want is None else want
            error = worst(got, want)
            found[name] = dict(error=float(f"{error:.2g}"), tolerance=TOLERANCE, ok=bool(error <= TOLERANCE))
            found[name] |= dict(against=f"{plain(case)}, autodiff, float64", sizes=sizes)
    return found


def worst(got: Any, want: Any) -> float:
    """The largest error of any array, relative to the array's largest entry; infinite where it is no number."""
    errors = [0.0]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30)
        errors.append(float(error) if np.isfinite(error) else np.inf)
    return max(errors)


def setting(one: cells.Cell, B: int) -> tuple[Maps, Any]:
    """The maps that a cell's default form uses for B rows, and an empty state of them."""
    state, spec = one.initial_state(B), Spec(one.rule, one.maps, jnp.float32, False, False)
    weights = Weights(one.R, None, None, None, one.rule_params())
    return FeatureMajor() if serves(spec, weights, state) else one.maps, state


def directions(case: Case, given: Data) -> list[tuple[cells.Cell, Maps, Any]]:
    """The case's cells, one or two, each with its `setting`."""
    each = cell(case, {})
    both = [each.forward, each.backward] if case.kind == "bilstm" else [each]
    return [(one, *setting(one, given.inputs[0].shape[0])) for one in both]


def products(case: Case, pass_: str, given: Data) -> Program:
    """The matrix products (or convolutions) alone, the recurrent ones one after another."""
    if case.kind == "mlstm":
        return memory_products(case, pass_, given)
    each = directions(case, given)
    weights = [(None if one.W is None else one.W[...], one.R[...]) for one, *_ in each]

    def run(weights, xs):
        return [cell_products(maps, state, *own, xs, pass_ == BOTH) for (_, maps, state), own in zip(each, weights)]

    return jax_program(run, weights, jnp.asarray(given.inputs[0]))


def input_products(maps: Maps, W: jax.Array | None, xs: jax.Array) -> tuple[jax.Array, Callable]:
    """The inputs' share of the gates, and how its gradient becomes those of xs and W."""
    x = maps.by_step(xs)
    if W is None:
        return x, lambda dx: (dx, None)
    if not maps.inputs_in_loop:
        return jax.vjp(lambda x, W: maps.project(x, W, jnp.float32), x, W)
    pull = maps.pull(W[None], None)
    of_W = lambda dx: jax.vjp(lambda W: maps.product(x, W[None]), W)[1](dx)[0]  # noqa: E731
    return jax.lax.map(maps.push(W[None]), x), lambda dx: (jax.lax.map(lambda d: pull(tuple(d)), dx), of_W(dx))


def cell_products(maps: Maps, state: Any, W: jax.Array | None, R: jax.Array, xs: jax.Array, backward: bool):
    """Those of one cell; backward: the gradients of (W, R), and of (xs, h)."""
    x, pull_inputs = input_products(maps, W, xs)
    h = jnp.moveaxis(jnp.full(state.h.shape, 0.1), 0, maps.rows)
    push, pull = maps.push(R), maps.pull(R, h)

    def step(h, _):
        return maps.unstack(push(h))[0], h

    last, hs = jax.lax.scan(step, h, None, length=x.shape[0])
    if not backward:
        return x, last
    d_h = jax.lax.scan(lambda _, d: (pull(tuple(maps.unstack(d))), None), h, x)[0]
    d_R = jax.vjp(lambda R: maps.product(hs, R), R)[1](x)[0]
    d_xs, d_W = pull_inputs(x)
    return (d_W, d_R), (d_xs, d_h)


class NoProducts(Maps):
    """The recurrent product is zero, and costs nothing."""

    def product(self, h, R):
        N, _, G, F = R.shape
        return jnp.zeros((*h.shape[:-1], G, N * F), h.dtype)

    def pull(self, R, like):
        return lambda d_r: jnp.zeros_like(like)


class NoProductsLast(FeatureMajor):
    """The same with the rows last."""

    def product(self, h, R):
        N, _, G, F = R.shape
        return jnp.zeros((*h.shape[:-2], G, N * F, h.shape[-1]), h.dtype)

    push = Maps.push

    def pull(self, R, like):
        return lambda d_r: jnp.zeros_like(like)


def loop(case: Case, pass_: str, given: Data) -> Program:
    """The loop over time alone: the rule, its states and outputs, with the gates given and no product."""
    each, (B, T) = directions(case, given), given.inputs[0].shape[:2]
    gates = np.random.default_rng(0).standard_normal((B, T, len(each[0][0].gates), case.sizes["H"]), np.float32)

    def direction(one, maps, state, gates):
        spec, nothing = Spec(one.rule, NoProducts(), jnp.float32, False, False), Given(None, None, ())
        weights = Weights(one.R[...], None, None, None, one.rule_params())
        if not maps.inputs_in_loop:
            return fused(spec, one.chunk_size, gates, weights, state, nothing, None)[0]
        spec, state, nothing, _ = turned(spec, state, nothing, None)
        return fused(spec._replace(maps=NoProductsLast()), LONGEST_CHUNK, gates, weights, state, nothing, None)[0]

    def apply(params, gates):
        return [direction(*one, gates) for one in each]

    cotangent = [jnp.ones((B, T, case.sizes["H"]))] * len(each)
    return jax_program(*((both(apply), (), gates, cotangent) if pass_ == BOTH else (apply, (), gates)))


def in_chunks(*inputs: jax.Array) -> list[jax.Array]:
    """Whole chunks of (B, N, T, K) as (B, N, T / L, L, K)."""
    L = min(PRODUCT_CHUNK, inputs[0].shape[2])
    return [a[:, :, : a.shape[2] // L * L].reshape(*a.shape[:2], -1, L, a.shape[3]) for a in inputs]


def chunk_products(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Those of the chunkwise mLSTM, all chunks at once."""
    P = jnp.einsum("bhntk,bhnjk->bhntj", q, k)
    C = jnp.einsum("bhnjk,bhnjv->bhnkv", k, v)
    return jnp.einsum("bhntj,bhnjv->bhntv", P, v), jnp.einsum("bhntk,bhnkv->bhntv", q, C)


def memory_products(case: Case, pass_: str, given: Data) -> Program:
    """Those of the chunkwise form."""

    def run(q, k, v):
        if pass_ != BOTH:
            return chunk_products(q, k, v)
        hs, pull = jax.vjp(chunk_products, q, k, v)
        return hs, pull(hs)

    return jax_program(run, *in_chunks(*map(jnp.asarray, given.inputs[:3])))


def flops(case: Case, pass_: str) -> float:
    """Of the matrix products alone, two a multiplication with its sum; backward takes twice the forward's."""
    s = case.sizes
    times = 3 if pass_ == BOTH else 1
    if case.kind == "mlstm":
        L, K, V = min(PRODUCT_CHUNK, s["T"]), s["K"], s["V"]
        return times * 2 * s["B"] * s["T"] * s["N"] * (L * K + L * V + 2 * K * V)
    if case.kind == "convlstm":
        return times * 2 * s["B"] * s["T"] * s["S"] ** 2 * 9 * (s["C"] + s["H"]) * 4 * s["H"]
    gates = 3 if case.kind == "gru" else 4
    inputs = s["D"] if "D" in s else 0
    directions = 2 if case.kind == "bilstm" else 1
    return times * directions * 2 * s["B"] * s["T"] * gates * s["H"] * (inputs + s["H"] / s.get("N", 1))
