"""What bounds a whole model: its matrix products alone, found by its own weights."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.benchmarks import layers, whole
from experiments.benchmarks.cases import Case
from experiments.benchmarks.timing import Program, jax_program
from xlstm_jax import cells
from xlstm_jax.blocks import MLSTMLayer
from xlstm_jax.layers import HeadwiseLinear

KEPT = 1e-6  # the share of a gradient that changes the weights between two steps: enough for a product to depend on it


class Parts(NamedTuple):
    """The modules of a model that multiply matrices, one of each layer."""

    linear: list[nnx.Module]  # `nnx.Linear` or `HeadwiseLinear`
    recurrent: list[cells.Cell]  # with W and R
    memories: list[nnx.Module]  # of queries, keys and values
    head: nnx.Linear


def modules(lm: nnx.Module, kinds: tuple[type, ...]) -> Iterator[nnx.Module]:
    """Those of these kinds, each of a stack's repeats on its own."""
    stacks = {path: m.repeats for path, m in nnx.iter_graph(lm) if isinstance(m, cells.Stack) and m.repeats > 1}
    for path, module in nnx.iter_graph(lm):
        if isinstance(module, kinds):
            repeats = next((n for outer, n in stacks.items() if path[: len(outer)] == outer), None)
            graphdef, params = nnx.split(module)
            part = lambda n: nnx.merge(graphdef, jax.tree.map(lambda a: a[n], params))  # noqa: B023, E731
            yield from [module] if repeats is None else map(part, range(repeats))


def parts(lm: nnx.Module) -> Parts:
    return Parts(
        [each for each in modules(lm, (nnx.Linear, HeadwiseLinear)) if each is not lm.head],
        [each for each in modules(lm, (cells.Cell,)) if hasattr(each, "R")],
        list(modules(lm, (cells.MLSTM, MLSTMLayer))),
        lm.head,
    )


def widths(memory: nnx.Module) -> tuple[int, int, int]:
    """Heads, and the widths of a key and a value of one."""
    N = memory.num_heads
    if isinstance(memory, cells.MLSTM):
        return N, memory.qk_features // N, memory.features // N
    return N, memory.inner // N, memory.inner // N


def rows(case: Case) -> tuple[int, int]:
    """Of a product of one pass over the model, and of the head's."""
    s = case.sizes
    B, T = s["B"], s.get("T", 1)
    return B * T, B if case.kind == "prefill" else B * T


def operations(case: Case) -> float:
    """Two a weight and row; those of the memories' chunks; with the gradients three times as many."""
    found = {}

    def count():
        linear, recurrent, memories, head = parts(whole.model(case))
        found["matrices"] = sum(each.kernel.size for each in linear)
        found["matrices"] += sum(each.R.size + (0 if each.W is None else each.W.size) for each in recurrent)
        found["head"], found["memories"] = head.kernel.size, [widths(each) for each in memories]
        return ()

    jax.eval_shape(count)
    (each, last), s = rows(case), case.sizes
    total = 2.0 * (found["matrices"] * each + found["head"] * last)
    if case.kind == "decode":
        return total * s["length"]
    for N, K, V in found["memories"]:
        total += layers.flops(Case("mlstm", dict(B=s["B"], T=s["T"], N=N, K=K, V=V), {}), "forward")
    if case.kind == "parity":
        total *= s["seeds"] * s["steps"]
    return total * (1 if case.kind == "prefill" else 3)


def noise(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def inputs(case: Case, model: Parts) -> tuple[list, list, list]:
    """Of the linear modules (the head last), of the cells, and of the memories, at the shapes of the case."""
    (each, last), (B, T) = rows(case), (case.sizes["B"], case.sizes["T"])
    shapes = [
        (*m.kernel.shape[:-2], last if m is model.head else each, m.kernel.shape[-2])
        for m in [*model.linear, model.head]
    ]
    of_cells = [(B, T, m.in_features) if m.W is not None else (B, T, len(m.gates), m.features) for m in model.recurrent]
    of_memories = [((B, N, T, K), (B, N, T, K), (B, N, T, V)) for N, K, V in map(widths, model.memories)]
    return (
        [noise(*shape) for shape in shapes],
        [noise(*shape) for shape in of_cells],
        [layers.in_chunks(*(noise(*shape) for shape in three)) for three in of_memories],
    )


def program(case: Case, pass_: str) -> Program:
    """All products of a model, and those of their gradients where it learns; `decode` a token after another."""
    model = parts(whole.model(case))
    if case.kind == "decode":
        return chain(case, model)
    linear, learns = [*model.linear, model.head], case.kind != "prefill"
    settings = [layers.setting(cell, case.sizes["B"]) for cell in model.recurrent]
    weights = (
        [module.kernel[...] for module in linear],
        [(None if cell.W is None else cell.W[...], cell.R[...]) for cell in model.recurrent],
    )

    def independent(kernels, xs, memories):
        ys = [x @ kernel for x, kernel in zip(xs, kernels)]  # of rows, or of heads and rows
        return ys, [layers.chunk_products(*each) for each in memories]

    def run(weights, given):
        """With gradients: those of the weights first."""
        (kernels, of_cells), (xs, cell_xs, memories) = weights, given
        found = [
            layers.cell_products(maps, state, W, R, x, learns)
            for (maps, state), (W, R), x in zip(settings, of_cells, cell_xs)
        ]
        if not learns:
            return independent(kernels, xs, memories), found
        ys, pull = jax.vjp(independent, kernels, xs, memories)
        d_kernels, *d_inputs = pull(ys)
        return (d_kernels, [d for d, _ in found]), (d_inputs, [d for _, d in found])

    def steps(weights, given):
        """One after another: each has the weights that the one before left."""

        def step(_, carry):
            weights, _ = carry
            gradients, others = run(weights, given)
            return jax.tree.map(lambda w, d: w - KEPT * d, weights, gradients), others

        start = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(run, weights, given)[1])
        return jax.lax.fori_loop(0, case.sizes["seeds"] * case.sizes["steps"], step, (weights, start))

    return jax_program(steps if case.kind == "parity" else run, weights, inputs(case, model))


def chain(case: Case, model: Parts) -> Program:
    """`length` tokens, each of them through all weights, every product waiting for the one before it."""
    B, length, kernels = case.sizes["B"], case.sizes["length"], []
    for cell in model.recurrent:
        each = [cell.R[...]] if cell.W is None else [cell.W[...][None], cell.R[...]]
        kernels += [a.reshape(*a.shape[:2], -1) for a in each]
    kernels += [module.kernel[...] for module in [*model.linear, model.head]]

    def run(kernels, x):
        def token(x, _):
            for kernel in kernels:
                x = jnp.resize(jnp.cos(x), (*kernel.shape[:-2], B, kernel.shape[-2]))  # neither grows nor vanishes
                x = jnp.matmul(x, kernel)
            return x, None

        return jax.lax.scan(token, x, None, length=length)[0]

    found = jax_program(run, kernels, jnp.ones((B, kernels[-1].shape[1])))
    return found._replace(traffic_bytes=length * sum(kernel.nbytes for kernel in kernels))
