"""Checkpoints: any pytree of arrays, saved asynchronously by orbax, restored into the sharding of a given state."""

import asyncio
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from .names import check_run_folder

FORMAT = 2  # of what a checkpoint means: raised when an older one can no longer be read as the same thing
MANIFEST = "manifest.json"  # of each step: its files' sizes and hashes, written before the step gets its name
ORBAX_RECORD = "_CHECKPOINT_METADATA"
FULL = (errno.ENOSPC, errno.EDQUOT)


class Checkpoints:
    """The last few checkpoints under one folder, and those of every `keep_every` steps, one sub-folder a step.

    A step counts only if it is intact: every file that its manifest names is there, of its size and hash.
    """

    def __init__(self, folder: Path, keep_last: int = 2, keep_every: int = 0):
        self._folder = Path(folder).absolute()
        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(f"{self._folder} is a file: checkpoints need a folder of this name")
        check_run_folder(Path(folder))
        self.warnings: list[str] = []  # of damaged steps that were passed over
        self._saving: int | None = None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last,
            keep_period=keep_every or None,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        self._manager = _Manager(self._folder, options=options, item_handlers=ocp.StandardCheckpointHandler())

    def wait(self) -> None:
        """Until all that was saved is on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, intact or not."""
        self.wait()
        return self._manager.latest_step()

    def latest_path(self) -> Path | None:
        """Folder of the newest complete checkpoint."""
        step = self.latest()
        return None if step is None else self._folder / str(step)

    def newest_intact(self) -> int | None:
        """Step of the newest intact checkpoint; None if there is no checkpoint; ValueError if there is none intact."""
        self.wait()
        steps = sorted(self._manager.all_steps(), reverse=True)
        damage = []
        for step in steps:
            reason = damaged(self._folder / str(step))
            if reason is None:
                if damage:
                    self.warnings.append(f"{'; '.join(damage)}: going on from the intact one of step {step}")
                return step
            damage.append(f"checkpoint {self._folder / str(step)} is damaged ({reason})")
        if steps:
            raise self._damaged(steps[0], damaged(self._folder / str(steps[0])))
        return None

    def save(self, step: int, tree: PyTree) -> None:
        """Write in the background; the arrays are copied to the host before this returns. Replaces a damaged step."""
        self.wait()
        for newer in [each for each in self._manager.all_steps() if each >= step]:
            self._manager.delete(newer)
        self._saving = step
        with self._writing():
            self._manager.save(step, args=ocp.args.StandardSave(_named(tree)))

    def _seal(self) -> None:
        """Add the manifest to the step that is being written, when all else of it is on disk."""
        if jax.process_index() == 0:
            unnamed = self._folder.glob(f"{self._saving}.orbax-checkpoint-tmp*")
            newest = max(unnamed, key=lambda path: path.stat().st_mtime_ns)
            files = {name: _size_and_hash(newest / name) for name in _files(newest)}
            (newest / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}), encoding="utf-8")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """What cannot be written is one line; what was half written is removed, and the checkpoints before it stay."""
        try:
            yield
        except Exception as error:  # orbax has no common error for what it cannot write
            if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
                raise  # another process was lost
            for half in self._folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"):
                shutil.rmtree(half, ignore_errors=True)
            complete = [int(p.name) for p in self._folder.iterdir() if p.name.isdecimal()]
            left = f"the checkpoint of step {max(complete)} is there to go on from" if complete else "there is none yet"
            full = is_full(error)
            reason = os.strerror(errno.ENOSPC) if full else getattr(error, "strerror", None)
            reason = reason or f"{type(error).__name__}: {_one_line(error)}"
            mend = "make room" if full else "mend that"
            raise OSError(
                f"checkpoint {self._folder / str(self._saving)} could not be written ({reason}): {left}; {mend},"
                " then repeat the command"
            ) from error

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
            json.loads((self._folder / str(step) / ORBAX_RECORD).read_bytes())
        except (OSError, ValueError) as error:
            raise self._damaged(step, f"{ORBAX_RECORD}: {error}") from error
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
            if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
                raise
            raise self._damaged(step, error) from error

    def _damaged(self, step: int, reason: object) -> ValueError:
        return ValueError(
            f"checkpoint {self._folder / str(step)} is damaged ({_one_line(reason)}): remove that folder to go on from"
            " the one before it, or from the start"
        )

    def close(self) -> None:
        """Wait for what is being written."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _Manager(ocp.CheckpointManager):
    """Saves when it is told to, and asks nobody whether the machine is taken away: `distributed.Stop` does."""

    def reached_preemption(self, step: int) -> bool:
        return False


def is_full(error: BaseException | None) -> bool:
    """Whether it is, or was caused by, a disk or a quota that is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def damaged(folder: Path) -> str | None:
    """What is wrong with the files of a saved step by its manifest; None if nothing is. A ValueError of its format."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        form, files = manifest["format"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST}: {getattr(error, 'strerror', None) or 'it cannot be read'}"
    if form != FORMAT:
        raise ValueError(f"checkpoint {folder} is of format {form}, this version reads {FORMAT}: use another folder")
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        size = (folder / name).stat().st_size
        if expected[0] not in (None, size):
            return f"{name} has {size} bytes, not {expected[0]}"
        try:
            same = _size_and_hash(folder / name) == expected
        except (ValueError, AttributeError):  # of the record: no JSON object
            same = False
        if not same:
            return f"{name} has other content than was saved"
    return None


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _size_and_hash(path: Path) -> list[int | str | None]:
    """What the manifest says of a file; of orbax's own record without the time of commit, which it adds last."""
    with open(path, "rb") as file:
        if path.name != ORBAX_RECORD:
            return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
        record = json.load(file)
        record.pop("commit_timestamp_nsecs", None)
        return [None, hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()]


def _one_line(reason: object) -> str:
    return " ".join(re.split(r" \[(?:tensorstore_spec|source locations)=", str(reason))[0].split())


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
