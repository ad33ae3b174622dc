"""What a notebook shows of images and batches, and how a batch is used there."""

import pickle
import sys
from types import ModuleType

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest

from dask_imgread import (
    FileGroupTask,
    ImageBatch,
    ImageObject,
    ImageReaderStage,
    Summary,
    read_metadata,
    run_job,
    show,
)
from dask_imgread.tasks import make_frame
from dask_imgread.testing import make_shards
from dask_imgread.thumbnails import shrink
from tests.helpers.pages import Page

DETAILS = ("details", "summary")
HOSTILE = "</div><img src=x onerror=\"alert('1')\"><script>document.title='taken'</script>"


class OnGpu:
    """Pixels that the CPU can't reach."""

    def __init__(self):
        self.shape, self.dtype = (4, 4, 3), np.dtype(np.uint8)
        self.__cuda_array_interface__ = {"shape": self.shape, "typestr": "|u1", "data": (1, True)}


def make_images(count, shape=(30, 40, 3), **values):
    rng = np.random.default_rng(0)
    return [
        ImageObject(
            f"s.tar/{number}.jpg",
            f"s-1/{number}.jpg",
            rng.integers(0, 256, shape, np.uint8),
            size=2048,
            format="jpeg",
            width=shape[1],
            height=shape[0],
            **values,
        )
        for number in range(count)
    ]


def make_failed(count, error="truncated: the image ends too early"):
    return [
        ImageObject(f"s.tar/f{n}.jpg", f"s-1/f{n}.jpg", size=1536, error=error)
        for n in range(count)
    ]


def count_pictures(page):
    sources = [found["src"] for tag, found in page.tags if tag == "img"]
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    return len(sources)


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    shards = make_shards(tmp_path_factory.mktemp("shards"), shards=1, broken=1)
    (batch,) = ImageReaderStage(device="cpu").process(FileGroupTask(data=shards, task_id="s"))
    return batch


def test_a_batch_shows_its_images_and_its_failures(batch):
    page = Page(batch._repr_html_())
    assert count_pictures(page) == 7
    for words in (
        "ImageBatch 's_0': 7 images, 1 failed", "000000.jpg", "128 \u00d7 96 · ", " KiB",
        "landscape number 0", "truncated image file is truncated",
    ):  # fmt: skip
        assert words in page.text
    assert {found.get("title") for _, found in page.tags} >= {*batch.ids, batch.failed[0].image_id}


def test_an_image_shows_itself(batch):
    assert count_pictures(Page(batch[0]._repr_html_())) == 1
    assert count_pictures(Page(batch.failed[0]._repr_html_())) == 0


def test_a_list_is_shown_by_show(batch):
    for what in ([batch, batch], [[batch], (batch,)], [*batch, batch[0:7], *batch.failed * 2]):
        sheet = show(what)
        assert repr(sheet) == "<ContactSheet: 14 images, 2 failed>"
        assert count_pictures(Page(sheet._repr_html_())) == 14
    assert count_pictures(Page(show(batch[0]).html)) == 1
    assert show([]).html == "<div>0 images</div>"
    assert repr(show(ImageBatch(skipped=3))) == "<ContactSheet: 0 images, 3 skipped>"


def test_what_can_not_be_shown():
    with pytest.raises(TypeError, match=r"an ImageBatch, a list of .* is expected, not str"):
        show(["a.tar"])
    with pytest.raises(ValueError, match="n must be at least 0, not -1"):
        show([], -1)


def test_failures_are_not_crowded_out():
    page = Page(ImageBatch(make_images(98), failed=make_failed(2))._repr_html_())
    assert count_pictures(page) == 22
    assert page.text.count("truncated") == 2
    assert page.text.endswith("and 76 more")
    page = Page(show(make_images(98) + make_failed(50), 8).html)
    assert (count_pictures(page), page.text.count("truncated")) == (6, 2)
    page = Page(show(make_failed(50) + make_images(1), 8).html)
    assert (count_pictures(page), page.text.count("truncated")) == (1, 7)
    assert page.text.index("truncated") < page.text.index("30")
    assert Page(show(make_images(3), 0).html).text == "3 images and 3 more"


