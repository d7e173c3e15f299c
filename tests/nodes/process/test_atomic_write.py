"""Files are replaced atomically."""

from pathlib import Path

import pytest

from fedmq.nodes.process.atomic_write import replacing


def test_the_new_file_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with replacing(path) as fresh:
        fresh.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), replacing(path) as fresh:
        fresh.write_text("ne\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
