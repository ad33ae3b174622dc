"""What can only be seen on a GPU. Everything here skips itself where there is none.

``pytest -m gpu`` runs it; ``python -m benchmarks.gpu`` runs it first of all.
"""

import ctypes
import gc
import io
import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from dask_imgread import (
    FileGroupTask,
    ImageReaderStage,
    map_images,
    partition_shards,
    read_bag,
    start_cluster,
)
from dask_imgread.cluster.gpu import count_gpus, query_driver
from dask_imgread.decoding.dali import DECODERS
from dask_imgread.testing import write_shard
from tests.helpers.images import BROKEN, encode, members_of, read_with_pillow, variants
from tests.helpers.odd_headers import SOUND
from tests.helpers.workers import META, WatchedReader, add_up, count_most_at_once

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(count_gpus() == 0, reason="NVML finds no NVIDIA GPU on this machine"),
]

# nvJPEG's inverse transform rounds otherwise than libjpeg-turbo's: the mean over an image of the
# absolute difference, in levels of 0 to 255, and the largest on 99.9 % of the pixels.
MEAN_TOLERANCE, MOST_TOLERANCE = 1.0, 8
NO_DEVICE = 100, 101  # CUDA_ERROR_NO_DEVICE; CUDA_ERROR_INVALID_DEVICE where one is named twice


@pytest.fixture(scope="module")
def gpu_client():
    pytest.importorskip("dask_cuda", reason="dask-cuda is not installed")
    with start_cluster(verbose=False) as cluster, cluster.get_client() as client:
        yield client


def read(members, folder, **options):
    """Return what a reader makes of some members: by name the images, and the failed ones."""
    shard = write_shard(folder / "s.tar", list(members.items()))
    reader = ImageReaderStage(**({"device": "gpu"} | options))
    batches = list(reader.stream(FileGroupTask(data=[shard])))
    good = {i.image_path.rpartition("/")[2]: i for b in batches for i in b.data}
    return good, {i.image_path.rpartition("/")[2]: i for b in batches for i in b.failed}


def fetch(pixels):
    """Return an array of the host, whatever device one is on."""
    if isinstance(pixels, np.ndarray):
        return pixels
    return np.asarray(pixels.as_cpu() if hasattr(pixels, "as_cpu") else pixels)


def find_unlike(images, members):
    """Return what of the images, by name, differs from Pillow's."""
    expected = {name: read_with_pillow(members[name]) for name in images}
    return find_differences(images, expected)


def find_differences(images, expected):
    unlike = {}
    for name, image in images.items():
        pixels, backend = fetch(image.image_data), image.backend
        if pixels.shape != expected[name].shape:
            unlike[name] = backend, pixels.shape, expected[name].shape
            continue
        difference = np.abs(pixels.astype(int) - expected[name])
        mean, most = difference.mean(), np.quantile(difference, 0.999)
        tolerated = (MEAN_TOLERANCE, MOST_TOLERANCE) if backend == "dali-gpu" else (0, 0)
        print(f"{name}: {backend} {mean:.3f}, {most:.0f}")
        if mean > tolerated[0] or most > tolerated[1]:
            unlike[name] = backend, mean, most
    return unlike


def test_photographs(photo_shards, tmp_path):
    members = {n: c for n, c in members_of(photo_shards[0]).items() if n.endswith("jpg")}
    good, failed = read(members, tmp_path)
    assert (len(good), failed) == (25, {})
    assert {image.backend for image in good.values()} == {"dali-gpu"}
    assert all(isinstance(image.image_data, np.ndarray) for image in good.values())
    assert find_unlike(good, members) == {}


def test_every_format(tmp_path):
    members = dict(variants())
    good, failed = read(members, tmp_path, dali_batch_size=40)
    assert failed == {}
    assert find_unlike(good, members) == {}
    backends = {
        name: {i.backend for i in good.values() if i.format == name}
        for name in ("jpeg", "png", "webp")
    }
    assert backends["jpeg"] == {"dali-gpu", "libjpeg-turbo", "pillow"}
    assert backends["png"] == {"dali-cpu", "pillow"}
    assert backends["webp"] == {"pillow"}


