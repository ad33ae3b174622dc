"""Files are written whole or not at all."""

import errno
import os
from random import Random

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem

from dask_imgread.storage import files
from dask_imgread.storage.files import open_whole, write_whole


class FullDisk(DirFileSystem):
    """A file system that is not local, and has no space for more than a few bytes."""

    def pipe_file(self, path, value, mode="overwrite", **options):
        super().pipe_file(path, value[:5], mode, **options)
        raise OSError(errno.ENOSPC, "no space")


def test_a_write_that_fails_half_way_leaves_the_earlier_file(tmp_path):
    local = fsspec.filesystem("file")
    write_whole(DirFileSystem(str(tmp_path), local), "folder/name", b"the earlier file")
    with pytest.raises(OSError, match="no space"):
        write_whole(FullDisk(str(tmp_path), local), "folder/name", b"the later file")
    (path,) = (tmp_path / "folder").iterdir()
    assert path.read_bytes() == b"the earlier file"


@pytest.mark.parametrize("limit", [None, 7, 5000])
def test_many_pieces_are_written_in_order(tmp_path, monkeypatch, limit):
    """Also if the system writes less at a time than it is asked to, as it may."""
    if limit is not None:
        write = os.writev

        def write_some(descriptor, pieces):
            return write(descriptor, [b"".join(pieces[:3])[:limit]])

        monkeypatch.setattr(os, "writev", write_some)
    monkeypatch.setattr(files, "_STARTED_BYTES", 10_000)
    random = Random(1)
    pieces = [random.randbytes(size) for size in (0, 1, 40_000, 0, 3, 512, *[5] * 2500, 0)]
    with open_whole(fsspec.filesystem("file"), f"{tmp_path}/name") as file:
        file.write(b"head")
        file.writelines([*pieces, memoryview(b"views, too")[::1]])
        file.write(b"tail")
        assert file.tell() == 4 + sum(map(len, pieces)) + 10 + 4
        assert not (tmp_path / "name").exists()
    expected = b"head" + b"".join(pieces) + b"views, too" + b"tail"
    assert (tmp_path / "name").read_bytes() == expected
