"""Checkpoints: any pytree of arrays, saved asynchronously by orbax, restored into the sharding of a given state."""

import asyncio
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree


class Checkpoints:
    """The last two checkpoints under one folder, one sub-folder a step."""

    def __init__(self, folder: Path):
        self._folder = Path(folder).absolute()
        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(f"{self._folder} is a file: checkpoints need a folder of this name")
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(
            self._folder, options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        self._manager.wait_until_finished()
        return self._manager.latest_step()

    def latest_path(self) -> Path | None:
        """Folder of the newest complete checkpoint."""
        step = self.latest()
        return None if step is None else self._folder / str(step)

    def save(self, step: int, tree: PyTree) -> None:
        """Write in the background; the arrays are copied to the host before this returns."""
        self._manager.save(step, args=ocp.args.StandardSave(_named(tree)))

    def restore(self, step: int, like: PyTree) -> PyTree:
        """The checkpoint of `step`, with the structure, dtypes and shardings of `like`."""
        named = _named(like)
        abstract = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for k, x in named.items()}
        saved = self._metadata(step)
        shapes = {k: (tuple(x.shape), str(x.dtype)) for k, x in saved.items()}
        wanted = {k: (tuple(x.shape), str(x.dtype)) for k, x in named.items()}
        if shapes != wanted:
            differ = sorted(k for k in shapes.keys() | wanted.keys() if shapes.get(k) != wanted.get(k))
            raise ValueError(
                f"checkpoint {self._folder / str(step)} is another model: {differ[0]} is {shapes.get(differ[0])} there,"
                f" {wanted.get(differ[0])} here ({len(differ)} of {len(wanted)} arrays differ)"
            )
        restored = self._read(step, abstract)
        return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in named])

    def restore_part(self, step: int, prefix: str, like: PyTree) -> PyTree:
        """Only the part of a saved tree under the field `prefix` (say "params"); `like` may be abstract."""
        named = {f"{prefix}.{name}": x for name, x in _named(like).items()}
        saved = self._metadata(step)
        missing = [name for name, x in named.items() if name not in saved or tuple(saved[name].shape) != x.shape]
        if missing:
            raise ValueError(
                f"checkpoint {self._folder / str(step)} has no {missing[0]} of shape {named[missing[0]].shape}"
            )
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # whatever devices it was saved from
        abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for name, x in saved.items()}
        restored = self._read(step, abstract)
        return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in named])

    def _metadata(self, step: int) -> dict[str, Any]:
        """Shape and dtype of every saved array."""
        try:
            json.loads((self._folder / str(step) / "_CHECKPOINT_METADATA").read_bytes())
        except (OSError, ValueError) as error:
            raise self._damaged(step, f"_CHECKPOINT_METADATA: {error}") from error
        with self._reading(step):
            saved = dict(self._manager.item_metadata(step) or {})
        if not saved:
            raise self._damaged(step, "it holds no arrays")
        return saved

    def _read(self, step: int, abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
        with self._reading(step):
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """What orbax cannot read is a ValueError that names the checkpoint."""
        try:
            with mock.patch.object(asyncio, "new_event_loop", _WaitingLoop):
                yield
        except Exception as error:  # orbax has no common error for what it cannot read
            raise self._damaged(step, error) from error

    def _damaged(self, step: int, reason: object) -> ValueError:
        reason = " ".join(re.split(r" \[(?:tensorstore_spec|source locations)=", str(reason))[0].split())
        return ValueError(
            f"checkpoint {self._folder / str(step)} is damaged ({reason}): remove that folder to go on from the one"
            " before it, or from the start"
        )

    def close(self) -> None:
        """Wait for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _WaitingLoop(asyncio.SelectorEventLoop):
    """orbax closes its event loop at the first array that cannot be read; this one first waits for those under way.

    Otherwise their answers meet a closed loop, and each writes a traceback to stderr.
    """

    def close(self):
        if not self.is_closed() and (left := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        super().close()


def _named(tree: PyTree) -> dict[str, Any]:
    """The leaves by dotted name, in tree order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator=".").replace(".value", ""): x for path, x in leaves}
    assert len(named) == len(leaves), "two leaves share a name"
    return named
