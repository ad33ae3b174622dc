"""Fingerprints: their hashes against imagehash, their measures against plain references."""

import io
import itertools
import tracemalloc

import imagehash
import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw, ImageFile
from scipy import fftpack, ndimage

from dask_imgread import (
    FileGroupTask,
    ImageBatch,
    ImageObject,
    ImageReaderStage,
    fingerprint,
    load_images,
    map_images,
    run_job,
    write_shards,
)
from dask_imgread.cli.main import main
from dask_imgread.fingerprints import MIN_SIDE
from dask_imgread.hashes import _transform, shrink
from dask_imgread.tasks import COLUMNS
from dask_imgread.testing import draw_picture, make_shards, write_shard
from tests.helpers.images import encode

WHOLE = fingerprint.reader.with_options(device="cpu", min_side=None, verbose=False)
SCALED = fingerprint.reader.with_options(device="cpu", verbose=False)


def take(*pictures):
    """Return the fingerprints of pictures or arrays."""
    arrays = [np.asarray(picture.convert("RGB")) for picture in map(to_picture, pictures)]
    images = [
        ImageObject(image_id=f"s/{n}", image_data=a, width=a.shape[1], height=a.shape[0])
        for n, a in enumerate(arrays)
    ]
    rows = fingerprint(ImageBatch(images))
    assert list(rows.index) == [image.image_id for image in images]
    return rows


def to_picture(picture):
    return picture if isinstance(picture, Image.Image) else Image.fromarray(picture)


def hash_with_imagehash(picture):
    picture = picture.convert("RGB")
    return str(imagehash.phash(picture)), str(imagehash.dhash(picture))


def to_text(rows):
    return [tuple(map("{:016x}".format, pair)) for pair in zip(rows.phash, rows.dhash, strict=True)]


def read_rows(path, contents, reader):
    members = [(f"{n:04}.jpg", content) for n, content in enumerate(contents)]
    task = FileGroupTask(data=[write_shard(path / "s.tar", members)])
    rows = pd.concat(fingerprint(batch) for batch in reader.process(task))
    assert len(rows) == len(contents)
    return rows


def draw_symmetric():
    """Pictures many of whose frequencies are zero but for rounding."""
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    across = np.tile(ramp, (64, 1))
    checks = np.indices((64, 64)).sum(axis=0) // 8 % 2 * 255
    ring = np.hypot(*(np.indices((64, 64)) - 31.5)) * 5 % 256
    yield from (across, across.T, across[:, ::-1], np.minimum(across, across[:, ::-1]))
    yield from (checks.astype(np.uint8), ring.astype(np.uint8), checks[:32].astype(np.uint8))
    for level in (0, 1, 127, 128, 200, 255):
        yield np.full((40, 50), level, np.uint8)
    for size in (8, 16, 32, 64):
        for level in (1, 77, 255):
            stripes = np.zeros((size, size), np.uint8)
            stripes[::2] = level
            yield from (stripes, stripes.T)
            dot = np.zeros((size, size), np.uint8)
            dot[size // 2, size // 2] = level
            yield dot


def test_hashes_of_photographs_are_imagehashs(photographs):
    assert to_text(take(*photographs)) == [hash_with_imagehash(photo) for photo in photographs]


def test_hashes_of_drawings_are_imagehashs():
    drawn = [draw_picture(n, (64 + 7 * n % 50, 48 + n)) for n in range(150)]
    assert to_text(take(*drawn)) == [hash_with_imagehash(picture) for picture in drawn]


def test_hashes_of_symmetric_pictures_are_imagehashs():
    """What rounding decides: whether a frequency that is zero is above a median of zero."""
    pictures = [to_picture(array) for array in draw_symmetric()]
    assert to_text(take(*pictures)) == [hash_with_imagehash(picture) for picture in pictures]


def test_hashes_of_odd_sizes_are_imagehashs():
    sizes = [(1, 1), (1, 90), (90, 1), (2, 3), (7, 8), (8, 9), (9, 8), (31, 33), (32, 32)]
    sizes += [(3000, 2), (1, 5000), (4000, 31)]
    pictures = [draw_picture(n, size) for n, size in enumerate(sizes)]
    noise = np.random.default_rng(0).integers(0, 256, (23, 45, 3), np.uint8)
    pictures += [Image.fromarray(noise[:height]) for height in range(1, 23)]
    assert to_text(take(*pictures)) == [hash_with_imagehash(picture) for picture in pictures]


@pytest.mark.parametrize(
    ("height", "width"),
    # The two hashes differ in when they shrink columns first: of the last three.
    [
        *[(112, 150), (150, 112), (1, 1), (3, 700), (700, 3), (17, 23), (32, 32), (33, 8)],
        *[(300, 160), (278, 150), (90, 50), (8, 9)],
    ],
)
@pytest.mark.parametrize("outside", [0, 0.25, 0.875])
def test_pictures_are_shrunk_as_by_pillow(height, width, outside):
    levels = np.random.default_rng(height).integers(0, 256, (height, width), np.uint8)
    box = 0, 0, width - outside, height - outside
    for shrunk, size in zip(shrink(levels, box), [(32, 32), (9, 8)], strict=True):
        expected = Image.fromarray(levels).resize(size, Image.Resampling.LANCZOS, box)
        assert np.array_equal(shrunk, np.asarray(expected))


def test_weights_of_long_lines_are_not_kept():
    box = 0, 0, 3000, 1
    shrink(np.zeros((1, 3000), np.uint8), box)
    tracemalloc.start()
    try:
        for width in range(3001, 3021):
            shrink(np.zeros((1, width), np.uint8), box)
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_hashes_of_every_mode_are_those_of_its_rgb(tmp_path, photographs, mode):
    picture = photographs[1].convert(mode)
    content = encode(picture, "TIFF")
    rows = read_rows(tmp_path, [content], WHOLE)
    assert to_text(rows) == [hash_with_imagehash(picture)]
    assert rows.format.tolist() == ["tiff"]


def test_the_cosine_transform_is_scipys():
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [
            rng.integers(0, 256, (5000, 32)),
            rng.integers(0, 2, (1000, 32)) * 255,
            np.repeat(np.arange(256), 32).reshape(-1, 32),
            rng.random((1000, 32)) * 1e4,
        ]
    ).astype(float)
    np.testing.assert_array_equal(_transform(values), fftpack.dct(values, axis=1))


