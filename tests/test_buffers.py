"""Memory is used again, and never while anybody can still see what lies in it."""

import gc
import io
import os
import pickle
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe

import numpy as np
import pytest
from dask.sizeof import sizeof
from distributed import Client, LocalCluster
from distributed.protocol import deserialize, serialize
from PIL import Image

from dask_imgread import FileGroupTask, ImageReaderStage, partition_shards
from dask_imgread.buffers import BUFFERS, BufferPool, count_bytes_held
from dask_imgread.testing import draw_picture, encode_picture, write_shard
from tests.helpers.images import both_decoders, members_of, read_with_pillow

MB = 1 << 20


@pytest.fixture
def pool():
    return BufferPool(idle_bytes=64 * MB, idle_seconds=60)


def address(array):
    return array.__array_interface__["data"][0]


# The pool


def test_memory_is_used_again_once_nobody_holds_it(pool):
    first = pool.take(10 * MB)
    place = address(first)
    assert address(pool.take(10 * MB)) != place
    view = first[5:][::2]
    del first
    assert address(pool.take(10 * MB)) != place
    del view
    assert address(pool.take(10 * MB)) == place


HOLDERS = {
    "array": lambda a: a,
    "view of a view": lambda a: a[10:][::3].reshape(-1, 1).T,
    "memoryview": memoryview,
    "part of a memoryview": lambda a: memoryview(a).cast("B")[7:900],
    "other dtype": lambda a: a[:800].view("u4"),
    "pickle in flight": lambda a: [pickle.PickleBuffer(a)],
    "frames of Dask": lambda a: serialize(a)[1],
    "Pillow image": lambda a: Image.frombuffer("L", (30, 30), a[:900], "raw", "L", 0, 1),
    "memoryview in a closure": lambda a: (lambda m: lambda: m[0])(memoryview(a)),
    "cycle": lambda a: (lambda c: c.append(c) or c)([a]),
    "iterator": lambda a: iter(a[:900]),
    "ctypes": lambda a: a.ctypes,
    "array interface": lambda a: np.asarray(Interface(a)),
    "dlpack": lambda a: np.from_dlpack(a),
}


class Interface:
    def __init__(self, array):
        self.array = array
        self.__array_interface__ = array.__array_interface__


@pytest.mark.parametrize("kind", HOLDERS)
def test_whatever_is_held_keeps_the_memory(pool, kind):
    array = pool.take(4 * MB)
    place = address(array)
    array[:] = 7
    held = HOLDERS[kind](array)
    del array
    for _ in range(3):
        other = pool.take(4 * MB)
        assert address(other) != place
        other[:] = 0
        del other
    del held
    if kind == "cycle":
        gc.collect()
    taken = [pool.take(4 * MB) for _ in range(3)]
    assert place in map(address, taken), "it comes back when the holder is gone"


def test_memory_that_comes_back_in_the_middle_of_taking_some():
    """The garbage collector may run anywhere, also where the pool's lock is held."""

    class Collecting(BufferPool):
        def _find(self, size):
            gc.collect()
            return super()._find(size)

    pool = Collecting()
    cycle = [pool.take(MB)]
    cycle.append(cycle)
    del cycle
    ended = threading.Event()
    threading.Thread(target=lambda: (pool.take(MB), ended.set()), daemon=True).start()
    assert ended.wait(10), "it waits for itself"
    assert pool.idle_bytes > 0


def test_idle_memory_is_bounded(pool):
    arrays = [pool.take(20 * MB) for _ in range(6)]
    del arrays
    assert not pool._returned, "not only when more is asked for"
    assert 40 * MB < sum(memory.nbytes for _, memory in pool._idle) <= 64 * MB
    pool.clear()
    assert pool.idle_bytes == 0