def test_texts_are_text():
    (image,) = make_images(1, metadata={"txt": HOSTILE})
    image.image_id = f"s-1/{HOSTILE}"
    (failed,) = make_failed(1, f"{HOSTILE}: {HOSTILE}")
    page = Page(ImageBatch([image], HOSTILE, HOSTILE, [failed])._repr_html_())
    assert {tag for tag, _ in page.tags} == {"div", "img", "b"}
    assert not any("onerror" in found for _, found in page.tags)
    assert page.text.count("document.title='taken'") == 4


def test_half_a_character_can_be_written():
    (image,) = make_images(1, metadata={"txt": "half \ud83d"})
    image.image_id = "s-1/\udcff.jpg"
    assert "half ?" in Page(image._repr_html_().encode().decode()).text


@pytest.mark.parametrize("shape", [(800, 1200, 3), (112, 112, 3), (1, 5000, 3)])
def test_the_html_is_bounded(shape):
    """Even that of noise, which JPEG hardly compresses, with texts that grow when escaped."""
    image = make_images(1, shape, metadata={"txt": "'" * 10_000})[0]
    image.image_id = "\"'" * 1000 + "/" + "\"'" * 10_000
    failed = make_failed(50, "\"'" * 5000 + ":" + "\"'" * 5000)
    batch = ImageBatch([image] * 100, task_id="'" * 10_000, failed=failed)
    html = batch._repr_html_()
    assert len(html) < 200_000
    assert "100 images, 50 failed" in Page(html).text
    assert len(ImageBatch([image] * 100)._repr_html_()) < 200_000
    image.metadata, image.image_id = {"txt": "a caption " * 20}, "shard-1f0c/" + "0" * 100
    assert len(ImageBatch([image] * 100)._repr_html_()) < 110_000


def test_thumbnails_are_small_and_never_enlarged():
    pixels = np.zeros((10, 3000, 3), np.uint8)
    assert shrink(pixels, 100).shape == (1, 100, 3)
    assert shrink(pixels[:, :20], 100).shape == (10, 20, 3)


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (OnGpu(), "its pixels are in a GPU's memory"),
        (None, "not decoded"),
        (np.zeros((4, 5), np.float32), "no RGB image: 4 x 5 float32"),
        (np.zeros((4, 0, 3), np.uint8), "no RGB image: 4 x 0 x 3 uint8"),
        ("text", "no RGB image: str"),
    ],
)
def test_what_has_no_thumbnail_says_why(pixels, reason):
    page = Page(ImageBatch([ImageObject(image_id="s/a.jpg", image_data=pixels)])._repr_html_())
    assert count_pictures(page) == 0
    assert reason in " ".join(page.text.split())


def test_a_sheet_is_saved_as_a_page(batch, tmp_path):
    show(batch).save(tmp_path / "sheet.html")
    page = Page((tmp_path / "sheet.html").read_text("utf-8"))
    assert count_pictures(page) == 7
    assert "default-src 'none'" in str(page.tags)


def test_a_sheet_keeps_no_pixels():
    images = make_images(1, (3000, 3000, 3))
    assert len(pickle.dumps(show(images))) < 30_000


@pytest.fixture
def asked(monkeypatch):
    """The rows that were read: a stand-in for the module that reads them."""
    rows = []
    stand_in = ModuleType("dask_imgread.selection.load")

    def load_images(frame, ids=None, *, reader=None, storage_options=None):
        rows.extend(frame.index)
        return [*make_images(len(frame) - 1), *make_failed(1)]

    stand_in.load_images = load_images
    monkeypatch.setitem(sys.modules, "dask_imgread.selection.load", stand_in)
    return rows


def test_the_first_rows_of_a_frame_are_read(asked):
    rows = make_frame(make_images(9))
    assert repr(show(rows, 4)) == "<ContactSheet: 3 images, 1 failed>"
    assert asked == list(rows.index[:4])
    asked.clear()
    assert repr(show(rows)) == "<ContactSheet: 8 images, 1 failed>"
    assert asked == list(rows.index)


