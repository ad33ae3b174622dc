"""The GPU's branch, run for real on DALI's CPU backend: only the names of devices are others."""

import gc
import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from dask_imgread import FileGroupTask, ImageReaderStage
from dask_imgread.buffers import BUFFERS, _Lease
from dask_imgread.cluster import gpu
from dask_imgread.decoding import dali, faults
from dask_imgread.decoding.contract import DecoderOptions, Encoded
from dask_imgread.decoding.decode import Decoding, choose_backend
from dask_imgread.decoding.header import read_header
from dask_imgread.decoding.stderr import _find_descriptor
from dask_imgread.testing import draw_picture, encode_picture, write_shard
from tests.helpers.images import (
    BROKEN,
    JPEG,
    PICTURE,
    break_table,
    encode,
    members_of,
    read_with_pillow,
)

CRITICAL = """Critical error in pipeline:
Critical error in pipeline:
Error in MIXED operator `nvidia.dali.fn.decoders.image`,
which was used in the pipeline definition with the following traceback:

  File "/opt/CUDA/dask_imgread/decoding/dali.py", line 70, in __init__
    images = fn.decoders.image(

encountered:

{}
Current pipeline object is no longer valid.
Current pipeline object is no longer valid."""

FAULTS = {
    "Failed to decode sample #5 : ": ("image", 5),
    "Failed to decode sample #30 : unsupported": ("image", 30),
    **{f"nvImageCodec failure: '#{n}'": ("image", None) for n in (2, 3, 4, 13, 14, 17, 19)},
    'Assert on "new_size >= 0" failed: Input size less than zero not supported.': ("image", None),
    "std::bad_alloc": ("memory", None),
    "Can't allocate 8589934592 bytes on device 0.": ("memory", None),
    "Can't allocate 8589934592 bytes on host.": ("memory", None),
    "CUDA allocation failed": ("memory", None),
    "CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory": ("memory", None),
    "CUDA driver API error CUDA_ERROR_OUT_OF_MEMORY (2):\nout of memory": ("memory", None),
    **{f"nvImageCodec failure: '#{n}'": ("memory", None) for n in (5, 15)},
    "CUDA runtime API error cudaErrorIllegalAddress (700):\nillegal access": ("driver", None),
    "CUDA driver API error CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (803):\nmismatch": ("driver", None),
    **{f"nvImageCodec failure: '#{n}'": ("driver", None) for n in (1, 6, 7, 10, 16, 20, 21)},
}  # fmt: skip
WITHOUT_OPERATOR = {
    'Assert on "!params.device_id.has_value() || cuInitChecked()" failed: You are trying to create '
    "a GPU DALI pipeline while CUDA is not available. Please install CUDA": ("driver", None),
    "The pipeline requires a CUDA-capable GPU but the driver is not": ("driver", None),
    "Critical error when building:\nCan't allocate 9 bytes on device 0.": ("memory", None),
}  # fmt: skip


def make_error(message):
    return RuntimeError(CRITICAL.format(message))


@pytest.mark.parametrize(("message", "fault"), FAULTS.items())
def test_errors_are_told_apart(message, fault):
    assert faults.classify_error(make_error(message)) == fault
    assert faults.extract_message(make_error(message)) == message.strip().rstrip(".")


def test_an_allocation_outside_of_an_operator():
    assert faults.classify_error(MemoryError("std::bad_alloc")) == ("memory", None)


@pytest.mark.parametrize(("message", "fault"), WITHOUT_OPERATOR.items())
def test_errors_outside_of_operators(message, fault):
    assert faults.classify_error(RuntimeError(message)) == fault


