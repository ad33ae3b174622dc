import dataclasses
import pickle
import subprocess
import sys

import numpy as np
import pytest

from dask_imgread import FileGroupTask, ImageReaderStage, ProcessingStage, Resources
from dask_imgread.shards.samples import IMAGE_EXTENSIONS
from dask_imgread.testing import draw_picture, encode_picture, write_shard
from tests.helpers.images import members_of, read_with_pillow


def test_the_stage_has_curators_shape():
    reader = ImageReaderStage()
    fields = [(f.name, f.default) for f in dataclasses.fields(reader)][:5]
    assert fields == [
        ("dali_batch_size", 100),
        ("verbose", True),
        ("num_threads", 8),
        ("num_gpus_per_worker", 0.25),
        ("name", "image_reader"),
    ]
    assert isinstance(reader, ProcessingStage)
    assert reader.inputs() == ([], [])
    assert reader.outputs() == (["data"], ["image_data", "image_path", "image_id"])
    cpu = ImageReaderStage(device="cpu").resources
    assert cpu == Resources(gpus=0.0)
    assert not cpu.requires_gpu
    assert ImageReaderStage(device="gpu").resources.gpus == 0.25
    assert pickle.loads(pickle.dumps(reader)) == reader


def test_photographs_have_pillows_pixels(photo_shards):
    batches = ImageReaderStage(dali_batch_size=10).process(FileGroupTask(data=photo_shards[:1]))
    assert [batch.num_items for batch in batches] == [10, 10, 5]
    members = members_of(photo_shards[0])
    for image in (image for batch in batches for image in batch.data):
        name = image.image_path.removeprefix(photo_shards[0] + "/")
        assert image.image_data.dtype == np.uint8
        np.testing.assert_array_equal(image.image_data, read_with_pillow(members.pop(name)))
        assert image.image_data.shape == (image.height, image.width, 3)
        assert image.metadata == {"cls": int(name[1:4])}
        assert image.backend == "libjpeg-turbo"
    assert all(name.endswith(".cls") for name in members)


def test_every_kind_of_image_member_is_read(tmp_path):
    extensions = [*sorted(IMAGE_EXTENSIONS), "JPG", "Png"]
    picture = draw_picture(1, (40, 30))
    members = [(f"{n}.{e}", encode_picture(picture, e.lower())) for n, e in enumerate(extensions)]
    shard = write_shard(tmp_path / "s.tar", members)
    (batch,) = ImageReaderStage().process(FileGroupTask(data=[shard]))
    assert not batch.failed
    assert [image.image_path.rpartition("/")[2] for image in batch.data] == [n for n, _ in members]
    for image, (_, content) in zip(batch.data, members, strict=True):
        np.testing.assert_array_equal(image.image_data, read_with_pillow(content))


def test_stream_holds_no_earlier_batch(photo_shards):
    import weakref

    reader = ImageReaderStage(dali_batch_size=5)
    seen = []
    for batch in reader.stream(FileGroupTask(data=photo_shards)):
        assert sum(ref() is not None for ref in seen) <= 1
        seen.append(weakref.ref(batch.data[0].image_data))
        del batch
    assert len(seen) == 20


def test_pixels_outlive_the_reader(photo_shards):
    stream = ImageReaderStage(dali_batch_size=5).stream(FileGroupTask(data=photo_shards[:1]))
    first = next(stream)
    before = [image.image_data.copy() for image in first.data]
    list(stream)
    for image, pixels in zip(first.data, before, strict=True):
        np.testing.assert_array_equal(image.image_data, pixels)


def test_no_paths():
    with pytest.raises(ValueError, match=r"^No tar file paths"):
        ImageReaderStage().process(FileGroupTask(data=[]))


@pytest.mark.parametrize(
    "options",
    [
        {"dali_batch_size": 0},
        {"num_threads": 0},
        {"num_gpus_per_worker": 0},
        {"num_gpus_per_worker": 1.5},
        {"device": "tpu"},
        {"on_error": "ignore"},
        {"max_pixels": 0},
        {"resize": 0},
        {"resize": (8,)},
        {"fit": "cover", "resize": 8},
        {"fit": "crop"},
        {"fit": "shorter", "resize": (8, 9)},
        {"resample": "nearest", "resize": 8},
        {"resample": "bicubic"},
        {"output": "disk"},
    ],
)
def test_wrong_values_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ImageReaderStage(**options)


def test_a_task_checks_its_values():
    with pytest.raises(ValueError, match="list of shard paths"):
        FileGroupTask(data="s.tar")
    with pytest.raises(ValueError, match="exactly one shard"):
        FileGroupTask(data=["a.tar", "b.tar"], byte_range=(0, 5))
    assert "secret" not in repr(FileGroupTask(reader_config={"storage_options": {"key": "secret"}}))


