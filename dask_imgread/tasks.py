"""The data model: tasks, images and batches of images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pandas as pd
from dask.base import tokenize
from dask.sizeof import sizeof
from dask.utils import format_bytes

from dask_imgread.buffers import count_bytes_held
from dask_imgread.decoding.contract import Pixels
from dask_imgread.shards.find import split_list, stat_shard
from dask_imgread.shards.samples import ShardIndex, make_shard_id
from dask_imgread.storage.filesystems import resolve_path
from dask_imgread.storage.redaction import redact_url
from dask_imgread.texts import render_table, shorten

if TYPE_CHECKING:
    from PIL import Image

COLUMNS = {
    "image_path": "string[pyarrow]",
    "shard": "string[pyarrow]",
    "shard_version": "string[pyarrow]",
    "key": "string[pyarrow]",
    "offset": "int64[pyarrow]",
    "size": "int64[pyarrow]",
    "sample_offset": "int64[pyarrow]",
    "sample_size": "int64[pyarrow]",
    "format": "string[pyarrow]",
    "width": "int32[pyarrow]",
    "height": "int32[pyarrow]",
    "channels": "int16[pyarrow]",
    "backend": "string[pyarrow]",
    "error": "string[pyarrow]",
    "warning": "string[pyarrow]",
}
# Columns that metadata has if it is asked for them.
DIGESTS = CHECKSUM, MD5 = "sha256", "md5"
PROBLEMS = "error_sidecar"
OWN_COLUMNS = frozenset({*COLUMNS, "image_id", *DIGESTS, PROBLEMS})

_SHOWN, _SHORT = 100, 40  # characters of a name
_LISTED = 5  # shapes, or shards


@dataclass(kw_only=True)
class _Carried:
    """What a task of NeMo Curator carries from stage to stage, beside its name and its data."""

    _metadata: dict[str, Any] = field(default_factory=dict)
    _stage_perf: list[Any] = field(default_factory=list)


@dataclass(repr=False)
class FileGroupTask(_Carried):
    """The shards, or the part of one shard, that one task reads.

    Parameters
    ----------
    dataset_name
        A name for the dataset, passed on to the batches.
    data
        Paths or URLs of tar shards.
    task_id
        A name for the task; the batches' ids are made from it.
    reader_config
        Settings for these shards: ``storage_options``, a dict for fsspec's file system, and
        ``relative_to``. Left out of ``repr``, since it may hold credentials; those in URLs are
        left out, too.
    byte_range
        Offsets of the first tar header to read and of the first not to read (None: read to
        the end). Only for a task with one shard.
    index
        The index of the part's samples, if some have members that are not adjacent: made by one
        walk over the whole shard, so that no task repeats it. Otherwise None.
    versions
        A token for the content of each shard, so that a changed shard is read again;
        looked up when it is needed if not given.
    sizes
        The size of each shard's file in bytes, None where it is unknown: reading a remote file then
        begins with a request for its size.
    rows
        If not all images of the shards are to be read, the rows of those that are: the columns
        ``shard``, ``offset`` and ``size``, ``image_id`` or ``key``, and any others of ``COLUMNS``;
        further columns become the images' ``metadata``. See ``partition_shards``.
    _metadata, _stage_perf
        What NeMo Curator's tasks carry from stage to stage; passed on to the batches.

    Raises
    ------
    ValueError
        If ``data`` is a string, or if ``byte_range`` is given and ``data`` is not a single shard.

    Examples
    --------
    >>> task = FileGroupTask(data=["a.tar", "b.tar"], task_id="first")
    >>> task.num_items
    2
    >>> task
    <FileGroupTask 'first': a.tar and 1 more>
    """

    dataset_name: str = ""
    data: list[str] = field(default_factory=list)
    task_id: str = ""
    reader_config: dict[str, Any] = field(default_factory=dict)
    byte_range: tuple[int, int | None] | None = None
    index: ShardIndex | None = field(default=None, repr=False)
    versions: tuple[str, ...] = ()
    sizes: tuple[int | None, ...] = ()
    rows: pd.DataFrame | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the values."""
        if isinstance(self.data, str):  # type: ignore[unreachable]
            raise ValueError(  # a string is iterable too, letter by letter
                f"data must be a list of shard paths, not the string {self.data!r}"
            )
        if self.rows is None:
            self.data = [path for given in self.data for path in split_list(str(given))]
        if self.byte_range is not None and len(self.data) != 1:
            raise ValueError(f"byte_range needs exactly one shard in data, not {len(self.data)}")

    @property
    def num_items(self) -> int:
        """The number of shards."""
        return len(self.data)

    @property
    def storage_options(self) -> dict[str, Any]:
        """Options for fsspec's file system."""
        options: dict[str, Any] = self.reader_config.get("storage_options") or {}
        return options

    def find_size(self, path: str) -> int | None:
        """Return the size of a shard's file, if it is known.

        Parameters
        ----------
        path
            One of ``data``.

        Returns
        -------
        int or None
            The size in bytes.
        """
        return dict(zip(self.data, self.sizes, strict=False)).get(path)

    @property
    def start(self) -> int:
        """The offset of the first tar header to read, in each shard."""
        return self.byte_range[0] if self.byte_range else 0

    @property
    def relative_to(self) -> str | None:
        """The folder or URL that ids are relative to; None if they are made from whole paths."""
        return self.reader_config.get("relative_to")

    def name_shards(self, relative_to: str | None = None) -> dict[str, str]:
        """Return the id of each shard by path.

        Parameters
        ----------
        relative_to
            The reader's; that of the task takes precedence.

        Returns
        -------
        dict
            The ids by path.

        Raises
        ------
        ValueError
            If a shard does not lie below ``relative_to``.
        """
        base = self.relative_to or relative_to
        base = base and resolve_path(base)
        return {path: make_shard_id(path, base) for path in map(resolve_path, self.data)}

    def __repr__(self) -> str:
        """Return the text that Dask logs when the task fails: without credentials."""
        names = [repr(redact_url(path))[1:-1] for path in self.data[:1]]
        shards = [shorten(name, _SHOWN) for name in names] or ["no shards"]
        shards += [f"and {len(self.data) - 1:,} more"] * (len(self.data) > 1)
        what = ", ".join([" ".join(shards), *self._describe_part().values()])
        return f"<{type(self).__name__} {shorten(repr(self.task_id), _SHORT)}: {what}>"

    def _repr_html_(self) -> str:
        shards = [self._describe_shard(path) for path in self.data[:_LISTED]]
        shards += [f"and {len(self.data) - _LISTED:,} more"] * (len(self.data) > _LISTED)
        rows = {
            "task_id": self.task_id,
            "dataset_name": self.dataset_name,
            "relative_to": redact_url(self.relative_to or ""),
            **self._describe_part(),
            "shards": f"{len(self.data):,}",
        }
        given = [(name, value) for name, value in rows.items() if value]
        return render_table([*given, *(("", shard) for shard in shards)], type(self).__name__)

    def _describe_shard(self, path: str) -> str:
        size = self.find_size(path)
        known = "" if size is None else f" · {format_bytes(size)}"
        return shorten(redact_url(path), _SHOWN - 20) + known

    def _describe_part(self) -> dict[str, str]:
        """Say what of the shards is read, if it is not all."""
        part = {}
        if self.byte_range is not None:
            start, stop = self.byte_range
            part["byte_range"] = f"bytes {start:,} to {'the end' if stop is None else f'{stop:,}'}"
        if self.rows is not None:
            part["rows"] = f"{len(self.rows):,} images"
        return part

    def __dask_tokenize__(self) -> object:
        """Return a token of what is read, the shards' content included, equal in every process."""
        versions = [self.find_version(path) or "missing" for path in self.data]
        paths = [resolve_path(path) for path in self.data]
        # A token, since keys are shown on the dashboard and the configuration may hold secrets.
        config = tokenize(self.reader_config)
        return (
            type(self).__name__,
            self.dataset_name,
            paths,
            self.byte_range,
            self.index and self.index.to_json(),
            self.rows is not None and tokenize(self.rows),
            versions,
            config,
            tokenize(self._metadata),
        )

    def find_version(self, path: str) -> str | None:
        """Return the token for a shard's content, looked up if it is not known.

        Parameters
        ----------
        path
            One of ``data``.

        Returns
        -------
        str or None
            The token; None if the shard is missing.
        """
        known = dict(zip(self.data, self.versions, strict=False)).get(path)
        if known is not None:
            return known
        try:
            return stat_shard(path, self.storage_options).version
        except OSError:
            return None


