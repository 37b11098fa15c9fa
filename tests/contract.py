"""One check of the contract for every cell, block and model: see `check`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

B, T, PIECE = 3, 12, 4


class Subject(NamedTuple):
    """make(**form, dtype=, param_dtype=) builds the module; `shape`: of its inputs after (B, T).

    tokens: the vocabulary if its inputs are tokens, else 0; causal: False where later inputs are read too.
    """

    make: Callable[..., nnx.Module]
    shape: tuple[int, ...]
    tokens: int = 0
    forms: tuple[dict, ...] = ({},)
    causal: bool = True


def draw(subject: Subject, params, seed: int):
    """Random parameters around the initial ones, inputs, and flags: any mask, one row without a valid step.

    By NumPy, as all here that is not the module's own: each shape that JAX draws or cuts is one more program.
    """
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: leaf + 0.2 * rng.standard_normal(leaf.shape), params)
    if subject.tokens:
        xs = rng.integers(0, subject.tokens, (B, T))
    else:
        xs = rng.standard_normal((B, T, *subject.shape))
    mask, reset = rng.random((B, T)) < 0.7, rng.random((B, T)) < 0.2
    mask[B - 1] = False
    return params, xs, mask, reset


class Programs:
    """The few compiled programs that all parts of the check share; `axes`: of the rows in each leaf of the state."""

    def __init__(self, graphdef, subject: Subject, axes):
        def apply(params, xs, state, mask, reset):
            return nnx.merge(graphdef, params)(xs, state, mask, reset)

        def loss(params, xs, state, mask, reset, weights):
            """Counts every output and every entry of the last state."""
            ys, last = apply(params, xs, state, mask, reset)
            floats = [leaf for leaf in jax.tree.leaves(last) if jnp.issubdtype(leaf.dtype, jnp.floating)]
            return jnp.sum(ys * weights[0]) + weights[1] * sum(jnp.sum(jnp.sin(leaf)) for leaf in floats), (ys, last)

        number = T // PIECE if subject.causal else 1  # of pieces
        counted = jnp.arange(1, number + 1) == number  # the last piece's state alone

        @jax.checkpoint
        def row(params, xs, state, mask, reset, weights):
            """One row, its pieces one after the other."""

            def body(state, piece):
                xs, mask, reset, weights, counts = piece
                cut = xs[None], state, mask[None], reset[None], (weights[None], counts)
                value, (ys, state) = loss(params, *cut)
                return state, (value, ys[0])

            state = jax.tree.map(jnp.expand_dims, state, axes)
            pieces = (a.reshape(number, -1, *a.shape[1:]) for a in (xs, mask, reset, weights[0]))
            state, (values, ys) = jax.lax.scan(body, state, (*pieces, counted * weights[1]))
            return jnp.sum(values), (ys.reshape(weights[0].shape), jax.tree.map(jnp.squeeze, state, axes))

        def parts(*args):
            in_axes = (None, 0, axes, 0, 0, (0, None))
            values, outputs = jax.vmap(row, in_axes, (0, (0, axes)))(*args)
            return jnp.sum(values), outputs

        argnums = (0,) if subject.tokens else (0, 1)
        gradient = lambda f: jax.jit(jax.value_and_grad(f, argnums=argnums, has_aux=True))  # noqa: E731
        self.whole = gradient(loss)
        # of a model the values alone: the gradients of its parts are checked with them, and these programs are large
        self.parts = jax.jit(lambda *args: (parts(*args), ())) if subject.tokens else gradient(parts)
        self.plain = jax.jit(lambda params, xs: apply(params, xs, None, None, None))
        self.step = jax.jit(lambda params, x, state, reset: nnx.merge(graphdef, params).step(x, state, reset))


def close(got, want, tolerance=1e-10, what=""):
    """Every leaf within `tolerance` of its largest entry (or of 1)."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want), what
    for g, w in zip(got, want):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        np.testing.assert_allclose(
            g, w, rtol=tolerance, atol=tolerance * max(1.0, np.abs(w).max(initial=0)), err_msg=what
        )


