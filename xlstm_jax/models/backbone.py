"""Stacks of blocks by name: bare cells, residual blocks around any cell, xLSTM[a:b], and a causal Transformer.

"lstm"          cells one on another, as in torch's nn.LSTM (any name of `cells.CELLS` but projected and convolutional)
"lstm_block"    pre-norm residual block whose mixer is the cell, then a gated feed-forward part:
                the xLSTM paper's "LSTM (Block)" (the same names + "_block")
"xlstm[a:b]"    a mLSTM blocks for b sLSTM blocks, repeated to num_layers (arXiv:2405.04517, section 2.4)
"transformer"   pre-norm attention with rotary positions and SwiGLU, Llama's design (arXiv:2302.13971)
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .. import cells
from ..attention import Attention
from ..blocks import Block, MLSTMLayer, SLSTMLayer
from ..layers import GatedFeedForward, round_up
from ..names import unknown

exact_gelu = partial(jax.nn.gelu, approximate=False)  # the published feed-forward part uses erf
BARE = [name for name in cells.CELLS if name not in ("projected_lstm", "conv_lstm", "conv_gru")]  # one width in and out
BACKBONES = [
    *BARE,
    *(f"{name}_block" for name in BARE),
    "xlstm[1:0]",
    "xlstm[0:1]",
    "xlstm[1:1]",
    "transformer",
]


def backbone(
    name: str,
    dim: int,
    num_layers: int,
    *,
    in_features: int | None = None,
    dropout: float = 0.0,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
    **options,
) -> cells.Stack:
    """The stack `name` of width `dim`; options go to its cells or mixers.

    In xLSTM[a:b] `slstm_conv_width` and `recurrent_init` go to the sLSTM blocks alone.

    `in_features`: width of the inputs where it is not `dim`, for bare cells only (there is no residual connection).
    """
    ratio = re.fullmatch(r"xlstm\[(\d+):(\d+)\]", name)
    if name not in BACKBONES and not ratio:
        raise ValueError(unknown("backbone", name, BACKBONES) + " (xlstm[a:b] for any a and b)")
    in_features = in_features or dim
    if in_features != dim and name not in BARE:
        raise ValueError(f"{name} needs inputs of its own width {dim}, not {in_features}; only bare cells take others")
    if dim < 1 or num_layers < 1:
        raise ValueError(f"dim and num_layers must be at least 1, not {dim} and {num_layers}")
    shared = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def norm(epsilon=1e-5):
        return nnx.LayerNorm(dim, epsilon=epsilon, use_bias=False, **shared)

    def gated(factor, activation):
        return GatedFeedForward(dim, round_up(factor * dim), activation=activation, num_blocks=num_layers, **shared)

    if ratio:
        group = ("mlstm",) * int(ratio[1]) + ("slstm",) * int(ratio[2])
        if not group:
            raise ValueError(f"{name} has no blocks")
        if num_layers % len(group):
            raise ValueError(f"num_layers={num_layers} must be a multiple of the {len(group)} blocks of {name}")
        pattern = group * (num_layers // len(group))
        slstm_options = {name: options.pop(name) for name in ("slstm_conv_width", "recurrent_init") if name in options}
        if slstm_options and "slstm" not in group:
            raise ValueError(f"{' and '.join(slstm_options)}: for sLSTM blocks, of which {name} has none")
        slstm_options = {name.removeprefix("slstm_"): value for name, value in slstm_options.items()}

        def make(index):
            if pattern[index] == "mlstm":
                mixer = MLSTMLayer(dim, num_blocks=num_layers, **options, **shared)
                return Block(mixer, norm=norm(), dropout=dropout)
            mixer = SLSTMLayer(dim, block=index, num_blocks=num_layers, **options, **slstm_options, **shared)
            return Block(mixer, norm=norm(), ffn=gated(1.3, exact_gelu), ffn_norm=norm(), dropout=dropout)

    elif name == "transformer":
        pattern = ("transformer",) * num_layers

        def make(index):
            mixer = Attention(dim, num_blocks=num_layers, **options, **shared)
            rms = [nnx.RMSNorm(dim, epsilon=1e-6, **shared) for _ in range(2)]
            return Block(mixer, norm=rms[0], ffn=gated(8 / 3, jax.nn.silu), ffn_norm=rms[1], dropout=dropout)

    else:
        kind = name.removesuffix("_block")
        in_block = name != kind
        pattern = ("first" if in_features != dim else name, *(name,) * (num_layers - 1))

        def make(index):
            mixer = cells.CELLS[kind](dim if index else in_features, dim, **options, **shared)
            if not in_block:
                return Block(mixer, residual=False, dropout=dropout)
            return Block(mixer, norm=norm(), ffn=gated(1.3, exact_gelu), ffn_norm=norm(), dropout=dropout)

    return cells.Stack([make(n) for n in range(num_layers)], pattern=pattern)