def is_task(value: object) -> bool:
    """Whether a value has the attributes of a FileGroupTask, NeMo Curator's or this package's."""
    return hasattr(value, "data") and hasattr(value, "reader_config")


def adopt_task(task: Any) -> FileGroupTask:
    """Return a task of NeMo Curator, which this package does not import, as one of its own."""
    if isinstance(task, FileGroupTask):
        return task
    names = ("dataset_name", "task_id", "reader_config", "_metadata", "_stage_perf")
    given = {name: getattr(task, name) for name in names if hasattr(task, name)}
    return FileGroupTask(data=list(task.data), **given)


@dataclass(repr=False)
class ImageObject:
    """One image member of a shard: its pixels, or the reason why there are none.

    A notebook shows a thumbnail of it.

    Parameters
    ----------
    image_path
        ``<shard path>/<member name>``.
    image_id
        Unique in a dataset, and independent of how the shards are grouped, partitioned or
        ordered. Made from the shard's path, whole or relative to ``relative_to``, and the
        member's name.
    image_data
        An array of uint8, ``(height, width, 3)``, RGB; None if the image was not decoded.
    metadata
        The sample's sidecars by extension: ``.json`` parsed, ``.txt`` as str, ``.cls`` as
        int, others as bytes.
    shard, key
        The shard's path, and the sample's key in it.
    offset, size
        Where the encoded bytes lie in the (decompressed) shard, and how many there are.
    sample_offset, sample_size
        Where the whole sample lies, its sidecars and all tar headers included; None if other
        members lie between its own.
    shard_version
        A token for the shard's content: its size with its date or ETag, as the store has them.
    format
        ``"jpeg"``, ``"png"`` and so on, from the content, not from the name; None if unknown.
    width, height, channels
        Size in pixels, upright, and stored channels, from the image's header.
    backend
        The decoder: ``"libjpeg-turbo"``, ``"dali-gpu"``, ``"dali-cpu"`` or ``"pillow"``;
        None if not decoded.
    error
        ``"<cause>: <detail>"`` if the image could not be read, else None.
    warning
        What is wrong though the image could be read, such as a broken sidecar; else None.
    sidecar_error
        Which sidecars could not be read, and why; else None. Part of ``warning``, too.
    sha256
        The SHA-256 of the encoded bytes in hexadecimal, if the reader has ``checksum=True`` and the
        bytes could be read; else None.
    md5
        The MD5 of the encoded bytes, likewise, if the reader has ``md5=True``.
    embedding, aesthetic_score, nsfw_score
        Never set by a reader: for NeMo Curator's next stages. Like any Python object, an image
        takes attributes of your own, too.

    Examples
    --------
    >>> image = ImageObject("a.tar/0.jpg", error="truncated: the image ends too early")
    >>> image.cause, image.image_data
    ('truncated', None)
    >>> image
    <ImageObject 'a.tar/0.jpg' failed: truncated>
    """

    image_path: str = ""
    image_id: str = ""
    image_data: Pixels | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    shard: str = ""
    key: str = ""
    offset: int = 0
    size: int = 0
    sample_offset: int | None = None
    sample_size: int | None = None
    shard_version: str | None = None
    format: str | None = None
    width: int | None = None
    height: int | None = None
    channels: int | None = None
    backend: str | None = None
    error: str | None = None
    warning: str | None = None
    sidecar_error: str | None = None
    sha256: str | None = None
    md5: str | None = None
    embedding: Any = None
    aesthetic_score: float | None = None
    nsfw_score: float | None = None

    @property
    def cause(self) -> str | None:
        """The kind of error, without its detail; None if there is none."""
        return self.error.split(":", 1)[0] if self.error else None

    def to_pil(self) -> Image.Image:
        """Return the image as one of Pillow's.

        Returns
        -------
        PIL.Image.Image
            It has a copy of the pixels.

        Raises
        ------
        ValueError
            If it has no pixels, or they are in a GPU's memory.

        Examples
        --------
        >>> ImageObject(image_data=np.zeros((2, 3, 3), np.uint8)).to_pil().size
        (3, 2)
        """
        from PIL import Image

        return Image.fromarray(_get_pixels(self))

    def __repr__(self) -> str:
        """Return a line: the pixels would take many."""
        size = f"{self.width} x {self.height}" if self.width and self.height else None
        known = [size, self.format] if self.cause is None else [f"failed: {self.cause}"]
        words = shorten(" ".join(" ".join(filter(None, known)).split()), _SHORT)
        name = shorten(repr(self.image_id or self.image_path), _SHOWN)
        return f"<{' '.join(filter(None, [type(self).__name__, name, words]))}>"

    def _repr_html_(self) -> str:
        from dask_imgread.thumbnails import render_images

        return render_images([self])


