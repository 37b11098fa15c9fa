"""The configurations of published models and the arguments of ours, both ways."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from ..blocks import MLSTMLayer, SLSTMLayer
from ..blocks_large import MLSTMLargeLayer
from ..cells.base import Cell
from ..layers import round_up
from ..models import LM, BlockStack
from .files import Weights
from .tensors import Family, blocks_of, family_of


class Fields:
    """A part of a configuration; a field that is missing, or of another kind than a number, is named."""

    def __init__(self, source: str, values: Mapping[str, Any], where: str = ""):
        self.source, self.values, self.where = source, values, where

    def get(self, name: str, default: Any = None, *others: str) -> Any:
        """The field, or the first of other names for it, or the default."""
        return next((self.values[key] for key in (name, *others) if self.values.get(key) is not None), default)

    def number(self, name: str, default: Any = None, *others: str, kind: type = int) -> Any:
        """The same, as an int or a float."""
        value = self.get(name, default, *others)
        if value is None:
            raise ValueError(f"{self.source} has no {self.where}{name}")
        try:
            number = kind(value)
        except (TypeError, ValueError):
            number = None
        if isinstance(value, bool) or number is None or (kind is int and number != float(value)):
            raise ValueError(f"{self.source}: {self.where}{name} is {value!r}, which is no {kind.__name__}")
        return number

    def part(self, name: str) -> "Fields | None":
        """The fields under a name, or None where it is null or missing."""
        values = self.values.get(name)
        if values is not None and not isinstance(values, Mapping):
            raise ValueError(f"{self.source}: {self.where}{name} is {values!r}, not named fields")
        return None if values is None else Fields(self.source, values, f"{self.where}{name}.")


def understand(weights: Weights) -> tuple[Family, dict[str, Any]]:
    """What the weights are of, and the arguments of `LM`, or of `BlockStack`, that their configuration means."""
    family = family_of(weights.shapes, weights.path)
    fields = Fields(str(weights.config_file), weights.config)
    if family.kind in ("lm", "stack"):
        return family, xlstm_arguments(fields, family)
    return family, large_arguments(fields, f"{family.names['norm']}.bias" in weights.shapes)


def large_arguments(fields: Fields, norm_bias: bool) -> dict[str, Any]:
    """Of xLSTMLarge and of Hugging Face's xLSTM."""
    if fields.get("model_type", "xlstm") != "xlstm":
        raise ValueError(f"{fields.source} is of model_type {fields.get('model_type')!r}; 'xlstm' is wanted")
    dim = fields.number("hidden_size", None, "embedding_dim")
    width = fields.number("ffn_proj_factor", 2.6667, kind=float) * dim
    caps = {}  # none where the field is null
    for name, theirs, usual in (("gate_cap", "gate_soft_cap", 15.0), ("logit_cap", "output_logit_soft_cap", 30.0)):
        caps[name] = fields.number(theirs, 0.0 if theirs in fields.values else usual, kind=float) or None
    return dict(
        vocab_size=fields.number("vocab_size"),
        backbone="xlstm_large",
        dim=dim,
        num_layers=fields.number("num_hidden_layers", None, "num_blocks"),
        num_heads=fields.number("num_heads"),
        qk_factor=fields.number("qk_dim_factor", 0.5, kind=float),
        v_factor=fields.number("v_dim_factor", 1.0, kind=float),
        ffn_width=round_up(int(width), fields.number("ffn_round_up_to_multiple_of", 64)),
        use_bias=bool(fields.get("use_bias", False)),
        final_norm=("rms_bias" if norm_bias else "rms") if fields.get("add_out_norm", True) else "none",
        norm_eps=fields.number("norm_eps", 1e-6, kind=float),
        eps=fields.number("eps", 1e-6, kind=float),
        chunk_size=fields.number("chunk_size", 64),
        tie_weights=bool(fields.get("tie_word_embeddings", False)),
        **caps,
    )


