"""The reader in the place of NeMo Curator's: with stand-ins, and with nemo_curator if it is there.

The real one needs torch, Ray and more, too much for the extra `test`: run these tests once more
where `pip install "nemo-curator[image-cpu]"` was done.
"""

import importlib.util
import inspect
import pickle
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import dask_imgread
from dask_imgread import FileGroupTask, ImageBatch, ImageObject, ImageReaderStage, read_bag
from dask_imgread.testing import make_shards
from tests.helpers import curator as stand_ins

ADAPTER = "dask_imgread.nemo_curator"
SHAPE = (96, 128, 3)

pytestmark = pytest.mark.filterwarnings("default")  # nemo_curator and what it imports give some


REAL = importlib.util.find_spec("nemo_curator") is not None


@pytest.fixture(params=["stand-ins", "nemo_curator"] if REAL else ["stand-ins"])
def curator(request, monkeypatch):
    """Everything of nemo_curator that is used here, by name."""
    if request.param == "stand-ins":
        stand_ins.install(monkeypatch)
    monkeypatch.setitem(sys.modules, ADAPTER, None)
    del sys.modules[ADAPTER]  # it is bound to the classes with which it was imported
    modules = {name: importlib.import_module(name) for name in [*stand_ins.MODULES, ADAPTER]}
    names = {name: value for module in modules.values() for name, value in vars(module).items()}
    reader = modules["nemo_curator.stages.image.io.image_reader"].ImageReaderStage
    stage = modules[ADAPTER].ImageReaderStage
    return SimpleNamespace(**names | {"ImageReaderStage": reader, "stage": stage})


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path / "shards", shards=2, images_per_shard=5, broken=1)


@pytest.fixture
def task(curator, shards):
    task = curator.FileGroupTask(
        dataset_name="pictures", data=shards, _metadata={"source_files": shards}
    )
    task._set_task_id("0", "abc")
    task.add_stage_perf(SimpleNamespace(stage_name="file_partitioning"))
    return task


class Model:
    """Gives a number for each picture or vector, as a tensor does."""

    def __init__(self, fn):
        self.fn = fn

    def __call__(self, inputs):
        self.result = np.array([self.fn(one) for one in inputs], np.float32)
        return self

    def cpu(self):
        return self

    def numpy(self):
        return self.result


def make_stage(stage, fn):
    stage.model = Model(fn)  # what its setup() would load weights for
    return stage


def list_values(kind):
    parameters = inspect.signature(kind.__init__).parameters.values()
    return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]


def test_the_constructor_is_the_same(curator):
    given = (7, False, 3, 0.5, "other")
    theirs = curator.ImageReaderStage(*given)
    for kind in (ImageReaderStage, curator.stage):
        assert list_values(kind) == list_values(curator.ImageReaderStage)
        ours = kind(*given)
        for name, _ in list_values(kind):
            assert getattr(ours, name) == getattr(theirs, name)
        assert ours.inputs() == theirs.inputs()
        assert ours.outputs() == theirs.outputs()
        for name in ("cpus", "gpus", "requires_gpu"):
            assert getattr(ours.resources, name) == getattr(theirs.resources, name)


@pytest.mark.parametrize("kind", [FileGroupTask, ImageBatch, ImageObject])
def test_the_attributes_have_the_same_names(curator, kind):
    """`_source_id` is the executor's own, which it sets on its own tasks."""
    theirs = {field.name for field in fields(getattr(curator, kind.__name__))} - {"_source_id"}
    assert {name for name in {*theirs, "num_items"} if not hasattr(kind(), name)} == (
        {"num_items"} if kind is ImageObject else set()
    )
    kind().anything = 1  # of a user's own stage


def test_a_task_is_taken_as_it_is(curator, task, shards):
    reader = ImageReaderStage(dali_batch_size=3, device="cpu")
    batches = reader.process(task)
    assert [batch.num_items for batch in batches] == [3, 2, 2, 2]
    assert {batch.dataset_name for batch in batches} == {"pictures"}
    assert [batch.task_id for batch in batches] == [f"0_abc_{n}" for n in range(4)]
    assert all(batch._metadata == {"source_files": shards} for batch in batches)
    assert all(batch._stage_perf == task._stage_perf for batch in batches)
    batches[0]._stage_perf.append(1)
    batches[0]._metadata["more"] = 1
    assert len(task._stage_perf) == len(batches[1]._stage_perf) == 1
    assert list(task._metadata) == list(batches[1]._metadata) == ["source_files"]

    plain = FileGroupTask(data=shards)
    ids = [image.image_id for batch in reader.process(plain) for image in batch]
    for given in (task, [task]):
        bag = read_bag(given, reader=reader).compute(scheduler="sync")
        assert [image.image_id for batch in bag for image in batch] == ids


def test_a_task_of_an_array(curator, task, shards):
    task.data = np.array(shards)
    assert sum(batch.num_items for batch in ImageReaderStage(device="cpu").process(task)) == 9


def test_a_task_without_shards(curator):
    for kind in (ImageReaderStage, curator.stage):
        with pytest.raises(ValueError, match="No tar file paths in task"):
            kind(device="cpu").process(curator.FileGroupTask(dataset_name="", data=[]))


