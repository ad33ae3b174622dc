"""Real photographs in real shards, and a real cluster of worker processes."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dask_imgread import ImageReaderStage, partition_shards
from dask_imgread.tasks import make_frame
from dask_imgread.testing import write_shard
from tests.helpers.images import encode
from tests.helpers.leaks import check_leaks, list_open, start_what_stays

pytest_plugins = ["pytester"]


@pytest.fixture(scope="session", autouse=True)
def environment_of_clients(tmp_path_factory):
    """Keep the Hugging Face Hub's client, here and in workers, from this machine's token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        patch.delenv("HF_TOKEN", raising=False)
        # gcsfs would ask for a bucket's kind by gRPC, which the tests' server does not speak.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        yield


@pytest.fixture(scope="session")
def photographs():
    """RGB photographs of several sizes, from scikit-image's and scikit-learn's wheels."""
    import skimage
    import sklearn.datasets

    data = Path(skimage.__file__).parent / "data"
    names = ["astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png"]
    paths = [data / name for name in names]
    paths += [
        Path(sklearn.datasets.__file__).parent / "images" / n for n in ("china.jpg", "flower.jpg")
    ]
    return [Image.open(path).convert("RGB") for path in paths]


@pytest.fixture(scope="session")
def photo_shards(photographs, tmp_path_factory):
    """Four shards of 25 photograph crops as JPEG, with sidecars."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(7)
    paths = []
    for shard in range(4):
        members = []
        for number in range(25):
            photo = photographs[(shard * 25 + number) % len(photographs)]
            left, top = rng.integers(0, 60, 2)
            width, height = rng.integers(60, 240, 2)
            crop = photo.crop((left, top, left + width, top + height))
            key = f"{shard}{number:03d}"
            members += [
                (f"{key}.jpg", encode(crop, "JPEG", quality=88)),
                (f"{key}.cls", b"%d" % number),
            ]
        paths.append(write_shard(folder / f"photos-{shard:02d}.tar", members))
    return paths


@pytest.fixture(scope="module")
def images(photo_shards):
    """All images of `photo_shards` by id, in order."""
    reader = ImageReaderStage(device="cpu", verbose=False, sidecars=False)
    batches = [batch for task in partition_shards(photo_shards) for batch in reader.stream(task)]
    return {image.image_id: image for batch in batches for image in batch.data}


@pytest.fixture
def frame(images):
    return make_frame(images.values())


@pytest.fixture(scope="session", autouse=True)
def what_stays():
    start_what_stays()


@pytest.fixture(autouse=True)
def no_leaks(what_stays):
    """Fail a test that leaves descriptors, threads or children behind."""
    before = list_open()
    yield
    check_leaks(before)


@pytest.fixture(autouse=True)
def restore_logging():
    """Leave no handler behind: it writes to a stderr that pytest has closed by the next test."""
    loggers = [logging.getLogger(name) for name in (None, "dask_imgread")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


@pytest.fixture(scope="session")
def forked_workers():
    """Fork workers, from now on, from a process that has imported what they need."""
    import dask

    from tests.helpers.commands import start_server

    start_server()
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        yield


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """A folder with this environment's programs, which start at once."""
    from tests.helpers.programs import write_programs

    with write_programs(tmp_path_factory.mktemp("programs")) as folder:
        yield folder


@pytest.fixture
def short_pauses(monkeypatch):
    """Retry requests at once."""
    monkeypatch.setattr("dask_imgread.storage.retries.FIRST_PAUSE", 0.01)


@pytest.fixture(scope="session")
def imgread_cluster(forked_workers, imgread_cluster):
    return imgread_cluster


@pytest.fixture(scope="session")
def imgread_gpu_cluster(forked_workers, imgread_gpu_cluster):
    return imgread_gpu_cluster


@pytest.fixture
def client(imgread_client):
    return imgread_client


def pytest_collection_modifyitems(items):
    """Begin with the files that take long: one that begins last leaves the other process idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


FUZZED = {}


def count_fuzz_inputs(name, tried):
    FUZZED[name] = tried


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several processes
        session.config.workeroutput["fuzzed"] = FUZZED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    FUZZED.update(getattr(node, "workeroutput", {}).get("fuzzed", {}))


def pytest_terminal_summary(terminalreporter):
    for name, tried in FUZZED.items():
        terminalreporter.write_line(f"fuzzed the {name}: {tried} inputs, all accounted for")