def xlstm_arguments(fields: Fields, family: Family) -> dict[str, Any]:
    """Of NX-AI's xLSTMLMModel and xLSTMBlockStack."""
    dim, num_layers = fields.number("embedding_dim"), fields.number("num_blocks")
    m_block, s_block = fields.part("mlstm_block"), fields.part("slstm_block")
    places = fields.get("slstm_at", [])
    if m_block is None and s_block is None:
        raise ValueError(f"{fields.source} has neither mlstm_block nor slstm_block")
    if places == "all" or m_block is None:
        places = range(num_layers)
    elif not isinstance(places, list):
        raise ValueError(f"{fields.source}: slstm_at is {places!r}; a list of places, or 'all', is needed")
    arguments = dict(
        backbone="xlstm",
        dim=dim,
        num_layers=num_layers,
        slstm_at=tuple(places) if s_block is not None else (),
        final_norm="layer" if fields.get("add_post_blocks_norm", True) else "none",
    )
    if m_block is not None:
        m = m_block.part("mlstm") or Fields(m_block.source, {})
        arguments |= dict(
            mlstm_num_heads=m.number("num_heads", 4),
            mlstm_conv_width=m.number("conv1d_kernel_size", 4),
            qkv_block=m.number("qkv_proj_blocksize", 4),
            inner_width=inner_width(m, dim, 2.0),
            use_bias=bool(fields.get("bias", m.get("bias", False))),
        )
    if s_block is not None:
        s, ffn = s_block.part("slstm") or Fields(s_block.source, {}), s_block.part("feedforward")
        if s.get("function", "slstm") != "slstm":
            raise ValueError(f"{s.source}: {s.where}function is {s.get('function')!r}; only 'slstm' is known")
        if ffn is None and "feedforward" not in s_block.values:
            ffn = Fields(s_block.source, {})
        arguments |= dict(
            slstm_num_heads=s.number("num_heads", 4),
            slstm_conv_width=s.number("conv1d_kernel_size", 4),
            ffn_width=0 if ffn is None else inner_width(ffn, dim, 1.3),
        )
        if ffn is not None:
            arguments |= dict(ffn_activation=ffn.get("act_fn", "gelu"), ffn_bias=bool(ffn.get("bias", False)))
    if family.kind == "lm":
        arguments |= dict(vocab_size=fields.number("vocab_size"), tie_weights=bool(fields.get("tie_weights", False)))
    return arguments


def inner_width(fields: Fields, dim: int, factor: float) -> int:
    """proj_factor times dim, rounded to a multiple, up unless it says otherwise."""
    multiple = fields.number("round_proj_up_to_multiple_of", 64)
    count = fields.number("proj_factor", factor, kind=float) * dim / multiple
    return multiple * (math.ceil(count) if fields.get("round_proj_up_dim_up", True) else math.floor(count))


# What Hugging Face's configuration has besides
HF = dict(
    architectures=["xLSTMForCausalLM"],
    model_type="xlstm",
    bos_token_id=0,
    pad_token_id=1,
    eos_token_id=2,
    max_inference_chunksize=16384,
    use_cache=True,
)


def describe(model: Cell, format: str, layout: str | None) -> tuple[Family, dict[str, Any], str]:
    """The family, the configuration and its file's name that a model is saved with."""
    if not isinstance(model, (LM, BlockStack)):
        raise ValueError(f"an LM or a BlockStack can be saved, not a {type(model).__name__}")
    mixers = [block.mixer for _, _, block in blocks_of(model.backbone)]
    other = next((m for m in mixers if not isinstance(m, (MLSTMLargeLayer, MLSTMLayer, SLSTMLayer))), None)
    if other is not None:
        raise ValueError(f"only xLSTM models as published can be saved so, not blocks of {type(other).__name__}")
    large = isinstance(mixers[0], MLSTMLargeLayer)
    check_published(model, large)
    valid = ("single", "fused") if large else ("vanilla", "cuda")
    if layout not in (None, *valid):
        raise ValueError(f"layout={layout!r} is not one of this model's, which are {' and '.join(map(repr, valid))}")
    layout = layout or valid[0]
    if not large:
        if format == "hf":
            raise ValueError("Hugging Face has xLSTM 7B's blocks only; this model can be saved by format='nxai'")
        return Family("lm" if isinstance(model, LM) else "stack", layout), xlstm_config(model, layout), "config.json"
    config = large_config(model, layout)
    if format == "nxai":
        if model.tie_weights:
            raise ValueError("NX-AI's xLSTMLarge has no tied weights, as this model has; format='hf' can hold them")
        return Family("large", layout), config, "config.yaml"
    if model.norm is not None and model.norm.bias is not None:
        logging.getLogger(__name__).warning(
            "Hugging Face's xLSTM has no bias in its last norm and will ignore this one"
        )
    names = dict(hidden_size=config["embedding_dim"], num_hidden_layers=config["num_blocks"])
    return Family("hf", layout), config | names | HF | dict(tie_word_embeddings=model.tie_weights), "config.json"


