"""Which tensors of a published model are which of our parameters, and how their axes lie.

In NX-AI's sLSTM layer the module named fgate feeds the input gate and igate the forget gate; its CUDA and vanilla
backends store the recurrent weights and the bias (of equal shape!) in different orders. Both are followed here.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from ..blocks import Block, MLSTMLayer
from ..blocks_large import MLSTMLargeLayer
from ..cells import Stack
from ..cells.base import Cell

LAYOUTS = ("vanilla", "cuda", "single", "fused")
SHORT, LONG = ("q", "k", "v"), ("query", "key", "value")  # both occur in Hugging Face's folders


class Family(NamedTuple):
    """What a checkpoint is of: kind "lm", "stack", "large" or "hf", a layout of `LAYOUTS`, and its names of q, k, v."""

    kind: str
    layout: str
    qkv: tuple[str, str, str] = SHORT

    @property
    def names(self) -> dict[str, str]:
        """The tensors outside of the blocks, and what the blocks' names begin with."""
        return {
            "lm": dict(
                embedding="token_embedding.weight",
                head="lm_head.weight",
                norm="xlstm_block_stack.post_blocks_norm",
                blocks="xlstm_block_stack.blocks.",
            ),
            "stack": dict(norm="post_blocks_norm", blocks="blocks."),
            "large": dict(
                embedding="embedding.weight", head="lm_head.weight", norm="backbone.out_norm", blocks="backbone.blocks."
            ),
            "hf": dict(
                embedding="backbone.embeddings.weight",
                head="lm_head.weight",
                norm="backbone.out_norm",
                blocks="backbone.blocks.",
            ),
        }[self.kind]


class Rule(NamedTuple):
    """From a tensor to our parameter, and back."""

    ours: Callable[[Any], Any]
    theirs: Callable[[Any], Any]


SAME = Rule(lambda a: a, lambda a: a)
TRANSPOSED = Rule(lambda a: a.T, lambda a: a.T)  # (out, in)
BY_HEAD = Rule(lambda a: a.swapaxes(1, 2), lambda a: a.swapaxes(1, 2))  # (head, out, in)
CONV = Rule(lambda a: a[:, 0].T, lambda a: a.T[:, None])  # (D, 1, width)


def recurrent_rule(layout: str) -> Rule:
    """Ours (head, in, gate, out)."""
    if layout == "cuda":  # (head, in, gate out)
        return Rule(lambda a: a.reshape(*a.shape[:2], 4, -1), lambda a: a.reshape(*a.shape[:2], -1))
    return Rule(  # (head, gate out, in)
        lambda a: a.reshape(a.shape[0], 4, -1, a.shape[2]).transpose(0, 3, 1, 2),
        lambda a: a.transpose(0, 2, 3, 1).reshape(a.shape[0], -1, a.shape[1]),
    )


def bias_rule(layout: str, N: int) -> Rule:
    """Ours (gate, head unit)."""
    if layout == "cuda":  # flat (head, gate, unit)
        return Rule(
            lambda a: a.reshape(N, 4, -1).swapaxes(0, 1).reshape(4, -1),
            lambda a: a.reshape(4, N, -1).swapaxes(0, 1).reshape(-1),
        )
    return Rule(lambda a: a.reshape(4, -1), lambda a: a.reshape(-1))


class Part(NamedTuple):
    """Rows of a tensor: `rows` from `start`, or all (None)."""

    name: str
    start: int = 0
    rows: int | None = None


class Place(NamedTuple):
    """A parameter, or one layer of a stacked one: the tensors' rows that make it, one after another, and the rule."""

    parts: tuple[Part, ...]
    rule: Rule
    layer: int | None = None

    def read(self, weights: Any) -> np.ndarray:
        """Our parameter's value."""
        tensors = [weights.read(*part) for part in self.parts]
        return self.rule.ours(tensors[0] if len(tensors) == 1 else np.concatenate(tensors))

    def write(self, value: np.ndarray, part: Part, out: np.ndarray) -> None:
        """Puts the part that is in `value` where it belongs in the tensor `out`."""
        theirs = self.rule.theirs(value if self.layer is None else value[self.layer])
        if part.rows is None:
            out[...] = theirs
        else:
            before = sum(other.rows for other in self.parts[: self.parts.index(part)])
            out[part.start : part.start + part.rows] = theirs[before : before + part.rows]


class Tensors(NamedTuple):
    """Places by the parameter's path, shapes by the tensor's name.

    vocabulary: the tensors with a row a token; tied: the second name of the only one, where the model ties its weights.
    """

    places: dict[tuple, list[Place]]
    shapes: dict[str, tuple[int, ...]]
    vocabulary: tuple[str, ...]
    tied: str | None