@dataclass(repr=False)
class ImageBatch(_Carried):
    """Images that were read together.

    Its length is that of ``data``, which it iterates over and is indexed like. It is true if any
    image belongs to it, read, failed or skipped: ``filter(None, batches)`` loses no failure. A
    notebook shows thumbnails of it, and why images failed.

    Parameters
    ----------
    data
        The images that were read.
    dataset_name, task_id
        From the task; ``task_id`` is numbered within it.
    failed
        The images that could not be read, with ``error`` set and no ``image_data``.
    skipped
        How many could not be read and are left out, under ``on_error="skip"``.
    image_size
        Height and width to which the reader resizes all images; None if theirs differ.
    _metadata, _stage_perf
        Those of the task.

    Examples
    --------
    >>> from dask_imgread import ImageReaderStage
    >>> from dask_imgread.testing import make_shards
    >>> task = FileGroupTask(data=make_shards("shards", shards=1, images_per_shard=3, broken=1))
    >>> (batch,) = ImageReaderStage(verbose=False).process(task)
    >>> batch.num_items, [image.cause for image in batch.failed]
    (2, ['truncated'])
    >>> batch
    <ImageBatch '_0': 2 images, 1 failed>
    >>> batch.ids == [image.image_id for image in batch]
    True
    """

    data: list[ImageObject] = field(default_factory=list)
    dataset_name: str = ""
    task_id: str = ""
    failed: list[ImageObject] = field(default_factory=list)
    skipped: int = 0
    image_size: tuple[int, int] | None = None

    @property
    def num_items(self) -> int:
        """The number of images that were read."""
        return len(self.data)

    @property
    def ids(self) -> list[str]:
        """The ids of the images that were read."""
        return [image.image_id for image in self.data]

    def __len__(self) -> int:
        return len(self.data)

    def __bool__(self) -> bool:
        return bool(self.data or self.failed or self.skipped)

    def __iter__(self) -> Iterator[ImageObject]:
        return iter(self.data)

    @overload
    def __getitem__(self, place: int) -> ImageObject: ...
    @overload
    def __getitem__(self, place: slice) -> list[ImageObject]: ...
    def __getitem__(self, place: int | slice) -> ImageObject | list[ImageObject]:
        return self.data[place]

    def stack(self) -> Pixels:
        """Return the pixels of all images that were read in one array.

        Returns
        -------
        numpy.ndarray
            A uint8 array ``(images, height, width, 3)``, a copy. If no image was read, it is
            ``(0, height, width, 3)`` with the reader's ``image_size``, or ``(0, 0, 0, 3)``.

        Raises
        ------
        ValueError
            If the images differ in size; if one has no pixels, or they are in a GPU's memory.

        Examples
        --------
        >>> black = np.zeros((2, 3, 3), np.uint8)
        >>> ImageBatch([ImageObject(image_data=black), ImageObject(image_data=black)]).stack().shape
        (2, 2, 3, 3)
        """
        pixels = [_get_pixels(image) for image in self.data]
        ids = defaultdict(list)
        for image, array in zip(self.data, pixels, strict=True):
            ids[array.shape].append(shorten(image.image_id or image.image_path, _SHOWN))
        if len(ids) > 1:
            listed = [
                f"{shape} of {names[0]}" + f" and {len(names) - 1:,} more" * (len(names) > 1)
                for shape, names in islice(ids.items(), _LISTED)
            ]
            raise ValueError(
                f"images of {len(ids)} shapes can't be stacked: {', '.join(listed)}"
                + ", …" * (len(ids) > _LISTED)
                + "; read them with resize=(height, width), or with fit='crop'"
            )
        return (
            np.stack(pixels) if pixels else np.empty((0, *(self.image_size or (0, 0)), 3), np.uint8)
        )

    def to_frame(self) -> pd.DataFrame:
        """Return one row per image, read or failed, without pixels.

        Returns
        -------
        pandas.DataFrame
            The columns of metadata, indexed by ``image_id``.

        Examples
        --------
        >>> ImageBatch(data=[ImageObject("s.tar/a.jpg", "s-1/a.jpg", width=8)]).to_frame().width
        image_id
        s-1/a.jpg    8
        Name: width, dtype: int32[pyarrow]
        """
        return make_frame([*self.data, *self.failed])

    def __repr__(self) -> str:
        """Return a line: the images' would be as many as there are images."""
        counts = count_images(len(self.data), len(self.failed), self.skipped)
        return f"<{type(self).__name__} {shorten(repr(self.task_id), _SHOWN)}: {counts}>"

    def _repr_html_(self) -> str:
        from dask_imgread.thumbnails import render_images

        return render_images([*self.data, *self.failed], title=repr(self)[1:-1])