def test_no_more_partitions_are_computed_than_needed(asked):
    computed = []

    def compute(number):
        computed.append(number)
        return make_frame(make_images(9)[3 * number : 3 * number + 3])

    frame = dd.from_map(compute, range(3), meta=make_frame([]))
    show(frame, 4)
    assert asked == [f"s-1/{number}.jpg" for number in range(4)]
    assert set(computed) == {0, 1}
    assert isinstance(frame.compute(), pd.DataFrame)


def test_rows_are_read_from_their_shards(tmp_path):
    """Needs ``dask_imgread.selection.load``."""
    pytest.importorskip("dask_imgread.selection.load")
    frame = read_metadata(make_shards(tmp_path, broken=1), sidecars={"txt": "caption"})
    for rows in (frame, frame.compute()):
        sheet = show(rows)
        assert repr(sheet) == "<ContactSheet: 15 images, 1 failed>"
        assert count_pictures(Page(sheet.html)) == 15
        assert Page(sheet.html).text.count("landscape number") == 16


def test_a_jobs_folder_is_shown_by_its_rows(tmp_path, client):
    run_job(
        make_shards(tmp_path / "s", shards=1, images_per_shard=3), tmp_path / "out", client=client
    )
    assert repr(show(tmp_path / "out", 2)) == "<ContactSheet: 2 images>"
    with pytest.raises(TypeError, match="expected, not str"):
        show(str(tmp_path / "s"))


def test_reprs_are_a_line():
    image, failed = *make_images(1), *make_failed(1)
    assert repr(image) == "<ImageObject 's-1/0.jpg' 40 x 30 jpeg>"
    assert repr(failed) == "<ImageObject 's-1/f0.jpg' failed: truncated>"
    assert repr(ImageObject("s.tar/a.jpg")) == "<ImageObject 's.tar/a.jpg'>"
    assert repr(ImageBatch([image] * 98, "d", "s_0", [failed] * 2, 3)) == (
        "<ImageBatch 's_0': 98 images, 2 failed, 3 skipped>"
    )
    assert repr(ImageBatch([image])) == "<ImageBatch '': 1 image>"
    texts = ["a\n" * 10_000, "\0" * 10_000]
    for long in (
        *(ImageObject(image_id=text, error=text) for text in texts),
        *(ImageBatch([image] * 100, task_id=text) for text in texts),
        *(FileGroupTask(text, [f"/{text}.tar"] * 1000, text) for text in texts),
        *(ImageReaderStage(relative_to=text, sidecars=(text,)) for text in texts),
    ):
        assert len(repr(long)) < 200
        assert "\n" not in repr(long)


def test_a_tasks_repr_says_what_it_reads():
    assert repr(FileGroupTask()) == "<FileGroupTask '': no shards>"
    assert repr(FileGroupTask(data=["a.tar"], task_id="t", byte_range=(0, 4096))) == (
        "<FileGroupTask 't': a.tar, bytes 0 to 4,096>"
    )
    rows = make_frame(make_images(3))
    shards = [f"s3://me:pw@host/{number}.tar" for number in range(1200)]
    task = FileGroupTask(data=shards, task_id="t", rows=rows)
    assert repr(task) == "<FileGroupTask 't': s3://host/0.tar and 1,199 more, 3 images>"
    assert repr(FileGroupTask(data=["a.tar"], byte_range=(512, None))) == (
        "<FileGroupTask '': a.tar, bytes 512 to the end>"
    )


