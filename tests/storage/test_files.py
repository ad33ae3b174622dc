"""Files are written whole or not at all."""

import errno

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem

from dask_imgread.storage.files import write_whole


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
