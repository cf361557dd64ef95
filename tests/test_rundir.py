"""A run directory on disks that refuse, and files that others may read."""

import errno
import os

import pytest
import torch

from masquant_cli import rundir, shards
from masquant_cli.errors import ArtifactError, EnvironmentProblem


def test_files_are_readable_by_whoever_the_umask_allows(tmp_path):
    before = os.umask(0o022)
    try:
        path = tmp_path / "layers" / "000.safetensors"
        shards.save(path, {"x": torch.ones(3)}, fingerprint="f", notes={})
        assert path.stat().st_mode & 0o777 == 0o644
        assert os.umask(0o022) == 0o022  # asking for the umask does not change it
    finally:
        os.umask(before)


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "calibrate").write_text("in the way")
    with pytest.raises(EnvironmentProblem) as caught:
        shards.save(tmp_path / "calibrate/layers/000.safetensors", {}, fingerprint="f", notes={})
    assert "--run-dir" in caught.value.hint
    assert (tmp_path / "calibrate").read_text() == "in the way"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_run_directory_that_cannot_be_written(tmp_path, monkeypatch, number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(rundir.FileLock, "acquire", refuse)
    with (
        pytest.raises(EnvironmentProblem, match="cannot write") as caught,
        rundir.RunDir(tmp_path).lock(),
    ):
        pass
    assert caught.value.where == str(tmp_path) and "--run-dir" in caught.value.hint


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 1}', None])
def test_a_damaged_manifest_is_never_taken_for_none(tmp_path, content):
    path = tmp_path / "manifest.json"
    path.mkdir() if content is None else path.write_text(content)
    with pytest.raises(ArtifactError, match="damaged") as caught:
        rundir.read_manifest(tmp_path)
    assert caught.value.where == str(path)
