"""What tests run on workers, and what it leaves for them to count."""

import json
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dask_imgread import ImageReaderStage

META = pd.DataFrame({"total": pd.Series(dtype="int64")}).rename_axis("image_id")


def add_up(batch):
    ids = pd.Index([image.image_id for image in batch.data], dtype="str", name="image_id")
    return pd.DataFrame({"total": [int(i.image_data.sum()) for i in batch.data]}, index=ids)


TASKS = 16


@dataclass
class WatchedReader(ImageReaderStage):
    """Notes when each of its readers began and ended, and where."""

    notes: str = ""

    def stream(self, task):
        begun = time.time()
        time.sleep(0.05)
        yield from super().stream(task)
        note = {"worker": os.getpid(), "begun": begun, "ended": time.time()}
        Path(self.notes, uuid.uuid4().hex).write_text(json.dumps(note))


def count_most_at_once(notes):
    """Return the largest number of readers seen running at one moment on one worker."""
    ran = [json.loads(path.read_text()) for path in Path(notes).iterdir()]
    assert len(ran) >= TASKS
    most = 0
    for one in ran:
        at = one["begun"]
        together = [
            r for r in ran if r["worker"] == one["worker"] and r["begun"] <= at < r["ended"]
        ]
        most = max(most, len(together))
    return most
