"""Stacks of blocks by name: bare cells, residual blocks around any cell, xLSTM[a:b], and a causal Transformer.

"lstm"          cells one on another, as in torch's nn.LSTM (any name of `cells.CELLS` but projected and convolutional)
"lstm_block"    pre-norm residual block whose mixer is the cell, then a gated feed-forward part:
                the xLSTM paper's "LSTM (Block)" (the same names + "_block")
"xlstm[a:b]"    a mLSTM blocks for b sLSTM blocks, repeated to num_layers (arXiv:2405.04517, section 2.4)
"xlstm"         the same with sLSTM blocks at the places `slstm_at`, counted from 0, and mLSTM blocks elsewhere
"xlstm_large"   xLSTM 7B's blocks: mLSTM then SwiGLU, RMS norms (arXiv:2503.13427, section 2.1)
"transformer"   pre-norm attention with rotary positions and SwiGLU, Llama's design (arXiv:2302.13971)
"""

import re
from collections.abc import Sequence
from itertools import groupby

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .. import cells
from ..attention import Attention
from ..blocks import Block, MLSTMLayer, SLSTMLayer
from ..blocks_large import MLSTMLargeLayer
from ..cells.wrappers import smallest_period
from ..layers import GatedFeedForward, Norm, round_up
from ..names import unknown

BARE = [name for name in cells.CELLS if name not in ("projected_lstm", "conv_lstm", "conv_gru")]  # one width in and out
BACKBONES = [
    *BARE,
    *(f"{name}_block" for name in BARE),
    "xlstm[1:0]",
    "xlstm[0:1]",
    "xlstm[1:1]",
    "xlstm",
    "xlstm_large",
    "transformer",
]
# Options of one kind of block alone, beside those with the prefix "mlstm_" or "slstm_"
OWN = {
    "mlstm": ("proj_factor", "inner_width", "qkv_block", "use_bias"),
    "slstm": ("recurrent_init", "ffn_width", "ffn_activation", "ffn_bias"),
}


def backbone(
    name: str,
    dim: int,
    num_layers: int,
    *,
    in_features: int | None = None,
    inner_dim: int | None = None,
    dropout: float = 0.0,
    layer_remat: str = "none",
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
    **options,
) -> cells.Stack:
    """The stack `name` of width `dim`; options go to its cells or mixers; `layer_remat` is the stack's `remat`.

    In xLSTM[a:b] and "xlstm" `proj_factor`, `inner_width`, `qkv_block` and `use_bias` go to the mLSTM blocks alone,
    `recurrent_init`, `ffn_width` (0: no feed-forward part), `ffn_activation` and `ffn_bias` to the sLSTM blocks, and so
    does what has the prefix "mlstm_" or "slstm_": `slstm_conv_width=0`. "xlstm_large" has `ffn_width` and `norm_eps`.

    `in_features`: width of the inputs where it is not `dim`; `inner_dim`: of all layers but the last. Both are for bare
    cells only (there is no residual connection). AWD-LSTM's 400-1150-1150-400 has dim=400 and inner_dim=1150.
    """
    ratio = re.fullmatch(r"xlstm\[(\d+):(\d+)\]", name)
    if name not in BACKBONES and not ratio:
        raise ValueError(unknown("backbone", name, BACKBONES) + " (xlstm[a:b] for any a and b)")
    in_features = in_features or dim
    if in_features != dim and name not in BARE:
        raise ValueError(f"{name} needs inputs of its own width {dim}, not {in_features}; only bare cells take others")
    if inner_dim is not None and name not in BARE:
        raise ValueError(f"inner_dim={inner_dim} is for bare cells; all blocks of {name} have its own width {dim}")
    if inner_dim is not None and inner_dim < 1:
        raise ValueError(f"inner_dim must be at least 1, not {inner_dim}")
    if dim < 1 or num_layers < 1:
        raise ValueError(f"dim and num_layers must be at least 1, not {dim} and {num_layers}")
    shared = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    norms = dict(dtype=dtype, param_dtype=param_dtype)

    def feed_forward(hidden, activation, use_bias=False):
        width = dict(activation=activation, num_blocks=num_layers, use_bias=use_bias)
        return GatedFeedForward(dim, hidden, **width, **shared)

    if ratio or name == "xlstm":
        pattern = published_pattern(name, ratio, num_layers, options.pop("slstm_at", None))
        shared_options, own = split_options(options)
        for kind, given in own.items():
            if given and ratio and kind not in pattern:
                raise ValueError(f"{' and '.join(given)}: for {kind[0]}LSTM blocks, of which {name} has none")
        hidden, activation = own["slstm"].pop("ffn_width", None), own["slstm"].pop("ffn_activation", "gelu")
        hidden, bias = round_up(1.3 * dim) if hidden is None else hidden, own["slstm"].pop("ffn_bias", False)
        own = {
            kind: shared_options | {name.removeprefix(f"{kind}_"): value for name, value in given.items()} | shared
            for kind, given in own.items()
        }

        def norm():
            return Norm(dim, residual=True, **norms)

        def make(index):
            if pattern[index] == "mlstm":
                mixer = MLSTMLayer(dim, num_blocks=num_layers, **own["mlstm"])
                return Block(mixer, norm=norm(), dropout=dropout)
            mixer = SLSTMLayer(dim, block=index, num_blocks=num_layers, **own["slstm"])
            if not hidden:
                return Block(mixer, norm=norm(), dropout=dropout)
            ffn = feed_forward(hidden, activation, bias)
            return Block(mixer, norm=norm(), ffn=ffn, ffn_norm=norm(), dropout=dropout)

    elif name == "xlstm_large":
        pattern = ("xlstm_large",) * num_layers
        hidden = options.pop("ffn_width", None)
        hidden = round_up(int(2.6667 * dim)) if hidden is None else hidden
        bias, epsilon = options.get("use_bias", False), options.get("norm_eps", 1e-6)

        def make(index):
            mixer = MLSTMLargeLayer(dim, num_blocks=num_layers, **options, **shared)
            rms = [Norm(dim, mean=False, use_bias=bias, epsilon=epsilon, **norms) for _ in range(2)]
            ffn = feed_forward(hidden, "swish", bias)
            return Block(mixer, norm=rms[0], ffn=ffn, ffn_norm=rms[1], dropout=dropout)

    elif name == "transformer":
        pattern = ("transformer",) * num_layers

        def make(index):
            mixer = Attention(dim, num_blocks=num_layers, **options, **shared)
            rms = [Norm(dim, mean=False, epsilon=1e-6, **norms) for _ in range(2)]
            ffn = feed_forward(round_up(8 / 3 * dim), "swish")
            return Block(mixer, norm=rms[0], ffn=ffn, ffn_norm=rms[1], dropout=dropout)

    else:
        kind = name.removesuffix("_block")
        in_block = name != kind
        widths = (in_features, *(inner_dim or dim,) * (num_layers - 1), dim)
        pattern = tuple(f"{width} to {following}" for width, following in zip(widths, widths[1:]))

        def make(index):
            mixer = cells.CELLS[kind](*widths[index : index + 2], **options, **shared)
            if not in_block:
                return Block(mixer, residual=False, dropout=dropout)
            ffn = feed_forward(round_up(1.3 * dim), "gelu")
            return Block(mixer, norm=Norm(dim, **norms), ffn=ffn, ffn_norm=Norm(dim, **norms), dropout=dropout)

    blocks = [make(n) for n in range(num_layers)]
    if name == "xlstm":
        return in_runs(blocks, pattern, layer_remat)
    return cells.Stack(blocks, pattern=pattern, remat=layer_remat)


