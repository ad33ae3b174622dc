"""Stand-ins for nemo_curator 1.4: classes of the same shape, by the same module names.

Their next stages read and set the same attributes as its own do. Models are the tests' own.
"""

import copy
import io
import json
import sys
import tarfile
from abc import ABC, ABCMeta, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import numpy as np
import pandas as pd
from PIL import Image

MODULES = [
    *("nemo_curator", "nemo_curator.backends.base", "nemo_curator.pipeline", "nemo_curator.tasks"),
    *("nemo_curator.stages", "nemo_curator.stages.base", "nemo_curator.stages.resources"),
    "nemo_curator.stages.image.deduplication.removal",
    "nemo_curator.stages.image.embedders.clip_embedder",
    "nemo_curator.stages.image.filters",
    *(f"nemo_curator.stages.image.io.{name}" for name in ("convert", "image_reader")),
    "nemo_curator.stages.image.io.image_writer",
]
Before, After = TypeVar("Before"), TypeVar("After")


def install(monkeypatch):
    """Let imports of nemo_curator find this file."""
    parents = {name.rsplit(".", n)[0] for name in MODULES for n in range(name.count(".") + 1)}
    for name in {*MODULES, *parents}:
        monkeypatch.setitem(sys.modules, name, sys.modules[__name__])


# Tasks


@dataclass
class Task(ABC, Generic[Before]):
    dataset_name: str
    data: Before
    _stage_perf: list[Any] = field(default_factory=list)
    _metadata: dict[str, Any] = field(default_factory=dict)
    task_id: str = field(init=False, default="")
    _source_id: str = field(init=False, default="")

    @property
    def num_items(self):
        return len(self.data)

    def add_stage_perf(self, stats):
        self._stage_perf.append(stats)

    def _set_task_id(self, parent, suffix):
        self.task_id = f"{parent}_{suffix}" if parent else str(suffix)


@dataclass
class FileGroupTask(Task[list[str]]):
    reader_config: dict[str, Any] = field(default_factory=dict)
    data: list[str] = field(default_factory=list)


@dataclass
class ImageObject:
    image_path: str = ""
    image_id: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    image_data: np.ndarray | None = None
    embedding: np.ndarray | None = None
    aesthetic_score: float | None = None
    nsfw_score: float | None = None


@dataclass
class ImageBatch(Task):
    data: list[ImageObject] = field(default_factory=list)


@dataclass
class DocumentBatch(Task):
    data: pd.DataFrame = field(default_factory=pd.DataFrame)


# Stages


@dataclass
class Resources:
    cpus: float = 1.0
    gpu_memory_gb: float = 0.0
    gpus: float = 0.0

    @property
    def requires_gpu(self):
        return self.gpus > 0


class StageMeta(ABCMeta):
    def __call__(cls, *args, **kwargs):
        stage = super().__call__(*args, **kwargs)
        assert None in (stage.num_workers(), stage.num_workers_per_node())
        return stage


class ProcessingStage(ABC, Generic[Before, After], metaclass=StageMeta):
    name = "ProcessingStage"
    resources = Resources()
    batch_size = 1
    runtime_env = None
    is_source_stage = is_sink_stage = False

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        for name in ("name", "resources", "batch_size", "runtime_env"):
            assert not isinstance(cls.__dict__.get(name), property)

    @abstractmethod
    def process(self, task):
        """Return a task or several."""

    def process_batch(self, tasks):
        done = [self.process(task) for task in tasks]
        return [task for one in done for task in (one if isinstance(one, list) else [one])]

    def num_workers(self):
        return None

    def num_workers_per_node(self):
        return None

    def inputs(self):
        return [], []

    def setup(self, worker_metadata=None):
        pass

    def ray_stage_spec(self):
        return {"is_fanout_stage": "list" in str(type(self).process.__annotations__["return"])}

    def with_(self, name=None, resources=None, batch_size=None):
        stage = copy.deepcopy(self)
        given = {"name": name, "resources": resources, "batch_size": batch_size}
        vars(stage).update({name: value for name, value in given.items() if value is not None})
        return stage