def test_a_forked_process_begins_anew(pool):
    held = pool.take(MB)
    held[:] = 7
    pool.take(2 * MB)
    child = os.fork()
    if not child:
        pool._reset_after_fork()  # as BUFFERS does by itself
        other = pool.take(MB)
        other[:] = 1
        os._exit(0 if (held == 7).all() and pool._sweeping else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (held == 7).all()


def test_little_is_not_kept_in_much(pool):
    large = address(pool.take(40 * MB))
    assert address(pool.take(1 * MB)) != large
    assert address(pool.take(30 * MB)) == large


def test_idle_memory_is_given_back_after_a_while():
    pool = BufferPool(idle_bytes=64 * MB, idle_seconds=0.2)
    held = pool.take(8 * MB)
    pool.take(9 * MB)
    time.sleep(0.05)
    assert pool.idle_bytes > 8 * MB
    time.sleep(0.8)
    assert pool.idle_bytes == 0
    del held  # nobody looks after it any more
    assert pool.idle_bytes == 0
    pool.take(8 * MB)
    assert pool.idle_bytes > 8 * MB, "and all over again"


def test_many_threads_see_only_their_own(pool):
    rng = random.Random(3)
    seeds = [rng.random() for _ in range(8)]

    def work(seed):
        rng = random.Random(seed)
        held = []
        for _ in range(400):
            mark = rng.randrange(256)
            array = pool.take(rng.randrange(1, 200_000))
            array[:] = mark
            held.append((array[rng.randrange(len(array)) :][:50], mark))
            if len(held) > 5:
                del held[rng.randrange(len(held))]
            assert all((view == mark).all() for view, mark in held)
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, seeds))


# What a reader gives


@pytest.fixture(scope="module")
def mixed_shard(tmp_path_factory):
    """Pictures for every decoder, in sizes that change from batch to batch."""
    rng = random.Random(5)
    members = []
    for n in range(60):
        size = rng.randrange(20, 200), rng.randrange(20, 200)
        extension = ["jpg", "jpg", "png", "webp", "gif", "bmp"][n % 6]
        members.append((f"{n:03d}.{extension}", encode_picture(draw_picture(n, size), extension)))
    return write_shard(tmp_path_factory.mktemp("mixed") / "s.tar", members)


def hold_array(pixels):
    return lambda: pixels


def hold_memoryview(pixels):
    view = memoryview(pixels)
    return lambda: np.asarray(view)


def hold_frames(pixels):
    header, frames = serialize(pixels)
    return lambda: deserialize(header, frames)


def hold_pickle(pixels):
    buffers = []
    content = pickle.dumps(pixels, protocol=5, buffer_callback=buffers.append)
    return lambda: pickle.loads(content, buffers=buffers)


def hold_in_a_thread(pixels):
    asked, answer = threading.Event(), []

    def work():
        asked.wait()
        answer.append(pixels.copy())

    thread = threading.Thread(target=work)
    thread.start()

    def get():
        asked.set()
        thread.join()
        return answer[0]

    return get


@both_decoders
def test_what_is_held_never_changes(mixed_shard, decoder):
    """Held in every way, of every batch, while later batches are decoded and the reader goes."""
    expected = {n: read_with_pillow(c) for n, c in members_of(mixed_shard).items()}
    ways = [hold_array, hold_memoryview, hold_frames, hold_pickle, hold_in_a_thread]
    reader = ImageReaderStage(device="cpu", dali_batch_size=7, decoder=decoder)
    stream = reader.stream(FileGroupTask(data=[mixed_shard]))
    held = []
    for batch in stream:
        for image in batch.data:
            right = expected[image.image_path.rpartition("/")[2]]
            pixels = image.image_data
            assert pixels.flags.writeable
            hold = ways[len(held) % len(ways)]
            held += [(hold(pixels), right), (hold_array(pixels[::2][:, 3:]), right[::2][:, 3:])]
        del batch, image, pixels
    del reader, stream
    list(ImageReaderStage(device="cpu", decoder=decoder).stream(FileGroupTask(data=[mixed_shard])))
    assert len(held) == 2 * len(expected)
    for get, right in held:
        np.testing.assert_array_equal(get(), right)


def test_writing_to_one_image_changes_no_other(mixed_shard):
    (batch,) = ImageReaderStage(device="cpu").process(FileGroupTask(data=[mixed_shard]))
    before = [image.image_data.copy() for image in batch.data]
    for number, image in enumerate(batch.data):
        image.image_data[:] = 255 - image.image_data
        for other, pixels in zip(batch.data[number + 1 :], before[number + 1 :], strict=True):
            np.testing.assert_array_equal(other.image_data, pixels)


def test_a_stream_turns_over_two_pieces_of_memory(mixed_shard):
    shard = write_shard(mixed_shard + "-one.tar", [(f"{n}.jpg", JPEG) for n in range(60)])
    reader = ImageReaderStage(device="cpu", dali_batch_size=10)
    places = [
        address(batch.data[0].image_data) for batch in reader.stream(FileGroupTask(data=[shard]))
    ]
    assert len(places) == 6
    assert len(set(places)) == 2