def tensors_of(model: Cell, family: Family) -> Tensors:
    """Every parameter's tensors; the model may be abstract."""
    flat = {path: variable.shape for path, variable in nnx.to_flat_state(nnx.state(model))}
    names, places = family.names, {}
    for path in (path for path in flat if path[0] != "backbone"):
        suffix = {"scale": ".weight", "bias": ".bias"}.get(path[1], "")
        places[path] = [Place((Part(names[path[0]] + suffix),), TRANSPOSED if path[0] == "head" else SAME)]
    for number, (prefix, layer, block) in enumerate(blocks_of(model.backbone)):
        table = block_table(block, family)
        for path in (path for path in flat if path[: len(prefix)] == prefix):
            parts, rule = table[".".join(map(str, path[len(prefix) :]))]
            parts = (parts,) if isinstance(parts, Part) else parts
            parts = tuple(part._replace(name=f"{names['blocks']}{number}.{part.name}") for part in parts)
            places.setdefault(path, []).append(Place(parts, rule, layer))
    outer = [names[part] for part in ("embedding", "head") if any(path[0] == part for path in flat)]
    tied = names["head"] if len(outer) == 1 else None
    return Tensors(places, tensor_shapes(flat, places), tuple(outer), tied)


def assemble(values: Mapping[tuple, np.ndarray], tensors: Tensors, names: list[str]) -> dict[str, np.ndarray]:
    """The named tensors of the parameters `values`, or of gradients of the same shapes."""
    arrays, wanted = {}, set(names)
    for path, places in tensors.places.items():
        for place in places:
            for part in place.parts:
                if part.name in wanted:
                    if part.name not in arrays:
                        arrays[part.name] = np.empty(tensors.shapes[part.name], values[path].dtype)
                    place.write(values[path], part, arrays[part.name])
    if tensors.tied in wanted:
        arrays[tensors.tied] = assemble(values, tensors, list(tensors.vocabulary))[tensors.vocabulary[0]]
    return arrays


def tensor_shapes(flat: Mapping[tuple, tuple[int, ...]], places: Mapping[tuple, list[Place]]) -> dict[str, tuple]:
    """The shape of each tensor, in the order of the model's blocks."""
    shapes = {}
    for path, found in places.items():
        for place in found:
            ours = flat[path] if place.layer is None else flat[path][1:]
            theirs = jax.eval_shape(place.rule.theirs, jax.ShapeDtypeStruct(ours, np.float32)).shape
            for part in place.parts:
                rows = theirs[0] if part.rows is None else max(part.start + part.rows, *shapes.get(part.name, (0,))[:1])
                shapes[part.name] = (rows, *theirs[1:])
    return shapes


def blocks_of(stack: Stack, prefix: tuple = ("backbone",)) -> Iterator[tuple[tuple, int | None, Block]]:
    """(path, place along the leading axis where layers are stacked, block) of every block in its order."""
    for repeat in range(stack.repeats):
        for n, layer in enumerate(stack.layers):
            path = (*prefix, "layers", n)
            if isinstance(layer, Stack):
                yield from blocks_of(layer, path)
            else:
                yield path, (repeat if stack.repeats > 1 else None), layer


def weight_and_bias(ours: str, theirs: str, rule: Rule = TRANSPOSED) -> dict[str, tuple[Part, Rule]]:
    """A linear map."""
    return {f"{ours}.kernel": (Part(f"{theirs}.weight"), rule), f"{ours}.bias": (Part(f"{theirs}.bias"), SAME)}


def norm_entries(ours: str, theirs: str) -> dict[str, tuple[Part, Rule]]:
    """A norm."""
    return {f"{ours}.scale": (Part(f"{theirs}.weight"), SAME), f"{ours}.bias": (Part(f"{theirs}.bias"), SAME)}


