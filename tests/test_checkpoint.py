"""Checkpoints on a disk that fails: damage is found and passed over, a full disk costs only what was being written."""

import errno
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.corrupt_train import DAMAGE, UNREAD
from xlstm_jax.checkpoint import FORMAT, MANIFEST, Checkpoints


def tree(value):
    return {"w": jnp.full((3, 4), float(value)), "n": jnp.int32(value)}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    with Checkpoints(tmp_path_factory.mktemp("written") / "run") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, tree(step))
    return checkpoints._folder


@pytest.fixture
def saved(tmp_path, written):
    """Steps 1 and 2 of a run, which `tree` fits."""
    return shutil.copytree(written, tmp_path / "run")


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_to_any_file_is_found_and_the_step_before_is_used(saved, damage):
    whole = saved.parent / "whole"
    shutil.copytree(saved / "2", whole)
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file() and path.stat().st_size]
    files.remove(Path(UNREAD))
    assert len(files) > 5
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.newest_intact() == 2 and not checkpoints.warnings
        for file in files:
            damage(saved / "2" / file)
            assert checkpoints.newest_intact() == 1
            warning = checkpoints.warnings.pop()
            assert f"{saved / '2'} is damaged ({file}" in warning
            assert warning.endswith("going on from the intact one of step 1")
            shutil.rmtree(saved / "2")
            shutil.copytree(whole, saved / "2")
        damage(saved / "2" / files[0])
        assert checkpoints.restore(checkpoints.newest_intact(), tree(0))["n"] == 1
        checkpoints.save(2, tree(7))  # the damaged one is replaced
        assert checkpoints.newest_intact() == 2 and checkpoints.restore(2, tree(0))["n"] == 7


def test_without_an_intact_step_nothing_is_used(saved):
    for step in "12":
        (saved / step / MANIFEST).unlink()
    with Checkpoints(saved) as checkpoints, pytest.raises(ValueError, match="/2 is damaged .*: remove that folder"):
        checkpoints.newest_intact()


def test_the_last_few_are_kept_and_some_for_ever(tmp_path):
    with Checkpoints(tmp_path / "run", keep_last=2, keep_every=4) as checkpoints:
        assert checkpoints.newest_intact() is None
        for step in range(1, 8):
            checkpoints.save(step, tree(step))
    assert sorted(int(p.name) for p in (tmp_path / "run").iterdir()) == [4, 6, 7]


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"\(No space left on device\): .*; make room, then repeat"),
        (PermissionError(errno.EACCES, "Permission denied"), r"\(Permission denied\): .*; mend that, then repeat"),
        (RuntimeError("two\nlines"), r"\(RuntimeError: two lines\): .*; mend that, then repeat"),
    ],
    ids=["full", "forbidden", "unknown"],
)
def test_what_cannot_be_written_is_one_line_and_leaves_the_last_checkpoint(saved, error, words):
    def fail():
        raise error

    checkpoints = Checkpoints(saved)
    checkpoints._manager._checkpointer._post_finalization_callback = fail
    with pytest.raises(OSError, match=f"/3 could not be written {words}") as raised:
        checkpoints.save(3, tree(3))
        checkpoints.wait()
    assert "the checkpoint of step 2 is there to go on from" in str(raised.value) and "\n" not in str(raised.value)
    checkpoints.close()
    assert sorted(path.name for path in saved.iterdir()) == ["1", "2"]
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.newest_intact() == 2
        np.testing.assert_array_equal(checkpoints.restore(2, jax.tree.map(jnp.zeros_like, tree(0)))["w"], 2)


def test_another_format_is_refused(saved):
    manifest = json.loads((saved / "2" / MANIFEST).read_text())
    (saved / "2" / MANIFEST).write_text(json.dumps(manifest | {"format": 1}))
    with (
        Checkpoints(saved) as checkpoints,
        pytest.raises(ValueError, match=f"is of format 1, this version reads {FORMAT}"),
    ):
        checkpoints.newest_intact()


def test_a_folder_that_orbax_would_not_find_again_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be kept under a name with '\['"):
        Checkpoints(tmp_path / "xlstm[1:1]")
    assert not list(tmp_path.iterdir())