def to_front(rows, flags):
    """The entries of each row where `flags`, moved to the front in order; what follows is zero."""
    out = np.zeros_like(rows)
    for b in range(len(rows)):
        chosen = np.asarray(rows[b])[np.asarray(flags[b])]
        out[b, : len(chosen)] = chosen
    return out


def check(subject: Subject, *, seed: int = 0) -> None:
    """Everything the contract says, in float64 to 1e-10; call it with 64-bit floats on.

    The first form is the reference; all forms must give its outputs, states and gradients, and the last form
    is put through all properties.
    """
    module = subject.make(**subject.forms[0], param_dtype=jnp.float64)
    initial, empty = jax.tree.map(np.asarray, nnx.state(module)), module.initial_state(B)
    larger = jax.eval_shape(lambda: module.initial_state(B + 1))
    axes = jax.tree.map(lambda a, b: [m != n for m, n in zip(a.shape, b.shape)].index(True), empty, larger)
    params, xs, mask, reset = draw(subject, initial, seed)
    reference = None
    for form in subject.forms:
        programs = Programs(abstract(subject, **form, param_dtype=jnp.float64)[0], subject, axes)
        case = Case(programs, params, xs, mask, reset, empty, seed)
        results = [
            programs.whole(params, xs, case.state, *flags, case.weights)
            for flags in ((mask, reset), (case.on, case.off), (case.on, reset))
        ]
        reference = reference or results
        close(results, reference, what=f"{form} differs from {subject.forms[0]}")
    close(programs.plain(params, xs), (case.ys, case.state), what="without state and flags = from the empty state")
    for part in (masked_is_compacted, packed_is_alone, in_parts):
        part(subject, case)
    if subject.causal:
        step_by_step(subject, case)
        causal(subject, case)
    low_precision(subject, case, initial)
    jax.block_until_ready(jax.jit(lambda state: state, donate_argnums=0)(empty))  # no leaf twice


def abstract(subject, **options):
    """The module's graph and its parameters' shapes."""
    return nnx.split(nnx.eval_shape(lambda: subject.make(**options)))


class Case:
    """Programs and the arguments they are called with."""

    def __init__(self, programs, params, xs, mask, reset, empty, seed):
        self.programs, self.params, self.xs = programs, params, xs
        self.mask, self.reset, self.empty = mask, reset, empty
        self.on, self.off = np.ones((B, T), bool), np.zeros((B, T), bool)
        outputs = jax.eval_shape(programs.plain, params, xs)[0]
        self.weights = np.random.default_rng(seed + 1).standard_normal(outputs.shape), 1.0
        (_, (self.ys, self.state)), _ = programs.whole(params, xs, empty, self.on, self.off, self.weights)

    def run(self, *, params=None, xs=None, state=None, mask=None, reset=None, weights=None):
        """((loss, (outputs, last state)), gradients) of the whole sequence."""
        own = self.params, self.xs, self.state, self.on, self.off, self.weights
        given = zip((params, xs, state, mask, reset, weights), own)
        return self.programs.whole(*(default if arg is None else arg for arg, default in given))


def in_parts(subject, case):
    args = case.params, case.xs, case.state, case.mask, case.reset, case.weights
    value, grads = case.programs.whole(*args)
    close(
        case.programs.parts(*args),
        (value, () if subject.tokens else grads),
        what="split = whole, gradients too, and under vmap and checkpoint",
    )


def step_by_step(subject, case):
    stepped, state = [], case.state
    for t in range(T):
        y, state = case.programs.step(case.params, case.xs[:, t], state, case.reset[:, t])
        stepped.append(y)
    close((np.stack(stepped, 1), state), case.run(reset=case.reset)[0][1], what="step by step = sequence")


