"""The reader as a stage of NeMo Curator's pipelines. Only this file imports nemo_curator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import FileGroupTask, ImageBatch

from dask_imgread.reading import reader


@dataclass(repr=False)
class ImageReaderStage(reader.ImageReaderStage, ProcessingStage[FileGroupTask, ImageBatch]):  # type: ignore[misc]
    """The ``ImageReaderStage`` of this package, as a stage of NeMo Curator.

    Its ``Pipeline`` takes only its own stages and tasks. This stage is one of them, with the
    methods that executors call, and its batches are ``nemo_curator.tasks.ImageBatch``. Their images
    are ``dask_imgread.ImageObject``. Options are those of ``dask_imgread.ImageReaderStage``.
    """

    resources = Resources()  # a plain attribute, which with_() can set

    def __post_init__(self) -> None:
        """Check the values, and find out whether there is a GPU, as NeMo Curator's reader does."""
        super().__post_init__()
        self.resources = self._find_resources()

    def with_options(self, **options: Any) -> ImageReaderStage:
        """Return a copy with some options changed, and its resources unless ``with_`` set them."""
        changed: Any = super().with_options(**options)
        if changed.resources == self._find_resources():
            changed.resources = changed._find_resources()
        stage: ImageReaderStage = changed
        return stage

    def _find_resources(self) -> Resources:
        return Resources(gpus=super().resources.gpus)

    def process(self, task: FileGroupTask) -> list[ImageBatch]:
        """Read all images of a task's shards.

        Parameters
        ----------
        task
            The shards to read.

        Returns
        -------
        list of nemo_curator.tasks.ImageBatch
            All batches, in the shards' order. ``_metadata["failed"]`` of a batch gives the error of
            each image that could not be read, by its id.
        """
        return [
            ImageBatch(
                dataset_name=batch.dataset_name,
                data=batch.data,
                _metadata=batch._metadata | {"failed": {i.image_id: i.error for i in batch.failed}},
                _stage_perf=batch._stage_perf,
            )
            for batch in self.read(task)
        ]
