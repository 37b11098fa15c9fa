"""A folder of safetensors and its configuration, read tensor by tensor."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import yaml
from safetensors import SafetensorError, safe_open

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")  # run code when they are read
CONFIGS = ("config.json", "config.yaml", "config.yml")
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


class Weights:
    """The tensors of a model by name: their shapes at once, their values when they are read.

    path: a folder, or one .safetensors file whose configuration lies beside it as NAME.config.json or config.json.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        files, candidates = find_files(self.path)
        self.config_file, self.config = read_config(self.path, candidates)
        self._stack, self._files, self.shapes, dtypes = ExitStack(), {}, {}, {}
        for file in files:
            self._open(file, dtypes)
        wrong = [f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype not in DTYPES]
        if wrong or not dtypes:
            raise ValueError(
                f"{self.path}: weights must be floating of 16, 32 or 64 bits; {'; '.join(wrong) or 'none'}"
            )
        self.dtype = jnp.result_type(*{jnp.dtype(DTYPES[dtype]) for dtype in dtypes.values()})

    def _open(self, file: Path, dtypes: dict[str, str]) -> None:
        try:
            handle = self._stack.enter_context(safe_open(file, "numpy"))
            for name in handle.keys():
                if name in self._files:
                    raise ValueError(f"{self.path} holds {name} twice, in {file.name} and in another file")
                tensor = handle.get_slice(name)
                self._files[name] = handle
                self.shapes[name], dtypes[name] = tuple(tensor.get_shape()), tensor.get_dtype()
        except SafetensorError as error:
            reason = str(error).rpartition(": ")[2]
            raise ValueError(f"{file} is truncated or not a safetensors file ({reason}): fetch it again") from None

    def read(self, name: str, start: int = 0, rows: int | None = None) -> np.ndarray:
        """A tensor, or some of its rows."""
        if rows is None:
            return self._files[name].get_tensor(name)
        return self._files[name].get_slice(name)[start : start + rows]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stack.close()
        self._files.clear()


def find_files(path: Path) -> tuple[list[Path], list[Path]]:
    """The safetensors files, and where the configuration may be."""
    if path.suffix in PICKLES:
        raise ValueError(f"{path} is a pickle, which can run any code: save the weights as safetensors")
    if not path.exists():
        raise ValueError(f"{path} does not exist: a folder, or a .safetensors file, is needed")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is no .safetensors file")
        return [path], [path.with_suffix(".config.json"), *(path.with_name(name) for name in CONFIGS)]
    files = sorted(path.glob("*.safetensors"))
    for index in path.glob("*.safetensors.index.json"):
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise ValueError(f'{index} has no "weight_map" from tensors to files')
        files = [path / Path(name).name for name in sorted(set(listed.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}, of which {index.name} speaks")
    if not files:
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
        if pickles:
            raise ValueError(
                f"{path} holds only pickles ({', '.join(pickles)}), which can run any code: save safetensors"
            )
        raise ValueError(f"{path} holds no .safetensors file")
    return files, [path / name for name in CONFIGS]


def read_config(path: Path, candidates: list[Path]) -> tuple[Path, Mapping[str, Any]]:
    """The first of the files that is there, and what it says."""
    file = next((file for file in candidates if file.is_file()), None)
    if file is None:
        raise ValueError(f"{path} has no configuration beside it: {' or '.join(file.name for file in candidates)}")
    config = read_json(file) if file.suffix == ".json" else read_yaml(file)
    return file, config


def read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    return check_fields(file, value)


def read_yaml(file: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    return check_fields(file, value)


def check_fields(file: Path, value: Any) -> dict[str, Any]:
    """The file holds named fields."""
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}, not named fields")
    return value