def masked_is_compacted(subject, case):
    """A row equals the row of its valid steps alone; a reset at a masked step counts for the next valid one."""
    mask, reset = case.mask, case.reset
    moved = np.zeros((B, T), bool)  # each reset at the valid step that it takes effect at
    for b in range(B):
        pending = False
        for t in range(T):
            pending |= reset[b, t]
            moved[b, t], pending = (pending, False) if mask[b, t] else (False, pending)
    front_mask, weights = to_front(np.ones((B, T), bool), mask), (to_front(case.weights[0], mask), 1.0)
    for flags in (reset, reset & mask) if subject.causal else (reset & mask,):
        (loss, (ys, state)), grads = case.run(mask=case.mask, reset=flags)
        assert np.all(np.asarray(ys)[~mask] == 0), "a masked step outputs zeros"
        (front_loss, (front, front_state)), front_grads = case.run(
            xs=to_front(case.xs, mask),
            mask=front_mask,
            reset=to_front(moved if flags is reset else flags, mask),
            weights=weights,
        )
        close(front, to_front(ys, mask), what="masked = compacted")
    close(
        (front_loss, front_state, front_grads[0]),
        (loss, state, grads[0]),
        what="masked = compacted: last state, gradients",
    )


def packed_is_alone(subject, case):
    """Each segment by itself, from the empty state, at the front of a row of its own: outputs and gradients."""
    (_, (packed, _)), grads = case.run(state=case.empty, reset=case.reset, weights=(case.weights[0], 0.0))
    segment = np.cumsum(case.reset, axis=1)
    total, outputs = jax.tree.map(np.zeros_like, grads[0]), np.zeros(packed.shape)
    for s in range(segment.max() + 1):
        own = segment == s
        (_, (ys, _)), own_grads = case.run(
            xs=to_front(case.xs, own),
            state=case.empty,
            mask=to_front(np.ones((B, T), bool), own),
            weights=(to_front(case.weights[0], own), 0.0),
        )
        total = jax.tree.map(np.add, total, own_grads[0])
        for b in range(B):
            outputs[b][own[b]] = np.asarray(ys)[b][: own[b].sum()]
    close((packed, grads[0]), (outputs, total), what="packed = each sequence alone")


def causal(subject, case):
    """Nothing of a later input in an earlier output, nothing of what is before a reset after it: exactly zero."""
    t, late = T // 2, np.arange(T) > T // 2
    cut = np.broadcast_to(np.arange(T) == t + 1, (B, T))
    if subject.tokens:
        changed = np.where(late, case.xs + 1, case.xs) % subject.tokens
        before, after = (np.asarray(case.run(xs=xs)[0][1][0])[:, : t + 1] for xs in (case.xs, changed))
        assert np.array_equal(before, after), "causality"
        changed = np.where(late, case.xs, case.xs + 1) % subject.tokens
        before, after = (np.asarray(case.run(xs=xs, reset=cut)[0][1][0])[:, t + 1 :] for xs in (case.xs, changed))
        assert np.array_equal(before, after), "nothing crosses a reset"
        return
    early = case.weights[0].copy()
    early[:, t + 1 :] = 0
    grad = case.run(reset=case.reset, weights=(early, 0.0))[1][1]
    assert np.all(np.asarray(grad)[:, t + 1 :] == 0), "causality"
    grad = case.run(reset=cut, weights=(case.weights[0] - early, 1.0))[1][1]
    assert np.all(np.asarray(grad)[:, : t + 1] == 0), "nothing crosses a reset"


def low_precision(subject, case, initial):
    """bfloat16 beside float64; and what float32 gives is float32, with 64-bit floats on."""
    options = dict(subject.forms[-1], param_dtype=jnp.float32)
    (single, shapes), (half, _) = (abstract(subject, **options, dtype=dtype) for dtype in (None, jnp.bfloat16))
    run = lambda graphdef: lambda params, xs, *flags: nnx.merge(graphdef, params)(xs, None, *flags)  # noqa: E731
    inputs = case.xs if subject.tokens else case.xs.astype(np.float32), case.mask, case.reset
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(jax.eval_shape(run(single), shapes, *inputs))}
    assert "float32" in kinds and not {"float64", "bfloat16"} & kinds, kinds
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), initial)
    got, state = jax.jit(run(half))(params, *inputs)
    (_, (want, _)), _ = case.run(params=initial, state=case.empty, mask=case.mask, reset=case.reset)
    got, want = np.asarray(got, np.float64), np.asarray(want)
    assert np.max(np.abs(got - want)) < 0.03 * max(np.max(np.abs(want)), 1e-2), "bfloat16 stays near float64"
    assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(state)), "the state stays float32"