def test_every_sampling(photographs, tmp_path):
    """Which of the JPEG engines and multiprocessors decodes what is nvJPEG's secret: all sizes."""
    members = {}
    for number, photo in enumerate(photographs):
        for side in (33, 160, 400):
            pixels = np.array(photo.resize((side, side * 2 // 3 + 1)))
            for sampling in ("444", "422", "420", "440", "411", "Gray"):
                source = pixels if sampling != "Gray" else pixels[..., :1]
                members[f"{number}-{side}-{sampling}.jpg"] = simplejpeg.encode_jpeg(
                    np.ascontiguousarray(source), 88, "RGB" if sampling != "Gray" else "GRAY",
                    sampling,
                )  # fmt: skip
    good, failed = read(members, tmp_path)
    assert failed == {}
    assert {image.backend for image in good.values()} == {"dali-gpu"}
    assert find_unlike(good, members) == {}


def test_odd_headers(tmp_path):
    members = {name: content for name, content in SOUND.items() if name.endswith("jpg")}
    good, failed = read(members, tmp_path)
    assert failed == {}
    assert find_unlike(good, members) == {}


@pytest.mark.parametrize("output", ["host", "device"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(photographs, tmp_path, orientation, output):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = photographs[0].resize((320, 200))
    members = {
        f"a.{e}": encode(picture, c, exif=exif) for e, c in (("jpg", "JPEG"), ("png", "PNG"))
    }
    good, _ = read(members, tmp_path, output=output)
    assert find_unlike(good, members) == {}
    on_gpu = output == "host" or orientation == 1
    assert good["a.jpg"].backend == ("dali-gpu" if on_gpu else "pillow")


def test_rgb_without_ycbcr(photographs, tmp_path):
    members = {
        f"{n}.jpg": encode(photo.crop((0, 0, 300, 250)), "JPEG", keep_rgb=True)
        for n, photo in enumerate(photographs)
    }
    good, failed = read(members, tmp_path)
    assert failed == {}
    assert find_unlike(good, members) == {}


@pytest.mark.parametrize(
    "options",
    [
        {"resize": 100},
        {"resize": (96, 128)},
        {"min_side": 20},
        {"resize": 96, "fit": "crop", "resample": "bicubic"},
        {"resize": (60, 90), "fit": "crop", "resample": "lanczos"},
    ],
)
def test_resize(photo_shards, tmp_path, options):
    """As DALI does it on a CPU."""
    members = {n: c for n, c in members_of(photo_shards[0]).items() if n.endswith("jpg")}
    good, _ = read(members, tmp_path, **options)
    expected, _ = read(members, tmp_path, **options, device="cpu", decoder="dali")
    assert find_differences(good, {n: i.image_data for n, i in expected.items()}) == {}


def test_arrays_on_the_device_outlive_their_batch_and_its_decoder(photo_shards, tmp_path):
    members = {
        f"{n}-{name}": content
        for n, shard in enumerate(photo_shards)
        for name, content in members_of(shard).items()
        if name.endswith("jpg")
    }
    good, _ = read(members, tmp_path, output="device", dali_batch_size=7)
    DECODERS.clear()
    gc.collect()
    read(members, tmp_path, dali_batch_size=7)  # whose memory might have been theirs
    for image in good.values():
        assert image.image_data.__cuda_array_interface__["shape"][2] == 3
    assert find_unlike(good, members) == {}


def test_readers_side_by_side(photo_shards):
    reader = ImageReaderStage(device="gpu", dali_batch_size=10)
    tasks = partition_shards(photo_shards) * 4
    expected = {i.image_id: i.image_data for t in tasks[:4] for b in reader(t) for i in b.data}
    with ThreadPoolExecutor(4) as pool:
        for batches in pool.map(reader, tasks):
            for image in (image for batch in batches for image in batch.data):
                np.testing.assert_array_equal(image.image_data, expected[image.image_id])


def test_damaged_scans_fail_as_on_the_cpu(photo_shards, tmp_path):
    jpegs = [c for s in photo_shards for n, c in members_of(s).items() if n.endswith("jpg")]
    rng = np.random.default_rng(5)
    members = {}
    for number in range(200):
        content = bytearray(jpegs[number % len(jpegs)])
        scan = content.index(b"\xff\xda") + 12
        for place in rng.integers(scan, len(content) - 2, 3):
            content[place] ^= 1 << int(rng.integers(8))
        members[f"{number:03d}.jpg"] = bytes(content)
    good, failed = read(members, tmp_path)
    expected, refused = read(members, tmp_path, device="cpu", decoder="dali")
    assert set(failed) == set(refused)
    assert {n: i.image_data.shape for n, i in good.items()} == {
        n: i.image_data.shape for n, i in expected.items()
    }


def test_one_bad_image_costs_one_image(tmp_path, photo_shards):

    members = {n: c for n, c in members_of(photo_shards[0]).items() if n.endswith("jpg")}
    good, failed = read({"bad.jpg": BROKEN} | members, tmp_path)
    assert (len(good), list(failed)) == (25, ["bad.jpg"])


def test_batches_are_cut_to_their_decoded_size(tmp_path):
    """Ten pictures of 100 megapixels in a row: 3 GB decoded, in batches of at most 600 MB."""
    buffer = io.BytesIO()
    Image.new("RGB", (10_000, 10_000), (90, 120, 30)).save(buffer, "JPEG")
    shard = write_shard(tmp_path / "s.tar", [(f"{n}.jpg", buffer.getvalue()) for n in range(10)])
    reader = ImageReaderStage(device="gpu", max_batch_bytes=600_000_000)
    counts = [batch.num_items for batch in reader.stream(FileGroupTask(data=[shard]))]
    assert counts == [2] * 5


class Cuda:
    """As much of CUDA's driver as can be had without a package for it."""

    def __init__(self):
        self._lib = ctypes.CDLL("libcuda.so.1")

    def _call(self, name, *arguments):
        status = getattr(self._lib, name)(*arguments)
        assert status == 0, (name, status)

    def count_devices(self):
        """Count them; where none is visible CUDA does not even start."""
        count = ctypes.c_int()
        status = self._lib.cuInit(0)
        if status not in NO_DEVICE:
            assert status == 0, status
            self._call("cuDeviceGetCount", ctypes.byref(count))
        return count.value

    def take_all_but(self, left):
        """Allocate on the first GPU what is free but for so many bytes."""
        self._call("cuInit", 0)
        context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self._call("cuCtxSetCurrent", context)
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        memory = ctypes.c_uint64()
        size = ctypes.c_size_t(free.value - left)
        self._call("cuMemAlloc_v2", ctypes.byref(memory), size)
        return lambda: self._call("cuMemFree_v2", memory)


def run_child(function, *arguments, **environment):
    """Run a function of this file in a process of its own; return what it returned."""
    code = f"""
import json, sys
from tests.integration import test_gpu
print(json.dumps(test_gpu.{function}(*sys.argv[1:])))"""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={k: v for k, v in (os.environ | environment).items() if v is not None},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def read_with_little_memory(shard, left):
    """Return how many are read and how many fail, or the error; how many later; and the log."""
    from nvidia.dali.backend import ReleaseUnusedMemory

    log = io.StringIO()
    logging.getLogger("dask_imgread").addHandler(logging.StreamHandler(log))
    reader = ImageReaderStage(device="gpu", num_threads=2)
    task = FileGroupTask(data=[shard])
    next(reader.stream(task))  # what CUDA and nvJPEG take for themselves
    DECODERS.clear()
    gc.collect()
    ReleaseUnusedMemory()
    free = Cuda().take_all_but(int(left))
    try:
        answer = [[b.num_items, len(b.failed)] for b in reader.stream(task)]
    except RuntimeError as error:
        answer = str(error)
    free()
    return answer, sum(batch.num_items for batch in reader.stream(task)), log.getvalue()


def test_a_batch_that_finds_no_memory_is_halved(photographs, tmp_path):
    content = encode(photographs[0].resize((3000, 2000)), "JPEG")
    shard = write_shard(tmp_path / "s.tar", [(f"{n}.jpg", content) for n in range(28)])
    answer, afterwards, log = run_child("read_with_little_memory", shard, 200_000_000)
    assert (answer, afterwards) == ([[14, 0]] * 2, 28)
    assert "DALI has no memory for 14 images at once" in log


def test_a_picture_that_finds_no_memory_is_not_said_to_be_broken(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (10_000, 10_000), (90, 120, 30)).save(buffer, "JPEG")
    shard = write_shard(tmp_path / "s.tar", [(f"{n}.jpg", buffer.getvalue()) for n in range(2)])
    answer, afterwards, _ = run_child("read_with_little_memory", shard, 200_000_000)
    assert "0.jpg: no memory on the GPU for 10000 x 10000 pixels" in answer
    assert afterwards == 2


def count_both_ways():
    return count_gpus(), Cuda().count_devices()


def list_visible():
    first, *others = query_driver().uuids or [""]
    named = ",".join([first, *others])
    return [
        None, "", "-1", "0", "0,0", "0,foo", "foo", "NoDevFiles", "0,,0", " 0 ", "+0", "0abc",
        "0,99", "0,-1,0", first, first[:10], f"{first},{first}", f"0,{first}", named, "GPU-0",
        "MIG-",
    ]  # fmt: skip


@pytest.mark.parametrize("visible", list_visible())
def test_gpus_are_counted_as_cuda_counts_them(visible):
    """On a GPU that is divided into MIG instances their names too."""
    ours, cudas = run_child("count_both_ways", CUDA_VISIBLE_DEVICES=visible)
    assert ours == cudas


def test_each_worker_has_its_gpu(gpu_client, photo_shards):
    assert len(gpu_client.scheduler_info(n_workers=-1)["workers"]) == count_gpus()
    visible = gpu_client.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"].split(",")[0])
    assert len(set(visible.values())) == count_gpus()
    reader = ImageReaderStage(num_gpus_per_worker=0.25)
    annotations = reader.annotations(gpu_client)
    assert annotations == {"resources": {"GPU": 0.25}}
    tasks = partition_shards(photo_shards, images_per_partition=5)
    results = gpu_client.gather(gpu_client.map(reader, tasks, **annotations))
    images = [image for batches in results for batch in batches for image in batch.data]
    assert len(images) == 100
    assert {image.backend for image in images} == {"dali-gpu"}


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_shares_hold_and_readers_work_side_by_side(gpu_client, photo_shards, tmp_path, share):
    reader = WatchedReader(num_gpus_per_worker=share, notes=str(tmp_path))
    tasks = partition_shards(photo_shards, images_per_partition=5)
    frame = map_images(add_up, tasks, reader=reader, meta=META)
    assert len(frame.compute()) == 100
    assert count_most_at_once(tmp_path) <= int(1 / share)


@pytest.mark.slow
def test_what_does_not_fit_is_spilled(photographs, tmp_path):
    """3.9 GB of pixels kept on a worker of 3 GB, of which CUDA and DALI take one for themselves."""
    pytest.importorskip("dask_cuda", reason="dask-cuda is not installed")
    contents = [encode(photo.resize((1500, 1000)), "JPEG") for photo in photographs]
    shards = [
        write_shard(tmp_path / f"{s}.tar", [(f"{n}.jpg", contents[n % 7]) for n in range(36)])
        for s in range(24)
    ]
    with (
        start_cluster(n_workers=1, memory_limit="3GB", verbose=False) as cluster,
        cluster.get_client() as client,
    ):
        process = client.run(os.getpid)
        bag = read_bag(partition_shards(shards, images_per_partition=9)).persist()
        sums = bag.map(lambda batch: [int(i.image_data.sum()) for i in batch.data]).compute()
        assert client.run(os.getpid) == process  # which was not killed for its memory
    assert sum(map(len, sums)) == 24 * 36
    assert len(set(map(tuple, sums))) == 4