def test_tasks_readers_and_summaries_show_themselves():
    sizes = tuple(range(1 << 20, (1 << 20) + 1200))
    options = {"relative_to": "s3://me:pw@host/d"}
    shards = [f"s3://me:pw@host/d/{HOSTILE}{number}.tar" for number in range(1200)]
    task = FileGroupTask(HOSTILE, shards, HOSTILE, options, sizes=sizes)
    reader = ImageReaderStage(resize=64, fit="crop", relative_to=f"https://me:pw@h/{HOSTILE}")
    numbers = dict.fromkeys(Summary.__dataclass_fields__, 1234) | {"decoded": False}
    for thing, words in (
        (task, ("shards 1,200", "1.00 MiB", "and 1,195 more")),
        (reader, ("fit 'crop'", "resize 64", "20 options with their defaults", "max_pixels")),
        (Summary(**numbers), ("failed 1,234", "1,234 new", "only headers were read")),
    ):
        page = Page(thing._repr_html_())
        text = " ".join(page.text.split())
        assert [word for word in words if word not in text] == []
        assert {tag for tag, _ in page.tags} <= {"div", "table", "tr", "th", "td", *DETAILS}
        assert "pw" not in text
        assert len(thing._repr_html_()) < 10_000
    assert "options with their defaults" in ImageReaderStage()._repr_html_()


def test_a_readers_repr_shows_what_was_chosen_and_no_secret():
    assert repr(ImageReaderStage()) == "ImageReaderStage()"
    reader = ImageReaderStage(50, resize=(2, 3), relative_to="https://me:pw@host/d?token=1f0c")
    assert repr(reader) == (
        "ImageReaderStage(dali_batch_size=50, resize=(2, 3), "
        "relative_to='https://host/d?token=***')"
    )


def test_equality_stays_that_of_a_dataclass():
    first, second = make_failed(2)
    assert first == make_failed(1)[0] != second
    assert ImageBatch(failed=[first]) == ImageBatch(failed=make_failed(1)) != ImageBatch()


def test_a_batch_is_a_sequence_of_its_images():
    images = make_images(5)
    batch = ImageBatch(images, failed=make_failed(2))
    assert len(batch) == batch.num_items == 5
    assert list(batch) == [*batch] == images
    assert batch[0] is images[0]
    assert batch[-1] is images[-1]
    assert batch[1:3] == images[1:3]
    assert batch.ids == [image.image_id for image in images]


def test_a_batch_of_failures_only_is_true():
    kept = [ImageBatch(failed=make_failed(1)), ImageBatch(skipped=1), ImageBatch(make_images(1))]
    assert list(filter(None, [ImageBatch(), *kept])) == kept
    assert len(kept[0]) == 0


def stack(images, **values):
    return ImageBatch(images, **values).stack()  # noqa: PD013


def test_stack():
    images = make_images(3)
    stacked = stack(images, failed=make_failed(1))
    assert stacked.dtype == np.uint8
    for pixels, image in zip(stacked, images, strict=True):
        assert np.array_equal(pixels, image.image_data)
    assert stack([], failed=make_failed(1)).shape == (0, 0, 0, 3)
    assert stack([]).dtype == np.uint8
    assert stack([], image_size=(224, 160)).shape == (0, 224, 160, 3)


def test_what_can_not_be_stacked():
    mixed = [*make_images(2), *make_images(1, (8, 9, 3))]
    message = (
        r"2 shapes .*: \(30, 40, 3\) of s-1/0.jpg and 1 more, \(8, 9, 3\) of s-1/0.jpg; "
        r"read them with resize=\(height, width\)"
    )
    with pytest.raises(ValueError, match=message):
        stack(mixed)
    many = [*mixed, *(image for side in range(1, 9) for image in make_images(1, (side, 1, 3)))]
    with pytest.raises(ValueError, match=r"10 shapes .*, …; read"):
        stack(many)
    with pytest.raises(ValueError, match="a-1 has no pixels: it was not decoded"):
        stack([ImageObject(image_id="a-1")])
    with pytest.raises(ValueError, match=r"of a-1 are in a GPU's memory: .* output='host'"):
        stack([ImageObject(image_id="a-1", image_data=OnGpu())])


def test_to_pil():
    (image,) = make_images(1)
    picture = image.to_pil()
    assert (picture.mode, picture.size) == ("RGB", (40, 30))
    assert np.array_equal(picture, image.image_data)
    with pytest.raises(ValueError, match=r"f0\.jpg has no pixels: truncated: the image ends"):
        make_failed(1)[0].to_pil()
