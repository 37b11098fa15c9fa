"""Published xLSTM models from and to folders of safetensors, tensor by tensor, into any sharding.

Read are NX-AI's xLSTMLMModel and xLSTMBlockStack (sLSTM weights in the vanilla or the CUDA layout), NX-AI's xLSTMLarge
and Hugging Face's xLSTMForCausalLM (single or fused weights), each beside its configuration. Dropout is not read.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from flax import nnx
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from ..models import LM, BlockStack
from ..names import unknown
from .files import Weights
from .published import describe, understand
from .tensors import LAYOUTS, Place, Tensors, assemble, tensors_of

FORMATS = ("hf", "nxai")
Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def load_pretrained(
    path: str | Path,
    *,
    sharding: Sharding | None = None,
    param_dtype: DTypeLike | None = None,
    **options: Any,
) -> tuple[LM | BlockStack, dict[str, Any]]:
    """The model in a folder, or in a .safetensors file beside its configuration, and the arguments it is built with.

    sharding: of each parameter by its dotted name and shape; one device's if not given. param_dtype: that of the
    tensors if not given. options: over the configuration's, say dtype=, form= or chunk_size=.
    """
    with Weights(path) as weights:
        family, config = understand(weights)
        config |= options
        kind = LM if "vocab_size" in config else BlockStack
        param_dtype = jnp.dtype(weights.dtype if param_dtype is None else param_dtype)
        model = nnx.eval_shape(lambda: kind(**config, param_dtype=param_dtype, rngs=nnx.Rngs(0)))
        tensors = tensors_of(model, family)
        check_tensors(weights, tensors)
        check_tied(weights, tensors)
        graphdef, state = nnx.split(model)
        flat = dict(nnx.to_flat_state(state))
        for path_in_model, variable in flat.items():
            name = ".".join(map(str, path_in_model))
            shape, where = variable.shape, tensors.places[path_in_model]
            wanted = sharding(name, shape) if sharding else jax.sharding.SingleDeviceSharding(jax.devices()[0])
            array = jax.make_array_from_callback(shape, wanted, reader(weights, where, shape, variable.dtype))
            flat[path_in_model] = variable.replace(array)
    return nnx.merge(graphdef, nnx.from_flat_state(flat)), config


def check_tensors(weights: Weights, tensors: Tensors) -> None:
    """One error that names every missing, unknown and wrongly shaped tensor."""
    found = weights.shapes
    problems = [f"{name} is missing" for name in tensors.shapes if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in tensors.shapes and name != tensors.tied]
    for name, shape in tensors.shapes.items():
        if name in found and found[name] != shape:
            rows = name in tensors.vocabulary and found[name][1:] == shape[1:]
            what = f"vocab_size={shape[0]}" if rows else "the configuration"
            problems.append(f"{name} has the shape {found[name]} where {what} wants {shape}")
    if problems:
        raise ValueError(f"{weights.path} does not fit {weights.config_file.name}: {'; '.join(problems)}")


def check_tied(weights: Weights, tensors: Tensors) -> None:
    """Where the output weights are those of the embedding, a second copy of them must be the same."""
    if tensors.tied in weights.shapes:
        (embedding,) = tensors.vocabulary
        if weights.shapes[tensors.tied] != weights.shapes[embedding] or not np.array_equal(
            weights.read(tensors.tied), weights.read(embedding)
        ):
            raise ValueError(
                f"{weights.path}: {tensors.tied} differs from {embedding}, though {weights.config_file.name} ties them"
            )


def reader(weights: Weights, places: list[Place], shape: tuple[int, ...], dtype: Any) -> Callable:
    """What gives any part of a parameter, with no more than one layer's tensors in memory beside it."""

    def read(index):
        spans = [range(*span.indices(size)) for span, size in zip(index, shape)]
        out = aligned(tuple(map(len, spans)), dtype)
        if places[0].layer is None:
            out[...] = places[0].read(weights)[index]
        else:
            for row, layer in zip(out, spans[0]):
                row[...] = places[layer].read(weights)[index[1:]]
        return out

    return read


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that a CPU device takes as it is, without a copy, because it begins at a multiple of 64 bytes."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def save_pretrained(
    model: LM | BlockStack,
    path: str | Path,
    format: str = "hf",
    *,
    layout: str | None = None,
    shard_bytes: float | int = 5e9,
) -> None:
    """Writes a new folder that NX-AI's library ("nxai") or Hugging Face's ("hf", xLSTM 7B's blocks only) reads.

    layout: "single" or "fused" weights of xLSTM 7B's blocks, "vanilla" or "cuda" weights of sLSTM blocks; the first of
    each if not given. shard_bytes: the most that one file holds.
    """
    if format not in FORMATS:
        raise ValueError(unknown("format", format, FORMATS))
    if layout not in (None, *LAYOUTS):
        raise ValueError(unknown("layout", layout, LAYOUTS))
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is there already and not an empty folder: nothing is overwritten")
    family, config, config_name = describe(model, format, layout)
    tensors = tensors_of(model, family)
    path.mkdir(parents=True, exist_ok=True)
    values = {key: np.asarray(variable[...]) for key, variable in nnx.to_flat_state(nnx.state(model))}
    shapes = dict(tensors.shapes)
    if tensors.tied and family.kind == "lm":  # NX-AI's state dict has both names
        shapes[tensors.tied] = shapes[tensors.vocabulary[0]]
    itemsize = next(iter(values.values())).dtype.itemsize
    sizes = {name: math.prod(shape) * itemsize for name, shape in shapes.items()}
    shards = split(sizes, shard_bytes)
    files = file_names(len(shards), family.kind)
    for file, names in zip(files, shards):
        save_file(assemble(values, tensors, names), path / file, metadata={"format": "pt"})
    if len(shards) > 1 and family.kind != "large":
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    text = json.dumps(config, indent=2) if config_name.endswith("json") else yaml.safe_dump(config, sort_keys=False)
    (path / config_name).write_text(text)


def split(sizes: Mapping[str, int], most: float | int) -> list[list[str]]:
    """The tensors in as few files as hold at most so many bytes each, or one tensor."""
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def file_names(count: int, kind: str) -> list[str]:
    """As each library looks for them."""
    if kind == "large":
        return [f"model_{n}.safetensors" for n in range(count)]
    return (
        ["model.safetensors"]
        if count == 1
        else [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    )