def check_published(model: Cell, large: bool) -> None:
    """Nothing that the published models lack, and that would be lost."""
    if large and not isinstance(model, LM):
        raise ValueError("xLSTM 7B's blocks are saved as a language model, not as a BlockStack")
    if not large and isinstance(model, LM) and model.logit_cap:
        raise ValueError(f"NX-AI's xLSTMLMModel has no cap of the logits, as this model has ({model.logit_cap})")
    norm = model.norm
    if norm is not None and (norm.mean == large or (not large and norm.epsilon != 1e-5)):
        wanted = "an RMS norm" if large else "a layer norm with epsilon 1e-5"
        raise ValueError(f"the published model ends with {wanted}, unlike this one")


def large_config(model: LM, layout: str) -> dict[str, Any]:
    """NX-AI's xLSTMLargeConfig."""
    blocks = [block for _, _, block in blocks_of(model.backbone)]
    mixer, dim = blocks[0].mixer, blocks[0].mixer.features
    if mixer.input_gate != "exp":
        raise ValueError(f"published models have an exponential input gate, not {mixer.input_gate!r} as this one")
    factor, multiple = 2.6667, 64
    if round_up(int(factor * dim), multiple) != blocks[0].ffn.hidden:
        factor, multiple = factor_of(blocks[0].ffn.hidden, dim, factor), 1
    return dict(
        embedding_dim=dim,
        num_heads=mixer.num_heads,
        num_blocks=len(blocks),
        vocab_size=model.vocab_size,
        use_bias=mixer.out.bias is not None,
        norm_eps=float(mixer.norm.epsilon),
        norm_reduction_force_float32=True,
        add_out_norm=model.norm is not None,
        qk_dim_factor=factor_of(mixer.qk_features, dim, 0.5),
        v_dim_factor=factor_of(mixer.v_features, dim, 1.0),
        chunkwise_kernel="chunkwise--native_autograd",
        sequence_kernel="native_sequence__native",
        step_kernel="native",
        mode="inference",
        chunk_size=mixer.chunk_size or 64,
        return_last_states=True,
        autocast_kernel_dtype="float32",
        eps=float(mixer.eps),
        inference_state_dtype="float32",
        ffn_proj_factor=factor,
        ffn_round_up_to_multiple_of=multiple,
        gate_soft_cap=mixer.gate_cap,
        output_logit_soft_cap=model.logit_cap,
        weight_mode=layout,
    )


def xlstm_config(model: Cell, layout: str) -> dict[str, Any]:
    """NX-AI's xLSTMLMModelConfig or xLSTMBlockStackConfig; its context_length, which nothing here limits, is 2048."""
    blocks = [block for _, _, block in blocks_of(model.backbone)]
    dim = blocks[0].norm.scale.shape[-1]
    m = next((block.mixer for block in blocks if isinstance(block.mixer, MLSTMLayer)), None)
    s = next((block for block in blocks if isinstance(block.mixer, SLSTMLayer)), None)
    bias = m is not None and m.up.bias is not None
    m_block = s_block = None
    if m is not None:
        m_block = dict(
            num_heads=m.num_heads,
            conv1d_kernel_size=0 if m.conv is None else m.conv.width,
            qkv_proj_blocksize=m.q.kernel.shape[-1],
            **width_fields(m.inner, dim, 2.0),
        )
    if s is not None:
        s_block = dict(
            slstm=dict(
                backend=layout,
                num_heads=s.mixer.cell.num_heads,
                conv1d_kernel_size=0 if s.mixer.conv is None else s.mixer.conv.width,
            ),
            feedforward=None,
        )
        if s.ffn is not None:
            s_block["feedforward"] = dict(
                act_fn=s.ffn.activation, bias=s.ffn.up.bias is not None, **width_fields(s.ffn.hidden, dim, 1.3)
            )
    config = dict(
        mlstm_block=None if m is None else dict(mlstm=m_block),
        slstm_block=s_block,
        context_length=2048,
        num_blocks=len(blocks),
        embedding_dim=dim,
        add_post_blocks_norm=model.norm is not None,
        bias=bias,
        dropout=0.0,
        slstm_at=[n for n, block in enumerate(blocks) if isinstance(block.mixer, SLSTMLayer)],
    )
    return (
        config | dict(vocab_size=model.vocab_size, tie_weights=model.tie_weights) if isinstance(model, LM) else config
    )


def width_fields(width: int, dim: int, factor: float) -> dict[str, Any]:
    """The published factor where it gives this width, else one that does."""
    if round_up(factor * dim) == width:
        return dict(proj_factor=factor, round_proj_up_to_multiple_of=64)
    return dict(proj_factor=(width - 0.5) / dim, round_proj_up_to_multiple_of=1)


def factor_of(width: int, dim: int, factor: float) -> float:
    """The published factor where int(factor * dim) is this width, else one that gives it."""
    return factor if int(factor * dim) == width else (width + 0.5) / dim