class Watch:
    """Notes what decoders do; makes them fail where it is told to."""

    def __init__(self, monkeypatch):
        self.notes = []
        self.built = 0
        self.fail = lambda batch: None
        self.fail_to_build = lambda: None
        begun = {}
        build, start, finish = (getattr(dali.Decoder, n) for n in ("__init__", "start", "finish"))

        def watched_build(decoder, options):
            self.built += 1
            if message := self.fail_to_build():
                raise MemoryError(message)
            build(decoder, options)

        def watched_start(decoder, contents):
            begun[decoder] = len(contents), contents[0] is dali._make_warmup_jpeg()
            start(decoder, contents)
            self.notes.append(("start", *begun[decoder]))

        def watched_finish(decoder):
            pixels = finish(decoder)
            self.notes.append(("finish", *begun[decoder]))
            if message := self.fail(len(pixels)):
                raise make_error(message)
            return pixels

        for name, function in (
            ("__init__", watched_build),
            ("start", watched_start),
            ("finish", watched_finish),
        ):
            monkeypatch.setattr(dali.Decoder, name, function)

    def list_runs(self):
        """Return what was begun and finished, and how many pictures it was, but for warming up."""
        return [(what, count) for what, count, warming in self.notes if not warming]


@pytest.fixture
def on_gpu(monkeypatch):
    """A machine with a GPU, as far as readers can see."""
    monkeypatch.setitem(dali.DALI_DEVICES, "gpu", dali.DALI_DEVICES["cpu"])
    monkeypatch.setattr(gpu, "count_gpus", lambda: 1)
    dali.DECODERS.clear()
    yield
    dali.DECODERS.clear()


@pytest.fixture
def watch(on_gpu, monkeypatch):
    return Watch(monkeypatch)


def read(shard, batch_size=10, **options):
    reader = ImageReaderStage(dali_batch_size=batch_size, num_threads=1, **options)
    batches = list(reader.stream(FileGroupTask(data=[shard])))
    return [i for b in batches for i in b.data], [i for b in batches for i in b.failed]


def write_copies(folder, count, broken=(), content=BROKEN):
    """Write pictures that differ, some of them broken."""
    members = [
        (f"{n:03d}.jpg", content if n in broken else encode_picture(draw_picture(n, (64, 48))))
        for n in range(count)
    ]
    return write_shard(folder / "copies.tar", members)


def assert_each_is_itself(good):
    for image in good:
        content = encode_picture(draw_picture(int(image.key), (64, 48)))
        np.testing.assert_array_equal(image.image_data, read_with_pillow(content), image.key)


def list_broken(failed):
    return [int(image.key) for image in failed]


def count_idle():
    return sum(map(len, dali.DECODERS._idle.values()))