@dataclass
class ImageReaderStage(ProcessingStage[FileGroupTask, ImageBatch]):
    dali_batch_size: int = 100
    verbose: bool = True
    num_threads: int = 8
    num_gpus_per_worker: float = 0.25
    name: str = "image_reader"

    def outputs(self):
        return ["data"], ["image_data", "image_path", "image_id"]

    def process(self, task):
        raise NotImplementedError


def follow(task, images):
    return ImageBatch(
        data=images,
        dataset_name=task.dataset_name,
        _metadata=task._metadata,
        _stage_perf=task._stage_perf,
    )


@dataclass
class ImageEmbeddingStage(ProcessingStage[ImageBatch, ImageBatch]):
    remove_image_data: bool = False

    def process(self, task):
        vectors = self.model([image.image_data for image in task.data]).cpu().numpy()
        for image, vector in zip(task.data, vectors, strict=True):
            image.embedding = vector
            if self.remove_image_data:
                image.image_data = None
        return task


@dataclass
class ImageAestheticFilterStage(ProcessingStage[ImageBatch, ImageBatch]):
    score_threshold: float = 0.5

    def process(self, task):
        scores = self.model(np.stack([image.embedding for image in task.data])).cpu().numpy()
        for image, score in zip(task.data, scores, strict=True):
            image.aesthetic_score = float(score)
        return follow(task, [i for i in task.data if i.aesthetic_score >= self.score_threshold])


@dataclass
class ImageNSFWFilterStage(ProcessingStage[ImageBatch, ImageBatch]):
    score_threshold: float = 0.5

    def process(self, task):
        scores = self.model(np.stack([image.embedding for image in task.data])).cpu().numpy()
        for image, score in zip(task.data, scores, strict=True):
            image.nsfw_score = float(score)
        return follow(task, [i for i in task.data if i.nsfw_score < self.score_threshold])


@dataclass
class ImageDuplicatesRemovalStage(ProcessingStage[ImageBatch, ImageBatch]):
    removal_parquets_dir: str
    duplicate_id_field: str = "id"

    def setup(self, worker_metadata=None):
        self.ids = {*pd.read_parquet(self.removal_parquets_dir)[self.duplicate_id_field]}

    def process(self, task):
        return follow(task, [image for image in task.data if image.image_id not in self.ids])


@dataclass
class ConvertImageBatchToDocumentBatchStage(ProcessingStage[ImageBatch, DocumentBatch]):
    fields: list[str] = field(default_factory=list)

    def process(self, task):
        rows = {name: [getattr(i, name, None) for i in task.data] for name in self.fields}
        return DocumentBatch(task.dataset_name, pd.DataFrame(rows), task._stage_perf)


@dataclass
class ImageWriterStage(ProcessingStage[ImageBatch, FileGroupTask]):
    output_dir: str
    images_per_tar: int = 1000

    def process(self, task):
        path = Path(self.output_dir, f"images-{task.task_id}.tar")
        with tarfile.open(path, "w") as tar:
            for image in task.data:
                content = io.BytesIO()
                Image.fromarray(image.image_data).save(content, "JPEG", quality=92)
                member = tarfile.TarInfo(f"{image.image_id}.jpg")
                member.size = content.tell()
                tar.addfile(member, io.BytesIO(content.getvalue()))
        rows = [{"id": i.image_id, "metadata": json.dumps(repr(i.metadata))} for i in task.data]
        pd.DataFrame(rows).to_parquet(path.with_suffix(".parquet"))
        return FileGroupTask(
            task.dataset_name,
            [str(path), str(path.with_suffix(".parquet"))],
            task._stage_perf,
            {**task._metadata, "num_images": len(task.data)},
        )


# What runs them


class Pipeline:
    def __init__(self, name):
        self.stages = []

    def add_stage(self, stage):
        if not isinstance(stage, ProcessingStage):
            raise TypeError(f"Stage must be a ProcessingStage, got {type(stage)}")
        self.stages.append(stage)


class BaseStageAdapter:
    def __init__(self, stage):
        self.stage = stage

    def process_batch(self, tasks):
        done = self.stage.process_batch(tasks)
        for number, task in enumerate(done):
            task._set_task_id(tasks[0].task_id, number)
            task.add_stage_perf(SimpleNamespace(stage_name=self.stage.name))
        return done