def test_threads_are_capped_to_a_threads_cores(monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from dask_imgread.cluster import worker

    monkeypatch.setattr(worker, "CPU_COUNT", 16)
    assert worker.count_own_cores(0, 0.25) == 16
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(worker.count_own_cores, 0, 0.25).result() == 1
        assert pool.submit(worker.count_own_cores, 2, 0.25).result() == 2


def test_import_and_construction_load_no_dali():
    code = (
        "import sys, dask_imgread; dask_imgread.ImageReaderStage().outputs();"
        "assert 'nvidia.dali' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_headers_only(photo_shards):
    task = FileGroupTask(data=photo_shards[:1])
    (headers,) = ImageReaderStage(decode=False).process(task)
    (decoded,) = ImageReaderStage().process(task)
    assert [i.image_data for i in headers.data] == [None] * 25
    columns = ["offset", "size", "format", "width", "height", "channels", "key"]
    assert headers.to_frame()[columns].equals(decoded.to_frame()[columns])


def test_a_header_that_lies_far_on(tmp_path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x010E] = "d" * 40_000  # a description that pushes the size out of the first bytes
    shard = write_shard(
        tmp_path / "s.tar",
        [("a.jpg", _jpeg_with(exif)), ("b.tif", encode_picture(draw_picture(1, (60, 40)), "tif"))],
    )
    (batch,) = ImageReaderStage(decode=False).process(FileGroupTask(data=[shard]))
    assert [(i.width, i.height) for i in batch.data] == [(60, 40)] * 2


def _jpeg_with(exif):
    import io

    buffer = io.BytesIO()
    draw_picture(1, (60, 40)).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("resize", [32, (20, 50)])
def test_resize(tmp_path, resize):
    """DALI's and Pillow's: the same shapes, and nearly the same pixels."""
    picture = draw_picture(5, (160, 120))
    members = [("a.png", encode_picture(picture, "png")), ("b.bmp", encode_picture(picture, "bmp"))]
    shard = write_shard(tmp_path / "s.tar", members)
    (batch,) = ImageReaderStage(resize=resize)(FileGroupTask(data=[shard]))
    by_dali, by_pillow = batch.data
    assert (by_dali.backend, by_pillow.backend) == ("dali-cpu", "pillow")
    shape = (20, 50, 3) if isinstance(resize, tuple) else (32, 43, 3)
    assert by_dali.image_data.shape == by_pillow.image_data.shape == shape
    assert (by_dali.width, by_dali.height) == (by_pillow.width, by_pillow.height) == (160, 120)
    difference = np.abs(by_dali.image_data.astype(int) - by_pillow.image_data)
    assert difference.mean() < 1


def test_batches_decoded_ahead_are_the_same(photo_shards, tmp_path, monkeypatch):
    """What a GPU does while the batch before is in use, in the same order on the CPU."""
    from dask_imgread.reading import batches

    broken = write_shard(tmp_path / "s.tar", [("a.jpg", b""), ("b.jpg", b"no")])
    task = FileGroupTask(data=[photo_shards[0], broken, photo_shards[1]])
    plain = ImageReaderStage(dali_batch_size=7)(task)
    monkeypatch.setitem(batches._BATCHES_AHEAD, "cpu", 1)
    ahead = ImageReaderStage(dali_batch_size=7)(task)
    assert [b.task_id for b in ahead] == [b.task_id for b in plain]
    for one, other in zip(plain, ahead, strict=True):
        assert [i.image_id for i in one.data] == [i.image_id for i in other.data]
        assert [i.error for i in one.failed] == [i.error for i in other.failed]
        for a, b in zip(one.data, other.data, strict=True):
            np.testing.assert_array_equal(a.image_data, b.image_data)


def test_device_output_on_a_cpu_is_numpy(photo_shards):
    (batch,) = ImageReaderStage(output="device")(FileGroupTask(data=photo_shards[:1]))
    (host,) = ImageReaderStage()(FileGroupTask(data=photo_shards[:1]))
    for image, expected in zip(batch.data, host.data, strict=True):
        assert isinstance(image.image_data, np.ndarray)
        np.testing.assert_array_equal(image.image_data, expected.image_data)


class AtLeast(ImageReaderStage):
    """With a setting that is no field."""

    def __init__(self, least, **options):
        super().__init__(**options)
        self.least = least


class Slotted(ImageReaderStage):
    """With one that is in no ``__dict__`` either."""

    __slots__ = ("least",)

    def __init__(self, least, **options):
        super().__init__(**options)
        self.least = least


def make_local(least):
    class Local(ImageReaderStage):
        threshold = least

        def stream(self, task):
            yield from (b for b in super().stream(task) if b.num_items >= least)

    return Local()


@pytest.mark.parametrize("make", [AtLeast, Slotted])
def test_all_that_a_reader_holds_is_in_its_keys(make):
    from dask.base import tokenize

    assert tokenize(make(1)) == tokenize(make(1)) != tokenize(make(2))
    assert tokenize(make(1)) != tokenize(ImageReaderStage())
    assert tokenize(make_local(1)) != tokenize(make_local(2))


@pytest.mark.parametrize("make", [AtLeast, Slotted])
def test_all_that_a_reader_holds_is_in_its_jobs_description(make):
    from dask_imgread.jobs.description import describe_job
    from dask_imgread.jobs.row_makers import MetadataRows

    def describe(least):
        return describe_job(make(least), MetadataRows())

    assert describe(1) == describe(1) != describe(2)
    assert describe([1, 2]) == describe([1, 2]) != describe([2, 1])
    assert describe(1)["options"]["least"] == 1
    with pytest.raises(ValueError, match=r"the reader's least, a lock, has no deterministic token"):
        describe(__import__("threading").Lock())