def test_failures_keep_no_memory(mixed_shard, tmp_path):
    """The traceback of an error holds the frames that it came from, and what lies in them."""
    broken = JPEG[: len(JPEG) // 2]
    members = [(f"{n}.jpg", broken if n % 3 == 0 else JPEG) for n in range(60)]
    shard = write_shard(tmp_path / "s.tar", members)
    reader = ImageReaderStage(device="cpu", dali_batch_size=10)
    gc.disable()
    try:
        stream = reader.stream(FileGroupTask(data=[shard]))
        places = {address(batch.data[0].image_data.base) for batch in stream}
    finally:
        gc.enable()
    assert len(places) == 2


JPEG = encode_picture(draw_picture(1, (400, 300)))


def test_sizeof_is_what_a_batch_keeps_in_memory(mixed_shard):
    (batch,) = ImageReaderStage(device="cpu").process(FileGroupTask(data=[mixed_shard]))
    pixels = sum(image.image_data.nbytes for image in batch.data)
    assert pixels < sizeof(batch) < 1.2 * pixels
    del batch.data[1:]  # what is left keeps the memory of all
    assert pixels < sizeof(batch) < 1.2 * pixels
    batch.data[0].image_data = batch.data[0].image_data.copy()
    assert sizeof(batch) < 2000 + batch.data[0].image_data.nbytes


def test_bytes_held_are_counted_once():
    whole = np.zeros(1000, np.uint8)
    assert count_bytes_held([whole[:10], whole[5:][::2], whole]) == 1000
    assert count_bytes_held([np.zeros(3, "u4"), whole[:1]]) == 1012
    assert count_bytes_held([]) == 0


def test_memory_goes_when_a_worker_closes(photo_shards):
    BUFFERS.clear()
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        tasks = partition_shards(photo_shards, images_per_partition=5)
        client.gather(client.map(lambda t: len(ImageReaderStage()(t)), tasks))
        assert BUFFERS.idle_bytes > 0
    assert BUFFERS.idle_bytes == 0


PEAK = """
import sys
from pathlib import Path
from dask_imgread import FileGroupTask, ImageReaderStage

def read_peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

task = FileGroupTask(data=[sys.argv[1]])
reader = ImageReaderStage(device="cpu", verbose=False, max_batch_bytes=int(sys.argv[2]))
next(ImageReaderStage(device="cpu", verbose=False, decode=False).stream(task))
before, largest = read_peak(), 0
for batch in reader.stream(task):
    largest = max(largest, sum(image.image_data.nbytes for image in batch.data))
print((read_peak() - before) / largest)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "images", "budget"), [((8000, 6250), 5, 256 * MB), ((1000, 800), 150, 60 * MB)]
)
def test_a_stream_has_three_batches_in_memory_at_most(tmp_path, size, images, budget):
    """Also of pictures of 50 megapixels, of which one is a batch."""
    buffer = io.BytesIO()
    draw_picture(2, (800, 625)).resize(size, Image.Resampling.NEAREST).save(
        buffer, "JPEG", quality=60
    )
    shard = write_shard(
        tmp_path / "s.tar", [(f"{n}.jpg", buffer.getvalue()) for n in range(images)]
    )
    command = [sys.executable, "-c", PEAK, shard, str(budget)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(f"{float(done.stdout):.2f} batches")
    assert float(done.stdout) < 3


def test_pixels_go_through_a_pipe_while_others_are_decoded(mixed_shard):
    """A pickle in flight: what arrives is what was decoded."""
    expected = [read_with_pillow(c) for c in members_of(mixed_shard).values()]
    ours, theirs = Pipe()
    received = []

    def receive():
        while (item := theirs.recv()) is not None:
            received.append(item)

    thread = threading.Thread(target=receive)
    thread.start()
    reader = ImageReaderStage(device="cpu", dali_batch_size=3)
    for batch in reader.stream(FileGroupTask(data=[mixed_shard])):
        ours.send(batch)
    ours.send(None)
    thread.join()
    images = [image for batch in received for image in batch.data]
    for image, right in zip(images, expected, strict=True):
        np.testing.assert_array_equal(image.image_data, right)