def test_each_format_is_decoded_where_it_is_said_to_be(on_gpu, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    members = {
        "a.jpg": JPEG,
        "b.png": encode(PICTURE, "PNG"),
        "c.webp": encode(PICTURE, "WEBP"),
        "d.gif": encode(PICTURE, "GIF"),
        "e.jpg": encode(PICTURE, "JPEG", exif=exif),
        "f.jpg": break_table(JPEG),
        "g.jpg": encode(PICTURE, "JPEG", progressive=True),
        "h.jpg": encode(PICTURE.convert("CMYK"), "JPEG"),
    }
    shard = write_shard(tmp_path / "s.tar", list(members.items()))
    good, failed = read(shard)
    assert {image.key: image.backend for image in good} == {
        "a": "dali-gpu",
        "b": "dali-cpu",
        "c": "pillow",
        "d": "pillow",
        "e": "dali-gpu",
        "g": "dali-gpu",
        "h": "pillow",
    }
    assert [image.key for image in failed] == ["f"]
    for image in good:
        expected = read_with_pillow(members[f"{image.key}.{image.image_path.rpartition('.')[2]}"])
        np.testing.assert_array_equal(image.image_data, expected, image.key)


def test_the_next_batch_is_begun_before_the_last_is_waited_for(watch, photo_shards):
    images, failed = read(photo_shards[0])
    assert (len(images), failed) == (25, [])
    for image in images:
        content = members_of(photo_shards[0])[image.image_path.rpartition("/")[2]]
        np.testing.assert_array_equal(image.image_data, read_with_pillow(content))
    assert watch.list_runs() == [
        ("start", 10),
        ("start", 10),
        ("finish", 10),
        ("start", 5),
        ("finish", 10),
        ("finish", 5),
    ]


def test_every_decoder_begins_with_a_full_batch_and_is_used_again(watch, photo_shards):
    for shard in photo_shards[:3]:
        read(shard, batch_size=17)
    assert watch.built == count_idle() == 2  # one decodes while the other's batch is in use
    warming = [(what, count) for what, count, warming in watch.notes if warming]
    assert warming == [("start", 17), ("finish", 17)] * 2


@pytest.mark.parametrize("broken", [(3,), (0, 9), (2, 3, 4, 8), range(10)])
def test_a_batch_is_decoded_again_without_what_failed(watch, tmp_path, broken):
    good, failed = read(write_copies(tmp_path, 10, broken))
    assert list_broken(failed) == list(broken)
    assert {image.backend for image in good} <= {"dali-gpu"}
    assert_each_is_itself(good)
    sizes = [count for what, count in watch.list_runs() if what == "start"]
    assert sizes == list(range(10, 9 - len(broken), -1))[:10]
    assert count_idle() == (len(broken) < 10)  # none that failed


def test_damage_that_can_be_seen_costs_no_batch(watch, tmp_path):
    """Tables that can't be, and wrong sums: neither reaches DALI."""
    png = encode(PICTURE, "PNG")
    flipped = png[:99] + bytes([png[99] ^ 1]) + png[100:]
    members = [(f"{n}.jpg", JPEG) for n in range(8)]
    scans = encode(PICTURE, "JPEG", progressive=True)
    later = break_table(scans, scans.index(b"\xff\xda"))
    members += [("8.jpg", break_table(JPEG)), ("9.png", flipped), ("10.jpg", later)]
    good, failed = read(write_shard(tmp_path / "s.tar", members), batch_size=11)
    assert (len(good), list_broken(failed)) == (8, [8, 9, 10])
    assert watch.list_runs() == [("start", 8), ("finish", 8)]


def test_where_no_sample_is_named_the_batch_is_halved(on_gpu, monkeypatch, tmp_path):
    finish, runs = dali.Decoder.finish, []

    def finish_without_a_name(decoder):
        try:
            return finish(decoder)
        except RuntimeError:
            raise make_error("nvImageCodec failure: '#3'") from None
        finally:
            runs.append(decoder)

    monkeypatch.setattr(dali.Decoder, "finish", finish_without_a_name)
    good, failed = read(write_copies(tmp_path, 64, (20,)), batch_size=64)
    assert (len(good), list_broken(failed)) == (63, [20])
    assert {image.backend for image in good} == {"dali-gpu"}
    assert_each_is_itself(good)
    assert len(runs) <= 1 + 2 * 6 + 8  # halvings, and each new decoder's first batch


def test_out_of_memory_halves_the_batch(on_gpu, monkeypatch, tmp_path, caplog):
    start = dali.Decoder.start

    def start_few(decoder, contents):
        if len(contents) > 10 and contents[0] is not dali._make_warmup_jpeg():
            raise make_error("Can't allocate 8589934592 bytes on device 0.")
        start(decoder, contents)

    monkeypatch.setattr(dali.Decoder, "start", start_few)
    with caplog.at_level(logging.WARNING, "dask_imgread"):
        good, failed = read(write_copies(tmp_path, 32, (7,)), batch_size=32)
    assert (len(good), list_broken(failed)) == (31, [7])
    assert {image.backend for image in good} == {"dali-gpu"}
    assert_each_is_itself(good)
    assert any("no memory for 32 images at once: Can't allocate" in r for r in caplog.messages)


@pytest.mark.parametrize("where", ["build", "decode"])
def test_out_of_memory_for_a_single_picture(watch, tmp_path, where):
    """Nothing is said to be broken."""
    message = "Can't allocate 8589934592 bytes on device 0."
    if where == "build":
        watch.fail_to_build = lambda: message
    else:
        watch.fail = lambda batch: message
    with pytest.raises(
        RuntimeError, match=r"copies\.tar/000\.jpg: no memory on the GPU for 64 x 48"
    ):
        read(write_copies(tmp_path, 5))
    assert count_idle() == 0


def test_a_driver_that_fails(watch, tmp_path):
    """It is raised as it is, and no picture tried by itself."""
    warmed = []

    def fail(batch):
        warmed.append(batch)
        return "CUDA runtime API error cudaErrorIllegalAddress (700):" if len(warmed) > 1 else None

    watch.fail = fail
    with pytest.raises(RuntimeError, match="cudaErrorIllegalAddress"):
        read(write_copies(tmp_path, 10))
    assert watch.list_runs() == [("start", 10), ("finish", 10)]


def test_a_gpu_that_decodes_nothing(watch, tmp_path):
    """DALI says of each picture that it is broken; so it does of one that is not."""
    watch.fail = lambda batch: "Failed to decode sample #0 : "
    with pytest.raises(dali.DeviceError, match="the GPU does not decode: Failed to decode sample"):
        read(write_copies(tmp_path, 10))


def test_a_reader_that_is_closed_while_a_batch_is_begun(watch, photo_shards, capfd):
    descriptor = _find_descriptor()
    usual, threads = descriptor.value, {*threading.enumerate()}
    batches = ImageReaderStage(dali_batch_size=5).stream(FileGroupTask(data=photo_shards[:1]))
    first = next(batches)
    assert watch.list_runs() == [("start", 5), ("start", 5), ("finish", 5)]
    expected = [image.image_data.copy() for image in first.data]
    batches.close()
    gc.collect()
    assert count_idle() == 1  # the one whose batch was not fetched is gone
    assert descriptor.value == usual
    new = {thread.name for thread in threading.enumerate() if thread not in threads}
    assert new <= {"dask-imgread-buffers"}  # which serves the whole process
    assert len(read(photo_shards[0], batch_size=5)[0]) == 25
    for image, pixels in zip(first.data, expected, strict=True):
        np.testing.assert_array_equal(image.image_data, pixels)


def test_what_is_kept_is_not_dalis_memory(on_gpu, photo_shards):
    """It would not be given back to the system, ever."""
    reader = ImageReaderStage(dali_batch_size=5)
    for batch in reader.process(FileGroupTask(data=photo_shards[:1])):
        for image in batch.data:
            find_owner(image.image_data)


def encode_turned(n, size, orientation=1, codec="JPEG"):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(draw_picture(n, size), codec, **({"exif": exif} if orientation != 1 else {}))


MIXES = {
    "none turned": {f"{n}.jpg": encode_turned(n, (60 + n, 40)) for n in range(12)},
    "some turned": {f"{n}.jpg": encode_turned(n, (60 + n, 40), max(1, n - 3)) for n in range(12)},
    "all turned": {f"{n}.jpg": encode_turned(n, (60 + n, 40), 2 + n % 7) for n in range(12)},
    "some refused": {
        f"{n}.jpg": BROKEN if n % 5 == 1 else encode_turned(n, (60, 40 + n), 1 + n % 8)
        for n in range(12)
    },
    "every format": {
        f"{n}.{codec.lower()}": encode_turned(n, (60 + n, 40), 1 + n % 8, codec)
        for n, codec in enumerate(["JPEG", "PNG", "WEBP", "GIF", "PNG", "JPEG"] * 3)
    },
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("mix", MIXES)
def test_images_are_copied_together(on_gpu, monkeypatch, mix, threads):
    """By few copies, whose ends lie anywhere; into one buffer, which is not DALI's."""
    monkeypatch.setattr(dali, "_MIN_COPY_BYTES", 10_000)
    for resize in (None, 30, (30, 50)):
        options = DecoderOptions("gpu", threads, 20, resize)
        results = decode(MIXES[mix].values(), options)
        owners = set()
        for content, result in zip(MIXES[mix].values(), results, strict=True):
            if content == BROKEN:
                assert result.error.startswith("corrupt")
                continue
            owners.add(id(find_owner(result.pixels)))
            assert result.pixels.flags.c_contiguous
            assert result.pixels.flags.writeable
            if resize is None:
                expected = read_with_pillow(content)
            else:
                (alone,) = decode([content], options._replace(num_threads=1))
                expected = alone.pixels
                assert result.backend == alone.backend
            np.testing.assert_array_equal(result.pixels, expected)
        assert len(owners) == 1


def decode(contents, options):
    headers = [(content, read_header(content)) for content in contents]
    return Decoding(
        [Encoded("a", c, header, choose_backend(c, header, options)) for c, header in headers],
        options,
    ).result()


def find_owner(array):
    while isinstance(array, np.ndarray):
        array = array.base
    assert isinstance(array, _Lease)
    return array


class Scattered:
    """A list of images that do not lie back to back."""

    def __init__(self, images):
        self.images = images

    def shape(self):
        return [image.shape for image in self.images]

    def __iter__(self):
        return iter(self.images)

    def as_reshaped_tensor(self, shape):
        raise RuntimeError("Assert failed: not contiguous")


def test_images_that_do_not_lie_back_to_back(on_gpu, monkeypatch):
    finish = dali.Decoder.finish
    monkeypatch.setattr(
        dali.Decoder, "finish", lambda decoder: Scattered([np.array(i) for i in finish(decoder)])
    )
    contents = MIXES["some turned"].values()
    results = decode(contents, DecoderOptions("gpu", 2, 20))
    for content, result in zip(contents, results, strict=True):
        assert result.backend == "dali-gpu"
        np.testing.assert_array_equal(result.pixels, read_with_pillow(content))


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_no_memory_for_all_images_at_once(on_gpu, monkeypatch, device):
    """Each has memory of its own."""

    def take(size):
        raise MemoryError

    monkeypatch.setattr(BUFFERS, "take", take)
    contents = MIXES["every format"].values()
    results = decode(contents, DecoderOptions(device, 2, 20))
    for content, result in zip(contents, results, strict=True):
        np.testing.assert_array_equal(result.pixels, read_with_pillow(content))


COUNT_FAULTS = """
import resource, sys
from dask_imgread import FileGroupTask, ImageReaderStage
from dask_imgread.cluster import gpu
from dask_imgread.decoding import dali
dali.DALI_DEVICES["gpu"] = dali.DALI_DEVICES["cpu"]
gpu.count_gpus = lambda: 1
reader = ImageReaderStage(dali_batch_size=8, num_threads=1)
for batch in reader.stream(FileGroupTask(data=[sys.argv[1]])):
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    del batch
"""


def test_the_copy_to_the_host_takes_no_fresh_memory(photographs, tmp_path):
    """Under the malloc of Dask's workers; on the CPU nvImageCodec takes it once for itself."""
    content = encode(photographs[0].resize((1200, 900)), "JPEG")
    shard = write_shard(tmp_path / "s.tar", [(f"{n:02d}.jpg", content) for n in range(96)])
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", COUNT_FAULTS, shard]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    counts = np.diff([int(line) for line in done.stdout.split()])
    pages = 8 * 1200 * 900 * 3 // 4096
    print(f"page faults a batch of {pages} pages: {counts.tolist()}")
    assert len(counts) == 11
    assert counts[3:].mean() < 1.3 * pages


def test_arrays_on_the_device_outlive_their_batch(on_gpu, photo_shards):
    members = members_of(photo_shards[0])
    reader = ImageReaderStage(dali_batch_size=5, output="device")
    kept = [i for b in reader.stream(FileGroupTask(data=photo_shards[:1])) for i in b.data]
    dali.DECODERS.clear()
    gc.collect()
    for image in kept:
        assert not isinstance(image.image_data, np.ndarray)
        expected = read_with_pillow(members[image.image_path.rpartition("/")[2]])
        np.testing.assert_array_equal(np.asarray(image.image_data), expected)


def test_readers_side_by_side(on_gpu, photo_shards):
    expected = [[i.image_data for i in read(shard)[0]] for shard in photo_shards]
    with ThreadPoolExecutor(4) as pool:
        for shards in [photo_shards] * 3:
            for (images, failed), pictures in zip(pool.map(read, shards), expected, strict=True):
                assert failed == []
                for image, pixels in zip(images, pictures, strict=True):
                    np.testing.assert_array_equal(image.image_data, pixels)
    assert count_idle() <= 8


def test_no_such_gpu():
    """What DALI itself says, where NVML is wrong or there is none."""
    if gpu.count_gpus():
        pytest.skip("there is one")
    options = dali.DecoderOptions("gpu", 1, 4)
    with pytest.raises(RuntimeError) as raised:
        dali.Decoder(options)
    assert faults.classify_error(raised.value).kind == "driver"
