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


def draw(subject: Subject, module: nnx.Module, seed: int):
    """Random parameters around the initial ones, inputs, and flags: any mask, one row without a valid step."""
    keys = iter(jax.random.split(jax.random.key(seed), 16))
    graphdef, params = nnx.split(module)
    leaves, treedef = jax.tree.flatten(params)
    leaves = [
        leaf + 0.2 * jax.random.normal(key, leaf.shape, leaf.dtype)
        for leaf, key in zip(leaves, jax.random.split(next(keys), len(leaves)))
    ]
    params = jax.tree.unflatten(treedef, leaves)
    if subject.tokens:
        xs = jax.random.randint(next(keys), (B, T), 0, subject.tokens)
    else:
        xs = jax.random.normal(next(keys), (B, T, *subject.shape), jnp.float64)
    mask = jax.random.bernoulli(next(keys), 0.7, (B, T)).at[B - 1].set(False)
    reset = jax.random.bernoulli(next(keys), 0.2, (B, T))
    return graphdef, params, xs, mask, reset


class Programs:
    """The few compiled programs that all parts of the check share."""

    def __init__(self, graphdef, tokens: bool):
        def apply(params, xs, state, mask, reset):
            return nnx.merge(graphdef, params)(xs, state, mask, reset)

        def loss(params, xs, state, mask, reset, weights):
            """Counts every output and every entry of the last state."""
            ys, last = apply(params, xs, state, mask, reset)
            floats = [leaf for leaf in jax.tree.leaves(last) if jnp.issubdtype(leaf.dtype, jnp.floating)]
            return jnp.sum(ys * weights[0]) + weights[1] * sum(jnp.sum(jnp.sin(leaf)) for leaf in floats), (ys, last)

        def pieces(params, xs, state, mask, reset, weights):
            def body(state, piece):
                xs, mask, reset, *weights = piece
                value, (ys, state) = loss(params, xs, state, mask, reset, weights)
                return state, (value, ys)

            last = jnp.zeros((B, T // PIECE)).at[:, -1].set(weights[1])  # only the last piece's state counts
            cut = [a.reshape(B, T // PIECE, -1, *a.shape[2:]).swapaxes(0, 1) for a in (xs, mask, reset, weights[0])]
            state, (values, ys) = jax.lax.scan(body, state, (*cut, last[0]))
            return jnp.sum(values), (ys.swapaxes(0, 1).reshape(weights[0].shape), state)

        argnums = (0,) if tokens else (0, 1)
        gradient = lambda f: jax.jit(jax.value_and_grad(f, argnums=argnums, has_aux=True))  # noqa: E731
        self.whole = gradient(loss)
        # of a model the values alone: the gradients of its parts are checked with them, and these programs are large
        self.pieces = jax.jit(lambda *args: (pieces(*args), ())) if tokens else gradient(pieces)
        self.plain = jax.jit(lambda params, xs: apply(params, xs, None, None, None))
        self.step = jax.jit(lambda params, x, state, reset: nnx.merge(graphdef, params).step(x, state, reset))
        one_row = lambda params, x, m, r: loss(params, x[None], None, m[None], r[None], (1.0, 1.0))[0]  # noqa: E731
        rows = lambda params, xs, m, r: jnp.sum(jax.vmap(jax.checkpoint(one_row), (None, 0, 0, 0))(params, xs, m, r))  # noqa: E731
        self.rows = jax.jit((lambda *args: (rows(*args), ())) if tokens else jax.value_and_grad(rows, argnums=argnums))


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
    return jnp.asarray(out)


def check(subject: Subject, *, seed: int = 0) -> None:
    """Everything the contract says, in float64 to 1e-10; call it with 64-bit floats on.

    The first form is the reference; all forms must give its outputs, states and gradients, and the last form
    is put through all properties.
    """
    reference = None
    for form in subject.forms:
        module = subject.make(**form, param_dtype=jnp.float64)
        graphdef, params, xs, mask, reset = draw(subject, module, seed)
        programs = Programs(graphdef, bool(subject.tokens))
        case = Case(programs, params, xs, mask, reset, module.initial_state(B), seed)
        results = [
            programs.whole(params, xs, case.state, *flags, case.weights)
            for flags in ((mask, reset), (case.on, case.off), (case.on, reset))
        ]
        reference = reference or results
        close(results, reference, what=f"{form} differs from {subject.forms[0]}")
    jax.block_until_ready(jax.jit(lambda state: state, donate_argnums=0)(module.initial_state(B)))  # no leaf twice
    close(programs.plain(params, xs), (case.ys, case.state), what="without state and flags = from the empty state")
    for part in (masked_is_compacted, packed_is_alone, transforms):
        part(subject, case)
    if subject.causal:
        whole_or_in_parts(subject, case)
        causal(subject, case)
    low_precision(subject, xs, mask, reset)


class Case:
    """Programs and the arguments they are called with."""

    def __init__(self, programs, params, xs, mask, reset, empty, seed):
        self.programs, self.params, self.xs = programs, params, xs
        self.mask, self.reset, self.empty = mask, reset, empty
        self.on, self.off = jnp.ones((B, T), bool), jnp.zeros((B, T), bool)
        outputs = jax.eval_shape(programs.plain, params, xs)[0]
        ones = jnp.ones(outputs.shape, outputs.dtype), 1.0  # shaped as all later weights: one program for all
        (_, (self.ys, self.state)), _ = programs.whole(params, xs, empty, self.on, self.off, ones)
        self.weights = (jax.random.normal(jax.random.key(seed + 1), self.ys.shape, self.ys.dtype), 1.0)

    def run(self, *, xs=None, state=None, mask=None, reset=None, weights=None):
        """((loss, (outputs, last state)), gradients) of the whole sequence."""
        given = zip((xs, state, mask, reset, weights), (self.xs, self.state, self.on, self.off, self.weights))
        return self.programs.whole(self.params, *(own if arg is None else arg for arg, own in given))


def whole_or_in_parts(subject, case):
    p = case.programs
    args = case.params, case.xs, case.state, case.mask, case.reset, case.weights
    value, grads = p.whole(*args)
    close(p.pieces(*args), (value, () if subject.tokens else grads), what="split = whole, gradients too")
    stepped, state = [], case.state
    for t in range(T):
        y, state = p.step(case.params, case.xs[:, t], state, case.reset[:, t])
        stepped.append(y)
    close((jnp.stack(stepped, 1), state), case.run(reset=case.reset)[0][1], what="step by step = sequence")


def masked_is_compacted(subject, case):
    """A row equals the row of its valid steps alone; a reset at a masked step counts for the next valid one."""
    mask, reset = np.asarray(case.mask), np.asarray(case.reset)
    moved = np.zeros((B, T), bool)  # each reset at the valid step that it takes effect at
    for b in range(B):
        pending = False
        for t in range(T):
            pending |= reset[b, t]
            moved[b, t], pending = (pending, False) if mask[b, t] else (False, pending)
    front_mask, weights = to_front(np.ones((B, T), bool), mask), (to_front(case.weights[0], mask), 1.0)
    for flags in (reset, reset & mask) if subject.causal else (reset & mask,):
        (loss, (ys, state)), grads = case.run(mask=case.mask, reset=jnp.asarray(flags))
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
    segment = np.cumsum(np.asarray(case.reset), axis=1)
    total, outputs = jax.tree.map(jnp.zeros_like, grads[0]), np.zeros(packed.shape)
    for s in range(segment.max() + 1):
        own = segment == s
        (_, (ys, _)), own_grads = case.run(
            xs=to_front(case.xs, own),
            state=case.empty,
            mask=to_front(np.ones((B, T), bool), own),
            weights=(to_front(case.weights[0], own), 0.0),
        )
        total = jax.tree.map(jnp.add, total, own_grads[0])
        for b in range(B):
            outputs[b][own[b]] = np.asarray(ys)[b][: own[b].sum()]
    close((packed, grads[0]), (outputs, total), what="packed = each sequence alone")


def causal(subject, case):
    """Nothing of a later input in an earlier output, nothing of what is before a reset after it: exactly zero."""
    t = T // 2
    if subject.tokens:
        changed = case.xs.at[:, t + 1 :].add(1) % subject.tokens
        before, after = (case.run(xs=xs)[0][1][0][:, : t + 1] for xs in (case.xs, changed))
        assert np.array_equal(before, after), "causality"
        changed = case.xs.at[:, : t + 1].add(1) % subject.tokens
        reset = case.off.at[:, t + 1].set(True)
        before, after = (case.run(xs=xs, reset=reset)[0][1][0][:, t + 1 :] for xs in (case.xs, changed))
        assert np.array_equal(before, after), "nothing crosses a reset"
        return
    early = case.weights[0].at[:, t + 1 :].set(0)
    grad = case.run(reset=case.reset, weights=(early, 0.0))[1][1]
    assert np.all(np.asarray(grad[:, t + 1 :]) == 0), "causality"
    grad = case.run(reset=case.off.at[:, t + 1].set(True), weights=(case.weights[0] - early, 1.0))[1][1]
    assert np.all(np.asarray(grad[:, : t + 1]) == 0), "nothing crosses a reset"


def transforms(subject, case):
    got = case.programs.rows(case.params, case.xs, case.mask, case.reset)
    (loss, _), grads = case.run(
        state=case.empty, mask=case.mask, reset=case.reset, weights=(jnp.ones_like(case.ys), 1.0)
    )
    close(got, (loss, () if subject.tokens else grads), what="vmap and checkpoint change nothing")


def low_precision(subject, xs, mask, reset):
    single, half = (
        subject.make(**subject.forms[-1], param_dtype=jnp.float32, dtype=dtype) for dtype in (None, jnp.bfloat16)
    )
    xs = xs if subject.tokens else xs.astype(jnp.float32)
    want, _ = jax.jit(lambda module, *args: module(*args))(single, xs, None, mask, reset)
    got, state = jax.jit(lambda module, *args: module(*args))(half, xs, None, mask, reset)
    error = float(jnp.max(jnp.abs(got.astype(jnp.float32) - want)))
    assert error < 0.03 * max(float(jnp.max(jnp.abs(want))), 1e-2), "bfloat16 stays near float32"
    assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(state)), "the state stays float32"
