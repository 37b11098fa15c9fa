"""What tensorflow-datasets prepared, read without TensorFlow: ArrayRecord only, and texts only."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from ..names import unknown
from .documents import ALIASES, Corpus, DataNotFound, Documents, shares

PREPARE = """import sys, tensorflow_datasets as tfds
name, data_dir = sys.argv[1:]
tfds.builder(name, data_dir=data_dir, file_format="array_record").download_and_prepare()
"""


def load(name: str, rest: str, folder: Path) -> Corpus:
    """NAME[/CONFIG][:VERSION][#FEATURE] of the data folder; the newest version unless one is given."""
    rest, _, feature = rest.partition("#")
    rest, _, version = rest.partition(":")
    found = folders(folder, rest, version)
    if not found:
        raise DataNotFound(not_prepared(f"{rest}:{version}" if version else rest, folder))
    configs = sorted({path.parent for path in found})
    if len(configs) > 1:
        choices = ", ".join(f"tfds:{config.relative_to(folder)}" for config in configs)
        raise ValueError(f"tfds:{rest} is prepared with several configs: choose one of {choices}")
    newest = max(found, key=lambda path: [int(part) if part.isdigit() else -1 for part in path.name.split(".")])
    return read(name, newest, feature, folder)


def folders(folder: Path, name: str = "*", version: str = "") -> list[Path]:
    """Folders NAME[/CONFIG]/VERSION in the data folder that tensorflow-datasets has finished."""
    found = [*folder.glob(f"{name}/*/dataset_info.json"), *folder.glob(f"{name}/*/*/dataset_info.json")]
    return sorted(path.parent for path in found if not version or path.parent.name == version)


def read(name: str, path: Path, feature: str = "", folder: Path | None = None) -> Corpus:
    """Documents of a prepared folder, by its name in the data folder `folder`, or as it stands."""
    try:
        stored = json.loads((path / "dataset_info.json").read_text(encoding="utf-8")).get("fileFormat", "tfrecord")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{name}: {path / 'dataset_info.json'} is damaged: {error}") from None
    if stored != "array_record":
        lost = stored == "parquet"
        why = "tensorflow-datasets loses rows in it silently" if lost else "it has no random access without TensorFlow"
        raise ValueError(f"{name}: {path} is stored as {stored}: {why}; prepare it with file_format='array_record'")
    import tensorflow_datasets as tfds

    if folder is None:
        builder = tfds.builder_from_directory(path)
    else:
        builder = tfds.builder(f"{path.parent.relative_to(folder)}:{path.name}", data_dir=folder)
    for split in builder.info.splits.values():
        for file, count in zip(split.filepaths, split.shard_lengths):
            check_file(name, Path(file), count)
    texts = [key for key, kind in builder.info.features.items() if isinstance(kind, tfds.features.Text)]
    feature = feature or (texts[0] if len(texts) == 1 else "text")
    if feature not in texts:
        raise ValueError(
            f"{unknown(f'text feature of {path.parent.name}', feature, texts or ['none'])}; write tfds:NAME#FEATURE"
        )

    splits = {}
    for split, aliases in ALIASES.items():
        for alias in aliases:
            if alias in builder.info.splits:
                source = builder.as_data_source(alias)
                splits[split] = Documents(range(len(source)), partial(text, name, source, feature), 0, len(source))
                break
    return Corpus(name, str(path), shares(splits, name), False, folder_hash(path), f"feature {feature}")


def text(name: str, source: Sequence, feature: str, index: int) -> bytes:
    """One text of a source, as bytes whichever it gives."""
    try:
        value = source[index][feature]
    except RuntimeError as error:  # what a wrong checksum raises
        raise ValueError(f"{name}: row {index} is damaged: {' '.join(str(error).split())}") from None
    return value.encode() if isinstance(value, str) else bytes(value)


def check_file(name: str, file: Path, count: int) -> None:
    """ValueError unless it is an ArrayRecord file of `count` rows."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    if not file.is_file():
        raise ValueError(f"{name}: {file} is missing: copy or prepare it again")
    try:
        found = len(ArrayRecordDataSource([str(file)]))
    except RuntimeError as error:
        raise ValueError(f"{name}: {file} is damaged: {' '.join(str(error).split())[:80]}") from None
    if found != count:
        raise ValueError(f"{name}: {file} has {found} rows, not {count}: copy or prepare it again")


def folder_hash(path: Path) -> str:
    """SHA-256 of name, size and the first and last MiB of each file: a prepared set may have hundreds of GB."""
    digest, edge = hashlib.sha256(), 1 << 20
    for file in sorted(path.iterdir()):
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with open(file, "rb") as opened:
                digest.update(opened.read(edge))
                opened.seek(max(size - edge, 0))
                digest.update(opened.read(edge))
    return digest.hexdigest()


def not_prepared(name: str, folder: Path) -> str:
    """One line: where it was looked for, how to get it, and whether tensorflow-datasets knows the name at all."""
    import tensorflow_datasets as tfds

    base = name.split("/")[0].split(":")[0]
    known, needs = tfds.list_builders(with_community_datasets=False), "needs network"
    if base not in known:
        near = unknown("name", base, known).partition("; valid")[0]
        if find_spec("tensorflow"):
            return f"tfds:{name} is neither prepared in {folder} nor known to tensorflow-datasets: {near}"
        needs += f"; {near}; listed with TensorFlow alone are wiki40b, c4 and others: pip install 'xlstm_jax[tf]'"
    return (
        f"tfds:{name} is not prepared: looked for {folder}/{name}/*/dataset_info.json; to get it: python -m"
        f" experiments.data prepare tfds:{name} --download --data_dir={folder} ({needs});"
        " offline instead: file:PATH or bundled:kjv"
    )


def prepare(name: str, folder: Path, time_limit: int | float) -> None:
    """Download and prepare as ArrayRecord, in a process of its own: without a network it would not come back."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", PREPARE, name, str(folder)]
    try:
        done = subprocess.run(command, timeout=time_limit, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        why = "no network, or a large set that needs a longer time_limit"
        raise DataNotFound(f"tfds:{name} was not prepared within {time_limit:g} s: {why}") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        hint = "" if find_spec("tensorflow") else "; image, audio and some text sets need pip install 'xlstm_jax[tf]'"
        raise DataNotFound(f"tfds:{name} was not prepared: {lines[-1]}{hint}")
