"""Precision policies by name: what a model computes in and what it keeps.

float32    everything
bfloat16   products, activations and the residual stream in bfloat16

Whatever the policy, parameters, optimiser state, recurrent state, norms' statistics, exponential gates, the softmax of
attention, logits and loss are float32: the layers see to that themselves.
"""

from xlstm_jax.names import unknown

POLICIES = {
    "float32": {"dtype": "float32", "param_dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16", "param_dtype": "float32"},
}


def dtypes(precision: str) -> dict[str, str]:
    """The arguments dtype and param_dtype of a model under the policy of this name."""
    if precision not in POLICIES:
        raise ValueError(unknown("precision", precision, POLICIES))
    return POLICIES[precision]