def block_table(block: Block, family: Family) -> dict[str, tuple[Any, Rule]]:
    """The tensors and the rule of each parameter that such a block may have."""
    if isinstance(block.mixer, MLSTMLargeLayer):
        return large_table(block, family)
    table = norm_entries("norm", "xlstm_norm") | norm_entries("ffn_norm", "ffn_norm")
    table |= weight_and_bias("mixer.conv", "xlstm.conv1d.conv", CONV)
    if isinstance(block.mixer, MLSTMLayer):
        table |= weight_and_bias("mixer.up", "xlstm.proj_up") | weight_and_bias("mixer.down", "xlstm.proj_down")
        for name in "qkv":
            table |= weight_and_bias(f"mixer.{name}", f"xlstm.{name}_proj", BY_HEAD)
        for name in "if":
            table |= weight_and_bias(f"mixer.{name}", f"xlstm.mlstm_cell.{name}gate")
        table |= norm_entries("mixer.norm", "xlstm.mlstm_cell.outnorm")
        return table | {"mixer.skip": (Part("xlstm.learnable_skip"), SAME)}
    for ours, theirs in zip("ifzo", "fizo"):
        table |= weight_and_bias(f"mixer.{ours}", f"xlstm.{theirs}gate", BY_HEAD)
    table |= norm_entries("mixer.norm", "xlstm.group_norm")
    table |= weight_and_bias("ffn.up", "ffn.proj_up") | weight_and_bias("ffn.down", "ffn.proj_down")
    N = block.mixer.cell.num_heads
    return table | {
        "mixer.cell.R": (Part("xlstm.slstm_cell._recurrent_kernel_"), recurrent_rule(family.layout)),
        "mixer.cell.b": (Part("xlstm.slstm_cell._bias_"), bias_rule(family.layout, N)),
    }


def large_table(block: Block, family: Family) -> dict[str, tuple[Any, Rule]]:
    """xLSTM 7B's block; fused tensors are [q, k, v, o~], [i~, f~] and [gate, up]."""
    table = norm_entries("norm", "norm_mlstm") | norm_entries("ffn_norm", "norm_ffn")
    table |= norm_entries("mixer.norm", "mlstm_layer.multihead_norm")
    table |= weight_and_bias("mixer.out", "mlstm_layer.out_proj") | weight_and_bias("ffn.down", "ffn.proj_down")
    mixer, F = block.mixer, block.ffn.hidden
    groups = {
        "mlstm_layer.qkv_opreact": {
            "mixer.qkv": tuple(zip(family.qkv, (mixer.qk_features, mixer.qk_features, mixer.v_features))),
            "mixer.o": (("ogate_preact", mixer.v_features),),
        },
        "mlstm_layer.ifgate_preact": {f"mixer.{g}": ((f"{g}gate_preact", mixer.num_heads),) for g in "if"},
        "ffn.proj_up_gate_z": {"ffn.up": (("proj_up_gate", F), ("proj_up", F))},
    }
    for fused, members in groups.items():
        start, folder = 0, fused.partition(".")[0]
        for ours, pieces in members.items():
            rows = sum(size for _, size in pieces)
            for suffix, own, rule in (("weight", "kernel", TRANSPOSED), ("bias", "bias", SAME)):
                single = tuple(Part(f"{folder}.{name}.{suffix}", 0, size) for name, size in pieces)
                together = (Part(f"{fused}.{suffix}", start, rows),)
                table[f"{ours}.{own}"] = (together if family.layout == "fused" else single, rule)
            start += rows
    return table


def family_of(shapes: Mapping[str, tuple[int, ...]], path: Any) -> Family:
    """What the tensors' names and shapes say."""
    beginnings = {
        "lm": "xlstm_block_stack.blocks.",
        "hf": "backbone.embeddings.",
        "large": "backbone.blocks.",
        "stack": "blocks.",
    }
    kind = next((kind for kind, start in beginnings.items() if any(name.startswith(start) for name in shapes)), None)
    if kind is None:
        some = ", ".join(sorted(shapes)[:3])
        raise ValueError(
            f"{path} is of an unknown layout: its tensors are called {some}, ...; known are those of NX-AI's "
            "xLSTMLMModel (xlstm_block_stack.blocks.0...), xLSTMBlockStack (blocks.0...) and xLSTMLarge "
            "(backbone.blocks.0...), and of Hugging Face's xLSTMForCausalLM (backbone.embeddings.weight)"
        )
    if kind in ("lm", "stack"):
        kernels = {shape for name, shape in shapes.items() if name.endswith("slstm_cell._recurrent_kernel_")}
        cuda = {len(shape) == 3 and shape[2] == 4 * shape[1] for shape in kernels}
        if len(cuda) > 1:
            raise ValueError(
                f"{path}: some sLSTM blocks have the CUDA layout (head, in, 4 out), others the vanilla one "
                "(head, 4 out, in); which one is meant? Save the model anew by one backend"
            )
        return Family(kind, "cuda" if True in cuda else "vanilla")
    fused = any(name.endswith("mlstm_layer.qkv_opreact.weight") for name in shapes)
    long = any(name.endswith("mlstm_layer.query.weight") for name in shapes)
    return Family(kind, "fused" if fused else "single", LONG if long else SHORT)