def test_what_a_key_is_made_from(curator, task, shards):
    def name(**metadata):
        task._metadata = metadata
        return read_bag(task).name

    assert name(part=1) == name(part=1) != name(part=2)


@pytest.mark.parametrize("in_pipeline", [False, True])
def test_the_next_stages_take_the_batches(curator, task, tmp_path, in_pipeline):
    kind = curator.stage if in_pipeline else ImageReaderStage
    batches = kind(device="cpu", dali_batch_size=10).process(task)
    assert [batch.num_items for batch in batches] == [5, 4]
    first = batches[0].data[0].image_id
    (tmp_path / "removed").mkdir()
    pd.DataFrame({"id": [first]}).to_parquet(tmp_path / "removed" / "ids.parquet")

    removal = curator.ImageDuplicatesRemovalStage(str(tmp_path / "removed"))
    removal.setup()
    stages = [
        make_stage(curator.ImageEmbeddingStage(), lambda pixels: [pixels.mean(), *pixels.shape]),
        make_stage(curator.ImageAestheticFilterStage(score_threshold=0.5), lambda vector: 1),
        make_stage(curator.ImageNSFWFilterStage(score_threshold=0.5), lambda vector: 0),
        removal,
    ]
    batch = batches[0]
    for stage in stages:
        batch = stage.process(batch)
    assert first not in [image.image_id for image in batch.data]
    assert len(batch.data) == 4
    for image in batch.data:
        assert image.embedding.tolist()[1:] == list(SHAPE)
        assert (image.aesthetic_score, image.nsfw_score) == (1.0, 0.0)
    assert batch.dataset_name == "pictures"
    assert batch._metadata["source_files"] == task.data
    assert [stats.stage_name for stats in batch._stage_perf] == ["file_partitioning"]

    rows = curator.ConvertImageBatchToDocumentBatchStage(["image_id", "embedding"]).process(batch)
    assert list(rows.data.columns) == ["image_id", "embedding"]
    (tmp_path / "out").mkdir()
    written = curator.ImageWriterStage(str(tmp_path / "out"), images_per_tar=4).process(batch)
    assert [Path(path).suffix for path in written.data] == [".tar", ".parquet"]
    assert written._metadata["num_images"] == 4
    (again,) = ImageReaderStage(device="cpu").process(FileGroupTask(data=written.data[:1]))
    assert [image.image_data.shape for image in again] == [SHAPE] * 4


def test_a_pipeline_takes_only_its_own_stages(curator):
    pipeline = curator.Pipeline("images")
    pipeline.add_stage(curator.stage())
    with pytest.raises(TypeError, match="Stage must be a ProcessingStage"):
        pipeline.add_stage(ImageReaderStage())


def test_an_executor_runs_the_stage(curator, task):
    """As executors do: after a copy to a worker, by the adapter that gives tasks their ids."""
    stage = pickle.loads(pickle.dumps(curator.stage(3, False, device="cpu")))
    batches = curator.BaseStageAdapter(stage).process_batch([task])
    assert all(type(batch) is curator.ImageBatch for batch in batches)
    assert [batch.num_items for batch in batches] == [3, 2, 2, 2]
    assert [batch.task_id for batch in batches] == [f"0_abc_{n}" for n in range(4)]
    names = [[stats.stage_name for stats in batch._stage_perf] for batch in batches]
    assert names == [["file_partitioning", "image_reader"]] * 4
    (failure,) = [error for batch in batches for error in batch._metadata["failed"].values()]
    assert failure.startswith("truncated")
    assert stage.ray_stage_spec() == {"is_fanout_stage": True}


def test_the_stage_is_changed_as_others_are(curator):
    stage = curator.stage(device="cpu")
    changed = stage.with_(name="other", resources=curator.Resources(gpus=1), batch_size=2)
    assert (changed.name, changed.resources.gpus, changed.batch_size) == ("other", 1, 2)
    assert (stage.name, stage.resources.gpus, stage.batch_size) == ("image_reader", 0, 1)
    assert changed.device == "cpu"


def test_a_gpu_is_asked_for_where_there_is_one(curator, monkeypatch):
    monkeypatch.setattr("dask_imgread.cluster.gpu.count_gpus", lambda: 1)
    assert curator.stage(num_gpus_per_worker=0.5).resources.gpus == 0.5
    assert curator.stage(device="cpu").resources.gpus == 0


def test_other_options_need_other_resources(curator, monkeypatch):
    monkeypatch.setattr("dask_imgread.cluster.gpu.count_gpus", lambda: 1)
    stage = curator.stage(num_gpus_per_worker=0.5)
    assert stage.with_options(device="cpu").resources.gpus == 0
    assert stage.with_options(device="cpu").with_options(device="auto").resources.gpus == 0.5
    assert stage.with_options(num_gpus_per_worker=1).resources.gpus == 1
    assert stage.resources.gpus == 0.5
    chosen = stage.with_(resources=curator.Resources(cpus=2))
    assert chosen.with_options(device="cpu").resources == curator.Resources(cpus=2)


def test_only_one_file_imports_nemo_curator():
    files = Path(dask_imgread.__file__).parent.rglob("*.py")
    users = [p.name for p in files if re.search(r"(import|from) nemo_curator", p.read_text())]
    assert users == ["nemo_curator.py"]
