"""Paths in error messages."""

from pathlib import Path

import pytest

from softprompt.errors import base_of, no_folder


def test_a_relative_path_is_said_with_the_folder_it_is_relative_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert base_of("mice") == f" in the working directory {tmp_path}"
    assert base_of(tmp_path / "mice") == ""
    assert no_folder("mice") == f"; there is no such folder in the working directory {tmp_path}" and no_folder(tmp_path) == ""
