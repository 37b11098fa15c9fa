"""Model FLOPs by formula: what a step must compute, whatever chunks, forms and recomputation make of it.

Forward, a token: 2 for every weight that multiplies it (matrices, convolutions, R; an embedding only where it is the
head too), and for each mLSTM head 4 K V + 4 K, the write and the read of its memory step by step (arXiv:2503.14376's
recurrent view). Training is three times that. Gates, norms and softmax are left out. A compiler's count is of no use
here: it counts the body of a loop once.
"""

import math

import jax
from flax import nnx

from xlstm_jax.kernels.mlstm import MLSTMState
from xlstm_jax.optim import parameter_name


def forward_flops(model: nnx.Module) -> float:
    """Of one token through an LM (abstract or not)."""
    named = jax.tree_util.tree_leaves_with_path(nnx.split(model)[1])
    tied = getattr(model, "tie_weights", False)
    weights = sum(
        math.prod(leaf.shape)
        for path, leaf in named
        if multiplies(parameter_name(path)) or (tied and parameter_name(path).startswith("embedding"))
    )
    state = nnx.eval_shape(lambda: model.initial_state(1))
    memories = jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, MLSTMState))
    memories = [s for s in memories if isinstance(s, MLSTMState)]
    return 2 * weights + sum(4 * math.prod(s.C.shape) + 4 * math.prod(s.n.shape) for s in memories)


def multiplies(name: str) -> bool:
    """Whether a parameter of this name multiplies every token: kernels, and a cell's W, R and S."""
    return name.rpartition(".")[2] in ("kernel", "W", "R", "S")