def split_options(options: dict) -> tuple[dict, dict[str, dict]]:
    """Options of both kinds of block, and those of one kind, by kind."""
    own = {kind: {} for kind in OWN}
    both = {}
    for name, value in options.items():
        kind = next((kind for kind, names in OWN.items() if name in names or name.startswith(f"{kind}_")), None)
        (own[kind] if kind else both)[name] = value
    return both, own


def published_pattern(name: str, ratio: re.Match | None, num_layers: int, slstm_at: Sequence[int] | None) -> tuple:
    """ "mlstm" or "slstm" for each block, by the ratio a:b or by the places `slstm_at`."""
    if ratio is None:
        places = tuple(slstm_at or ())
        wrong = [place for place in places if not (isinstance(place, int) and 0 <= place < num_layers)]
        if wrong or len(set(places)) != len(places):
            raise ValueError(f"slstm_at={places} must be different places from 0 to {num_layers - 1}")
        return tuple("slstm" if n in places else "mlstm" for n in range(num_layers))
    if slstm_at is not None:
        raise ValueError(f"slstm_at is for backbone='xlstm'; {name} says itself where sLSTM blocks are")
    group = ("mlstm",) * int(ratio[1]) + ("slstm",) * int(ratio[2])
    if not group:
        raise ValueError(f"{name} has no blocks")
    if num_layers % len(group):
        raise ValueError(f"num_layers={num_layers} must be a multiple of the {len(group)} blocks of {name}")
    return group * (num_layers // len(group))


def in_runs(blocks: Sequence[cells.base.Cell], pattern: Sequence[str], remat: str = "none") -> cells.Stack:
    """A stack that is compiled once a group where the whole repeats one, else once a run of equal kinds."""
    if smallest_period(tuple(pattern)) < len(blocks):
        return cells.Stack(blocks, pattern=pattern, remat=remat)
    blocks, layers = iter(blocks), []
    for kind, run in groupby(pattern):
        run = [next(blocks) for _ in run]
        layers.append(run[0] if len(run) == 1 else cells.Stack(run, pattern=[kind] * len(run), remat=remat))
    return cells.Stack(layers, remat=remat)
