"""What holds for any shard: decoded + failed = members, ids unique, good ones as Pillow's."""

import random
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dask_imgread import ImageReaderStage, partition_shards
from dask_imgread.decoding.contract import DecoderOptions, Encoded
from dask_imgread.decoding.decode import Decoding, choose_backend
from dask_imgread.decoding.header import ImageError, read_header
from dask_imgread.shards.samples import index_members
from dask_imgread.shards.tar import NotTarError, walk_members
from dask_imgread.testing import draw_picture, encode_picture, write_shard
from tests.conftest import count_fuzz_inputs
from tests.helpers.images import both_decoders, encode, read_with_pillow

PICTURES = [draw_picture(n, size) for n, size in enumerate([(40, 30), (31, 47), (1, 1), (64, 9)])]
EXTENSIONS = ["jpg", "png", "webp", "gif", "tif", "bmp", "jp2", "avif", "pgm"]
GOOD = [(e, encode_picture(p, e)) for p in PICTURES for e in EXTENSIONS]
BAD = [("jpg", b""), ("png", b"not a picture"), ("gif", b"GIF89a")]
BAD += [(e, c[: len(c) // 3]) for e, c in GOOD[:7]]
BAD += [("jpg", GOOD[0][1].replace(b"\xff\xc0", b"\xff\xcb", 1))]
_TABLE = GOOD[0][1].index(b"\xff\xc4") + 5  # a Huffman table that fails its whole batch
BAD += [("jpg", GOOD[0][1][:_TABLE] + b"\xff" * 16 + GOOD[0][1][_TABLE + 16 :])]
SIDECARS = [("txt", b"words"), ("json", b"{"), ("cls", b"x"), ("npy", b"\0")]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    members=st.lists(
        st.tuples(st.integers(0, 12), st.sampled_from(GOOD + BAD + SIDECARS)), max_size=30
    ),
    batch_size=st.integers(1, 12),
    images_per_partition=st.none() | st.integers(1, 9),
    decoder=st.sampled_from(["auto", "dali"]),
)
def test_every_image_is_decoded_or_recorded(
    tmp_path, members, batch_size, images_per_partition, decoder
):
    named = [(f"{key}.{extension}", content) for key, (extension, content) in members]
    shard = write_shard(tmp_path / "s.tar", named)
    reader = ImageReaderStage(device="cpu", dali_batch_size=batch_size, decoder=decoder)
    tasks = partition_shards(shard, images_per_partition=images_per_partition)
    batches = [batch for task in tasks for batch in reader.process(task)]
    good = [image for batch in batches for image in batch.data]
    failed = [image for batch in batches for image in batch.failed]

    images = [(name, c) for name, c in named if name.split(".")[1] in EXTENSIONS]
    read = [image.image_path.removeprefix(shard + "/") for image in good + failed]
    assert Counter(read) == Counter(name for name, _ in images)
    assert len({image.image_id for image in good + failed}) == len(images)
    by_offset = sorted(good + failed, key=lambda image: image.offset)
    for image, (name, content) in zip(by_offset, images, strict=True):
        if (name.split(".")[1], content) in BAD:
            assert image.error
            assert image.image_data is None
        else:
            assert image.error is None, image.error
            np.testing.assert_array_equal(image.image_data, read_with_pillow(content))
            assert len(image.metadata) <= 4
    assert all(batch.num_items <= batch_size for batch in batches)


class Buffer:
    compressed, problem = False, ""

    def __init__(self, content):
        self.content = content

    def read_at(self, offset, size):
        return self.content[offset : offset + min(size, len(self.content))]

    def end(self):
        return len(self.content)


def mutate(rng, content):
    """Change a few bytes, cut, repeat or join."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at = rng.randrange(len(content)) if content else 0
        kind = rng.randrange(5)
        if kind == 0 and content:
            content[at] = rng.choice([0, 255, rng.randrange(256), content[at] ^ 1])
        elif kind == 1:
            del content[at : at + rng.choice([1, 4, 600])]
        elif kind == 2:
            content[at:at] = rng.choice([b"\xff" * 4, bytes(8), b"\x80" + bytes(11), b"7" * 12])
        elif kind == 3:
            content[at : at + 4] = rng.randbytes(4)
        else:
            content[at:at] = content[: rng.choice([1, 30, 512])]
    return bytes(content)


@pytest.mark.slow
def test_fuzz_the_tar_walker(tmp_path, record_property):
    import tarfile

    rng = random.Random(20)
    seeds = []
    for number, layout in enumerate([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]):
        long = "" if layout == tarfile.USTAR_FORMAT else "é" * 130
        names = ["a.jpg", f"folder/{long}b.png", "c.txt"]
        path = write_shard(tmp_path / f"{number}.tar", [(n, b"x" * 700) for n in names], layout)
        with open(path, "rb") as file:
            seeds.append(file.read()[:8000])
    tried = 0
    ends = time.monotonic() + 2
    while time.monotonic() < ends:
        content = mutate(rng, rng.choice(seeds))
        tried += 1
        try:
            members = list(walk_members(Buffer(content)))
        except NotTarError:
            continue
        assert len(members) <= len(content) // 512 + 1
        for member in members:
            whole = member.offset + member.size <= len(content)
            assert whole or member.problem, member
        index = index_members(members)
        assert len(index.images) + len(index.broken) <= len(members)
    count_fuzz_inputs("tar walker", tried)
    assert tried > 500


@pytest.mark.slow
@both_decoders
def test_fuzz_the_decoders(decoder):
    rng = random.Random(21)
    seeds = [content for _, content in GOOD] + [
        encode(PICTURES[0], "JPEG", progressive=True),
        encode(PICTURES[0].convert("CMYK"), "JPEG"),
        encode(PICTURES[0].convert("P"), "PNG"),
        encode(PICTURES[0], "TIFF", compression="tiff_lzw"),
    ]
    options = DecoderOptions("cpu", 1, 8, decoder=decoder)
    tried = read = 0
    ends = time.monotonic() + 2
    while time.monotonic() < ends:
        batch = []
        for _ in range(8):
            content = mutate(rng, rng.choice(seeds))
            tried += 1
            try:
                header = read_header(content)
            except ImageError:
                continue
            if header.width * header.height <= 1 << 22:
                backend = choose_backend(content, header, options)
                batch.append(Encoded(str(len(batch)), content, header, backend))
        decoded = Decoding(batch, options).result()
        assert len(decoded) == len(batch)
        for result in decoded:
            assert (result.pixels is None) == (result.error is not None)
            if result.pixels is not None:
                read += 1
                assert result.pixels.ndim == 3
                assert result.pixels.shape[2] == 3
                assert result.pixels.dtype == np.uint8
    count_fuzz_inputs(f"decoders ({decoder})", tried)
    assert tried > 200
    assert read > 0