@pytest.fixture(scope="module")
def crops(photographs):
    """Crops of photographs, as they are and enlarged, as JPEG."""
    rng = np.random.default_rng(0)
    contents = []
    for n, photo in zip(range(280), itertools.cycle(photographs), strict=False):
        width, height = (int(rng.integers(250, min(640, side) + 1)) for side in photo.size)
        left, top = rng.integers(0, 1 + np.subtract(photo.size, (width, height)))
        crop = photo.crop((left, top, left + width, top + height))
        if n % 8 == 0:
            crop = crop.resize((3 * width + 1, 3 * height + 2), Image.Resampling.LANCZOS)
        contents.append(encode(crop, "JPEG", quality=90))
    return contents


def test_scaled_pictures_have_nearly_the_hashes_of_whole_ones(tmp_path, crops):
    whole = read_rows(tmp_path, crops, WHOLE)
    scaled = read_rows(tmp_path, crops, SCALED)
    for name in ("phash", "dhash"):
        pairs = zip(whole[name], scaled[name], strict=True)
        bits = np.array([(one ^ other).bit_count() for one, other in pairs])
        print(f"{name}: {(bits > 2).mean():.2%} differ in more than 2 bits, {bits.max()} at most")
        assert np.mean(bits <= 2) >= 0.99
        assert 0 < bits.max() <= 6
    for name, most in (("brightness", 1.5), ("spread", 8), ("contrast", 0.1), ("entropy", 0.2)):
        assert (whole[name] - scaled[name]).abs().max() < most, name
    assert (scaled.sharpness / whole.sharpness).between(0.7, 1.5).all()
    ratio = scaled.colourfulness / whole.colourfulness
    assert ratio.between(0.9, 1.1).all()
    for name in ("blank", "grey", "flat_tail", "border", "sha256", "width", "height"):
        assert (whole[name] == scaled[name]).all(), name


def test_measures_are_those_of_plain_references(photographs):
    pictures = [*photographs, *(draw_picture(n, (90, 70)) for n in range(5))]
    rows = take(*pictures)
    for row, picture in zip(rows.itertuples(), pictures, strict=True):
        luma = np.asarray(picture.convert("L"))
        assert row.brightness == pytest.approx(luma.mean(), rel=1e-5)
        assert row.spread == pytest.approx(luma.std(), rel=1e-5)
        low, high = np.percentile(luma, [1, 99])
        assert row.contrast == pytest.approx((high - low) / 255, abs=1e-6)
        shares = np.unique(luma, return_counts=True)[1] / luma.size
        assert row.entropy == pytest.approx(-(shares * np.log2(shares)).sum(), rel=1e-5)
        small = picture.convert("L").resize((64, 64), Image.Resampling.BOX)
        laplacian = ndimage.laplace(np.asarray(small).astype(float))[1:-1, 1:-1]
        assert row.sharpness == pytest.approx(laplacian.var(), rel=1e-4)


