"""A run folder has one job, which all its processes see."""

import errno
import json
import os
import time

import pytest

from experiments import owner


def test_one_job_at_a_time(tmp_path):
    with owner.owned(tmp_path):
        with pytest.raises(ValueError, match=f"{tmp_path} is in use by process {os.getpid()} on .*: stop it, or"):
            with owner.owned(tmp_path):
                pass
    with owner.owned(tmp_path):
        pass


def test_the_lock_of_a_machine_that_is_lost_is_waited_for(tmp_path, monkeypatch):
    with owner.owned(tmp_path):
        holder = json.loads((tmp_path / owner.LOCK).read_text())
        (tmp_path / owner.LOCK).write_text(json.dumps(holder | {"host": "far"}))
        began = time.monotonic()
        with pytest.raises(ValueError, match="in use by process .* on far"), owner._taken(tmp_path, 0.2):
            pass
        assert time.monotonic() - began > 0.2
        answers = iter([False, True])
        monkeypatch.setattr(owner, "_locked", lambda file: next(answers))
        with owner._taken(tmp_path, 0.2) as mark:
            assert json.loads((tmp_path / owner.LOCK).read_text())["mark"] == mark


def test_another_folder_than_that_of_process_0(tmp_path):
    with owner._taken(tmp_path, 0) as mark:
        owner._find(tmp_path, mark, 0)
        with pytest.raises(ValueError, match=f"{tmp_path / 'b'} is not the folder that process 0 sees: all need one"):
            owner._find(tmp_path / "b", mark, 0.05)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(owner.fcntl, "flock", refuse)
    with owner.owned(tmp_path), owner.owned(tmp_path):
        assert (tmp_path / owner.LOCK).exists()
