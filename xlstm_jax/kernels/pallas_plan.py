"""Sizes of the recurrent kernels, tiles and VMEM of the TPU's, from shapes alone, and why a rule has none."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .rules import Dense, Given, Spec, Weights

LANES, SUBLANES = 128, 8
LONGEST_BLOCK, SHORTEST_BLOCK, LARGEST_TILE = 32, 8, 256  # steps, steps, rows


class Sizes(NamedTuple):
    """What the kernels are made for; `heads` blocks in R of `width` each, several narrow heads being one block.

    G, K: gates of the input and of R; fields, params: arrays in the state and of the rule; flags, scale: whether there
    are masks or resets, and a state_scale; same: whether the gradients of both shares of the gates are equal.
    """

    B: int
    T: int
    heads: int
    width: int
    G: int
    K: int
    fields: int
    params: int
    flags: bool
    scale: bool
    same: bool
    product_bytes: int
    state_bytes: int

    @property
    def rows(self) -> int:
        """B in whole sublanes."""
        return -(-self.B // SUBLANES) * SUBLANES

    @property
    def lanes(self) -> int:
        """A head's width in whole lanes."""
        return -(-self.width // LANES) * LANES


class Tiles(NamedTuple):
    """Rows, heads and steps that a cell of the grid works on."""

    rows: int
    heads: int
    steps: int

    @property
    def steps_at_once(self) -> int:
        """Of the product that computes recurrent shares again: some 256 rows, for its code is unrolled."""
        return min(self.steps, 1 << (max(1, 256 // self.rows).bit_length() - 1))


class Plan(NamedTuple):
    """Both kernels' tiles, and the VMEM that they may use."""

    sizes: Sizes
    forward: Tiles
    backward: Tiles
    budget: int
    interpret: bool

    @property
    def vmem(self) -> int:
        """Bytes that the larger kernel needs."""
        return max(vmem_bytes(self.sizes, self.forward, False), vmem_bytes(self.sizes, self.backward, True))

    @property
    def bytes(self) -> int:
        """That forward and backward set aside beside VMEM.

        Of all steps gates, states and outputs, the gradients of gates and outputs, and both operands of the product
        that is the gradient of R, in bfloat16.
        """
        s = self.sizes
        values = 2 * s.G + s.fields + 2 + (0 if s.same else s.K)
        return s.T * s.rows * s.heads * s.lanes * (values * s.state_bytes + 2 * (1 + s.K))

    def grid(self, tiles: Tiles) -> tuple[int, int, int]:
        """Batch tiles, groups of heads, blocks of time."""
        return self.sizes.rows // tiles.rows, self.sizes.heads // tiles.heads, -(-self.sizes.T // tiles.steps)


def vmem_bytes(sizes: Sizes, tiles: Tiles, backward: bool) -> int:
    """VMEM of one kernel: R once, everything else twice because the next block is fetched while one is worked on."""
    s, lane = sizes, tiles.heads * sizes.lanes
    block = tiles.steps * tiles.rows * lane * s.state_bytes  # a feature of each step
    row = tiles.rows * lane * s.state_bytes
    R = tiles.heads * s.lanes * s.K * s.lanes * s.product_bytes
    flags = tiles.steps * tiles.rows * LANES * 4 * s.flags
    given = (2 * s.fields + s.scale) * row + s.params * SUBLANES * lane * s.state_bytes + flags
    if not backward:
        step = s.K + s.G + 2 * s.fields  # values of one step
        return R + 2 * (given + (s.G + 1 + s.fields) * block) + step * row
    recomputed = s.K * block + (s.K + 1) * tiles.steps_at_once * row  # the shares; one product with its operand
    streamed = (2 * s.G + 1 + s.fields + (0 if s.same else s.K)) * block
    return R + 2 * (given + streamed + s.params * row) + recomputed + 2 * (s.K + s.G + 2 * s.fields) * row


def tiles_within(sizes: Sizes, budget: int, backward: bool, cores: int = 1) -> Tiles | None:
    """The largest tiles whose kernel fits: all heads and rows at once if they do, in long blocks of time.

    cores: TensorCores that share the grid; where the sizes allow it each gets its part of the rows or heads.
    """
    heads = [n for n in range(sizes.heads, 0, -1) if sizes.heads % n == 0]
    rows = [n for n in range(min(sizes.rows, LARGEST_TILE), 0, -SUBLANES) if sizes.rows % n == 0 and n % SUBLANES == 0]
    longest = min(LONGEST_BLOCK, 1 << (sizes.T - 1).bit_length())
    steps = [longest >> n for n in range(longest.bit_length()) if longest >> n >= min(SHORTEST_BLOCK, longest)]
    fitting = [
        tiles
        for tiles in (Tiles(r, n, t) for n in heads for r in rows for t in steps)
        if vmem_bytes(sizes, tiles, backward) <= budget
    ]
    shared = [t for t in fitting if (sizes.rows // t.rows) * (sizes.heads // t.heads) % cores == 0]
    return (shared or fitting or [None])[0]


def plan(sizes: Sizes, budget: int, cores: int = 1, interpret: bool = False) -> Plan | str:
    """Tiles for both kernels, or why there are none."""
    tiles = [tiles_within(sizes, budget, backward, cores) for backward in (False, True)]
    if None not in tiles:
        return Plan(sizes, *tiles, budget, interpret)
    least = Tiles(SUBLANES, 1, min(SHORTEST_BLOCK, 1 << (sizes.T - 1).bit_length()))
    needed = max(vmem_bytes(sizes, least, backward) for backward in (False, True))
    return (
        f"{sizes.K} recurrent gates of {sizes.heads} heads of {sizes.width} features need {needed} bytes of VMEM at "
        f"least; {budget} may be used"
    )


def vmem_budget(capacity: int) -> int:
    """What the kernels may use of a core's VMEM; the rest is the compiler's."""
    return capacity - capacity // 8


def merged_heads(N: int, width: int, lanes: int) -> int:
    """How many narrow heads are one dense block: as many as fit into a block of so many lanes."""
    return max(n for n in range(1, N + 1) if N % n == 0 and (n == 1 or n * width <= lanes))


def plan_for(
    spec: Spec,
    xs: Array,
    weights: Weights,
    state: Any,
    given: Given,
    scale: Array | None,
    *,
    vmem: int,
    cores: int = 1,
    interpret: bool = False,
) -> Plan | str:
    """The TPU kernels' plan, from shapes alone, or why these arguments have none."""
    sizes = sizes_for(spec, xs, weights, state, given, scale, LANES, interpret)
    return sizes if isinstance(sizes, str) else plan(sizes, vmem_budget(vmem), cores, interpret)


def sizes_for(
    spec: Spec,
    xs: Array,
    weights: Weights,
    state: Any,
    given: Given,
    scale: Array | None,
    lanes: int,
    interpret: bool = False,
) -> Sizes | str:
    """The sizes with heads merged up to so many lanes, or why no kernel serves these arguments."""
    name = getattr(spec.rule, "__name__", type(spec.rule).__name__)
    if not isinstance(spec.maps, Dense):
        return f"the linear maps of {name} are {type(spec.maps).__name__}, and the kernel has Dense ones only"
    if weights.S is not None:
        return f"{name} has a second product in a step (`inner`), and the kernel has one"
    if not interpret and (state.h.dtype != jnp.float32 or spec.dtype not in (jnp.float32, jnp.bfloat16)):
        return f"the kernel is for float32 and bfloat16 products and a float32 state, not {spec.dtype}, {state.h.dtype}"
    if given.noise:
        return f"{name} draws noise at each step, which the kernel does not read"
    N, E, K, F = weights.R.shape
    leaves, params = jax.tree.leaves(state), jax.tree.leaves(weights.params)
    if E != F or any(a.shape[1:] != (N * F,) for a in leaves) or any(a.shape != (1, N * F) for a in params):
        return f"{name} has a state or parameters that are not one number a feature"
    G = xs.shape[2] if weights.W is None else weights.W.shape[1]
    same = equal_gradients(spec, G, K, state, weights.params)
    if same is None:
        return f"{name} is not elementwise in the features"
    merged = merged_heads(N, F, lanes)
    return Sizes(
        *(*xs.shape[:2], N // merged, merged * F, G, K, len(leaves), len(params)),
        *(given.mask is not None or given.reset is not None, scale is not None, same),
        *(spec.dtype.itemsize, state.h.dtype.itemsize),
    )


def equal_gradients(spec: Spec, G: int, K: int, state: Any, params: Any) -> bool | None:
    """Whether a rule only adds both shares of its gates, read off its gradient's trace; None if it mixes features."""
    gate = jax.ShapeDtypeStruct((5, 7), state.h.dtype)
    state, params = jax.tree.map(lambda a: gate, (state, params))

    def gradient(x, r, state, params):
        primals, pull = jax.vjp(lambda *args: spec.rule(*args), x, r, state, params)
        return pull(primals)[:2]

    trace = jax.make_jaxpr(gradient)((gate,) * G, (gate,) * K, state, params).jaxpr
    if not elementwise(trace, gate.shape):
        return None
    return G == K and all(a is b for a, b in zip(trace.outvars[:G], trace.outvars[G:]))


def elementwise(trace: Any, shape: tuple[int, ...]) -> bool:
    """Whether all values are scalars or of the one shape, and nothing moves along an axis."""
    for equation in trace.eqns:
        if equation.primitive.name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "rev", "sort"):
            return False
        if any(getattr(v.aval, "shape", ()) not in ((), shape) for v in equation.outvars):
            return False
        inner = (getattr(p, "jaxpr", p) for p in equation.params.values())
        if not all(elementwise(p, shape) for p in inner if hasattr(p, "eqns")):
            return False
    return True