def measure_colourfulness(pixels):
    red, green, blue = pixels.reshape(-1, 3).astype(float).T
    first, second = red - green, (red + green) / 2 - blue
    spread = np.sqrt(first.var() + second.var())
    return spread + 0.3 * np.sqrt(first.mean() ** 2 + second.mean() ** 2)


def test_colourfulness(photographs):
    rng = np.random.default_rng(3)
    exact = [rng.integers(0, 256, (64, 64, 3), np.uint8), np.full((64, 64, 3), 9, np.uint8)]
    expected = [measure_colourfulness(pixels) for pixels in exact]
    assert take(*exact).colourfulness.tolist() == pytest.approx(expected, rel=1e-4)
    of_all = [measure_colourfulness(np.asarray(photo)) for photo in photographs]
    assert take(*photographs).colourfulness.tolist() == pytest.approx(of_all, rel=0.05)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 1), (1, 500), (500, 1), (5, 20_000)])
def test_pictures_of_few_pixels_have_all_measures(size):
    rows = take(draw_picture(2, size))
    numbers = rows.select_dtypes("number").drop(columns=["sample_offset", "sample_size"])
    assert np.isfinite(numbers.to_numpy(float)).all()
    assert rows.entropy.between(0, 8).all()


def find_flags(*pictures):
    """Return the names of the flags that are set for each picture."""
    rows = take(*pictures)[["blank", "grey", "flat_tail", "border"]]
    return [{name for name in rows if row[name]} for _, row in rows.iterrows()]


def compress(picture, quality=85):
    """Return what is left of a picture that was saved as JPEG."""
    return Image.open(io.BytesIO(encode(picture, "JPEG", quality=quality))).convert("RGB")


def test_photographs_have_no_flags(photographs):
    assert find_flags(*photographs) == [set()] * len(photographs)


@pytest.mark.parametrize("quality", [40, 85])
def test_blank_pictures(quality):
    colours = ["white", "black", (255, 0, 0), (120, 180, 90)]
    blank = [compress(Image.new("RGB", (300, 200), colour), quality) for colour in colours]
    found = find_flags(*blank)
    assert found == [{"blank", "grey"}] * 2 + [{"blank"}] * 2
    page = Image.new("RGB", (301, 201), "white")
    page.putpixel((150, 100), (0, 0, 0))  # between the pixels that stand for the picture
    assert "blank" not in find_flags(page)[0]


def test_grey_pictures(photographs):
    grey = photographs[0].convert("L").convert("RGB")
    warm = np.asarray(grey) * np.array([1.0, 0.9, 0.7])
    assert find_flags(grey, compress(grey), warm.astype(np.uint8)) == [{"grey"}, {"grey"}, set()]