def count_images(read: int, failed: int, skipped: int = 0) -> str:
    """Return as text how many images there are.

    >>> count_images(1, 2), count_images(1_000, 0)
    ('1 image, 2 failed', '1,000 images')
    """
    counts = [f"{read:,} image{'' if read == 1 else 's'}"]
    counts += [f"{failed:,} failed"] * bool(failed) + [f"{skipped:,} skipped"] * bool(skipped)
    return ", ".join(counts)


def count_shards(new: int, changed: int, gone: int) -> str:
    """Return as text how many shards are new, have changed, or are gone; empty if none.

    >>> count_shards(2, 0, 1)
    '2 new, 1 gone'
    """
    kinds = {"new": new, "changed": changed, "gone": gone}
    return ", ".join(f"{number:,} {kind}" for kind, number in kinds.items() if number)


def _get_pixels(image: ImageObject) -> Pixels:
    pixels: object = image.image_data
    if isinstance(pixels, np.ndarray):
        return pixels
    name = image.image_id or image.image_path
    if pixels is None:
        raise ValueError(f"{name} has no pixels: {image.error or 'it was not decoded'}")
    raise ValueError(f"the pixels of {name} are in a GPU's memory: read it with output='host'")


def make_frame(images: Iterable[ImageObject]) -> pd.DataFrame:
    """Return one row per image with the columns of ``COLUMNS``, indexed by ``image_id``."""
    images = list(images)
    columns = {
        name: pd.array([getattr(image, name) for image in images], dtype=dtype)
        for name, dtype in COLUMNS.items()
    }
    return pd.DataFrame(columns, index=make_index(images))


def make_index(images: Iterable[ImageObject]) -> pd.Index:
    """Return the index of the images' rows: their ids."""
    ids = [image.image_id for image in images]
    return pd.Index(ids, dtype="string[pyarrow]", name="image_id")


def _sizeof_record(image: ImageObject) -> int:
    metadata: int = sizeof(image.metadata) if image.metadata else 0
    return 600 + len(image.image_path) + metadata


def _sizeof_image(image: ImageObject) -> int:
    # Dask's estimate for a dataclass misses the pixels. Pixels on a GPU take no host memory.
    return _sizeof_record(image) + getattr(image.image_data, "nbytes", 0)


def _sizeof_batch(batch: ImageBatch) -> int:
    records = sum(map(_sizeof_record, chain(batch.data, batch.failed)))
    pixels = (image.image_data for image in batch.data)
    # The images of a batch share one buffer, which any of them keeps alive.
    return 200 + records + count_bytes_held(p for p in pixels if isinstance(p, np.ndarray))


sizeof.register(ImageObject, _sizeof_image)
sizeof.register(ImageBatch, _sizeof_batch)