@pytest.mark.parametrize("share", [0.08, 0.3, 0.9])
def test_a_truncated_picture_has_a_flat_tail(photographs, share):
    """Pillow fills what is missing with grey, other programs repeat a colour."""
    colours = [(128, 128, 128), (0, 0, 0), (90, 140, 60)]
    for photo, colour in zip(photographs[:3], colours, strict=True):
        cut = photo.copy()
        top = round(photo.height * (1 - share)) // 16 * 16
        ImageDraw.Draw(cut).rectangle((0, top, photo.width, photo.height), fill=colour)
        ImageDraw.Draw(cut).rectangle((photo.width // 2, top - 16, photo.width, top), fill=colour)
        assert find_flags(cut, compress(cut)) == [{"flat_tail"}] * 2


def test_what_pillow_makes_of_a_truncated_file_has_a_flat_tail(photographs, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for photo in photographs:
        content = encode(photo, "JPEG", quality=90)
        cut = Image.open(io.BytesIO(content[: len(content) * 6 // 10])).convert("RGB")
        assert find_flags(cut) == [{"flat_tail"}]


def test_a_drawn_foreground_is_no_tail():
    """Neither as it is drawn, nor compressed: it ends in a curve."""
    drawn = [draw_picture(n, (400, 300)) for n in range(100)]
    flagged = [
        "flat_tail" in flags for flags in find_flags(*drawn, *(compress(p, 90) for p in drawn))
    ]
    assert sum(flagged) <= 6


def test_margins_are_a_border(photographs):
    photo = photographs[0].resize((400, 300))
    for colour in ("white", "black", (40, 60, 90)):
        all_around = Image.new("RGB", (440, 340), colour)
        all_around.paste(photo, (20, 20))
        above_and_below = Image.new("RGB", (400, 420), colour)
        above_and_below.paste(photo, (0, 60))
        left_and_right = Image.new("RGB", (500, 300), colour)
        left_and_right.paste(photo, (50, 0))
        pictures = [all_around, above_and_below, left_and_right]
        assert find_flags(*pictures, *map(compress, pictures)) == [{"border"}] * 6
        one_sided = Image.new("RGB", (500, 300), colour)
        one_sided.paste(photo, (100, 0))
        assert find_flags(one_sided) == [set()]


def test_its_rows_are_a_frame(tmp_path, photo_shards, client):
    frame = map_images(fingerprint, photo_shards[:2], reader=SCALED)
    rows = frame.compute()
    assert rows.dtypes.equals(fingerprint.meta.dtypes)
    assert len(rows) == 50
    assert rows.sha256.notna().all()
    assert {*rows} & {*COLUMNS} == {
        *("shard", "shard_version", "key", "offset", "size", "sample_offset", "sample_size"),
        *("format", "width", "height"),
    }
    chosen = rows.nlargest(5, "sharpness")
    again = load_images(chosen, reader=WHOLE)
    assert [image.image_id for image in again] == chosen.index.tolist()
    assert to_text(fingerprint(ImageBatch(again))) == [
        hash_with_imagehash(image.to_pil()) for image in again
    ]
    assert len(write_shards(chosen, tmp_path / "chosen", client=client)) == 5
    once_more = map_images(fingerprint, chosen, reader=SCALED).compute()
    pd.testing.assert_frame_equal(once_more.loc[chosen.index], chosen)


def test_without_images_it_has_its_columns():
    rows = fingerprint(ImageBatch(failed=[ImageObject(error="empty: no bytes")]))
    pd.testing.assert_frame_equal(rows, fingerprint.meta)


def test_without_checksums_there_are_none(photographs):
    rows = take(photographs[0])
    assert rows.sha256.isna().all()
    assert rows.dtypes.equals(fingerprint.meta.dtypes)


def test_what_has_no_pixels_is_refused():
    with pytest.raises(ValueError, match="has no pixels"):
        fingerprint(ImageBatch([ImageObject(image_id="s/a")]))


def test_it_is_a_job_that_is_declared(tmp_path, photo_shards, client):
    summary = run_job(photo_shards[:1], tmp_path / "out", fingerprint, client=client, reader=SCALED)
    assert (summary.images, summary.failed) == (25, 0)
    rows = pd.read_parquet(tmp_path / "out")
    assert rows.phash.dtype == rows.dhash.dtype == "uint64[pyarrow]"
    assert rows.blank.dtype == "bool[pyarrow]"


def test_the_command(tmp_path, photographs, client, monkeypatch, capsys):
    monkeypatch.setattr("dask_imgread.cli.commands.start_logging", lambda log_format: None)
    make_shards(tmp_path / "shards", shards=2, images_per_shard=3, broken=1)
    photos = [encode(photo, "JPEG", quality=90) for photo in photographs]
    write_shard(tmp_path / "shards" / "p.tar", [(f"{n}.jpg", c) for n, c in enumerate(photos)])
    arguments = [str(tmp_path / "shards"), "--device", "cpu"]
    arguments += ["--scheduler", client.scheduler.address]
    whole = []
    for name, more in (("scaled", []), ("exact", ["--exact"])):
        command = ["fingerprint", *arguments, "--out", str(tmp_path / name), *more]
        assert main(command) == 0
        assert "12 images, 1 failed" in capsys.readouterr().out
        assert main(command) == 0
        assert "nothing left to read" in capsys.readouterr().out
        whole.append(pd.read_parquet(tmp_path / name))
    scaled, exact = whole
    assert len(scaled) == len(exact) == 12
    assert scaled.sha256.notna().all()
    photos = exact[exact.shard.str.endswith("p.tar")].sort_index()
    assert to_text(photos) == [hash_with_imagehash(compress(p, 90)) for p in photographs]
    assert (scaled.sharpness != exact.sharpness).any()
    assert main(["fingerprint", *arguments, "--out", str(tmp_path / "scaled"), "--exact"]) == 2
    assert "min_side" in capsys.readouterr().err


def test_the_reader_reduces_to_min_side():
    assert fingerprint.reader == ImageReaderStage(min_side=MIN_SIDE, checksum=True, sidecars=False)
