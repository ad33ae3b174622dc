"""Resized pictures: their sizes, and how near a scaled decoding comes to the exact way."""

import functools
import itertools
import subprocess
import sys

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from dask_imgread import FileGroupTask, ImageReaderStage
from dask_imgread.testing import draw_picture, encode_picture, write_shard
from tests.helpers.images import both_decoders, encode, read_with_pillow

read_with_pillow = functools.lru_cache(64)(read_with_pillow)  # large ones, again and again


def read(path, contents, **options):
    members = [(f"{n:03d}.jpg", content) for n, content in enumerate(contents)]
    reader = ImageReaderStage(device="cpu", **options)
    batches = reader.process(FileGroupTask(data=[write_shard(path / "s.tar", members)]))
    assert not any(batch.failed for batch in batches)
    return [image for batch in batches for image in batch.data]


def resize_exactly(content, size):
    pixels = Image.fromarray(read_with_pillow(content))
    return np.asarray(pixels.resize(size[::-1], Image.Resampling.BILINEAR))


def measure_psnr(one, other):
    error = np.mean((one.astype(float) - other) ** 2)
    return 10 * np.log10(255**2 / error) if error else np.inf


@pytest.fixture(scope="module")
def large_photographs(photographs):
    """Photographs as soft as a camera's, at sizes from which 1/2, 1/4 and 1/8 lead to 224."""
    sizes = [(1024, 768), (1283, 977), (2048, 1536), (3200, 2400)]
    return [
        encode(photo.resize(size, Image.Resampling.LANCZOS), "JPEG", quality=90, subsampling=n % 3)
        for n, (photo, size) in enumerate(zip(photographs, itertools.cycle(sizes), strict=False))
    ]


def measure_scaled_decoding(path, contents, resize):
    """Return what the error of each picture is, in dB, and how many were decoded at a scale."""
    images = read(path, contents, resize=resize)
    psnr = []
    for image, content in zip(images, contents, strict=True):
        assert image.backend == "libjpeg-turbo"
        expected = resize_exactly(content, image.image_data.shape[:2])
        psnr.append(measure_psnr(image.image_data, expected))
    overall = -10 * np.log10(np.mean(10 ** (-np.array(psnr) / 10)))
    print(f"resize={resize}: {overall:.1f} dB over all, {min(psnr):.1f} dB at least")
    return overall, min(psnr), np.isfinite(psnr).sum()


@pytest.mark.parametrize("resize", [224, (224, 224), 96, (160, 300)])
def test_scaled_decoding_comes_near_the_exact_way(tmp_path, large_photographs, resize):
    overall, least, scaled = measure_scaled_decoding(tmp_path, large_photographs, resize)
    assert overall >= 45
    assert least >= 41
    assert scaled >= 5


@pytest.mark.parametrize("resize", [40, 96, 120, 150])
def test_scaled_decoding_of_the_sharpest_pictures(tmp_path, photographs, resize):
    """Pictures that were made smaller before have all the detail that pixels can have."""
    contents = [encode(photo, "JPEG", quality=90) for photo in photographs]
    _, least, scaled = measure_scaled_decoding(tmp_path, contents, resize)
    assert least >= 37
    assert scaled >= 1


def test_without_scaled_decoding_it_is_the_exact_way(tmp_path, large_photographs):
    contents = large_photographs[:6]
    images = read(tmp_path, contents, resize=224, scaled_decoding=False)
    for image, content in zip(images, contents, strict=True):
        expected = resize_exactly(content, image.image_data.shape[:2])
        np.testing.assert_array_equal(image.image_data, expected)


@pytest.mark.parametrize("resize", [40, (40, 90)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_pictures_are_resized_upright(tmp_path, orientation, resize, photographs):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(photographs[1].resize((450, 300)), "JPEG", quality=95, exif=exif)
    for decoder in ("auto", "dali"):
        (image,) = read(tmp_path, [content], resize=resize, decoder=decoder)
        upright = read_with_pillow(content).shape[:2]
        assert (image.height, image.width) == upright
        expected = resize_exactly(content, image.image_data.shape[:2])
        assert measure_psnr(image.image_data, expected) > 38
        if isinstance(resize, tuple):
            assert image.image_data.shape[:2] == resize
        else:
            assert min(image.image_data.shape[:2]) == resize
            assert (image.image_data.shape[0] > image.image_data.shape[1]) == (
                upright[0] > upright[1]
            )


def test_all_decoders_choose_the_same_size(tmp_path):
    sizes = [(64, 48), (48, 64), (33, 100), (100, 33), (10, 25), (10, 35), (1, 90), (7, 7)]
    for resize in (5, 16, 33, 200):
        shapes = []
        for decoder, extension in itertools.product(("auto", "dali"), ("jpg", "png", "bmp")):
            contents = [encode_picture(draw_picture(1, size), extension) for size in sizes]
            images = read(tmp_path, contents, resize=resize, decoder=decoder)
            shapes.append([image.image_data.shape for image in images])
            assert [(image.width, image.height) for image in images] == sizes
        assert all(shape == shapes[0] for shape in shapes), resize


@both_decoders
def test_pictures_of_every_size_are_resized(tmp_path, decoder):
    """Where rounding up at 1/8 could leave too little, or one side is a few pixels long."""
    sizes = [(w, h) for w in (1, 2, 7, 8, 9, 15, 63, 65, 129) for h in (1, 3, 8, 17, 64, 127)]
    contents = [encode_picture(draw_picture(n, size)) for n, size in enumerate(sizes)]
    for resize in (8, (16, 16), (1, 64)):
        images = read(tmp_path, contents, resize=resize, decoder=decoder)
        for image, content in zip(images, contents, strict=True):
            expected = resize_exactly(content, image.image_data.shape[:2])
            difference = np.abs(image.image_data.astype(int) - expected)
            assert difference.mean() < 12, (image.width, image.height, resize)


SIZES = [(1, 1), (1, 90), (90, 1), (2, 1), (33, 100), (300, 200), (201, 301), (3000, 4), (64, 64)]
FILTERS = ("bilinear", "bicubic", "lanczos")


def fit_exactly(content, size, fit, resample):
    image = Image.fromarray(read_with_pillow(content))
    method = Image.Resampling[resample.upper()]
    if fit == "exact":
        return np.asarray(image.resize(size[::-1], method))
    return np.asarray(ImageOps.fit(image, size[::-1], method))


@pytest.fixture(scope="module")
def all_sizes(photographs):
    """A picture in all sizes, by codec."""
    pictures = [photographs[1].resize(size) for size in SIZES]
    return {codec: [encode(p, codec) for p in pictures] for codec in ("BMP", "WEBP", "JPEG", "PNG")}


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize("fit", ["exact", "crop"])
@pytest.mark.parametrize("resize", [64, (50, 90), (100, 6)])
def test_all_sizes_are_fitted_as_pillow_does(tmp_path, all_sizes, resize, fit, resample):
    """Bit for bit where Pillow resizes; and DALI comes near it."""
    size = (resize, resize) if isinstance(resize, int) else resize
    options = {"resize": resize, "fit": fit, "resample": resample, "scaled_decoding": False}
    for codec, decoder, least in (
        *(("BMP", "auto", np.inf), ("WEBP", "auto", np.inf), ("JPEG", "auto", np.inf)),
        *(("PNG", "auto", 37), ("JPEG", "dali", 37)),
    ):
        contents = all_sizes[codec]
        images = read(tmp_path, contents, decoder=decoder, **options)
        for image, content in zip(images, contents, strict=True):
            expected = fit_exactly(content, size, fit, resample)
            assert image.image_data.shape == (*size, 3)
            assert measure_psnr(image.image_data, expected) >= least, (codec, image)


@pytest.mark.parametrize(
    ("codec", "decoder"), [("JPEG", "auto"), ("JPEG", "dali"), ("WEBP", "auto"), ("PNG", "auto")]
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_pictures_are_cropped_upright(tmp_path, photographs, orientation, codec, decoder):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(photographs[1].resize((450, 301)), codec, exif=exif)
    for size in ((90, 40), (64, 64)):
        (image,) = read(tmp_path, [content], resize=size, fit="crop", decoder=decoder)
        expected = fit_exactly(content, size, "crop", "bilinear")
        assert image.image_data.shape == (*size, 3)
        least = np.inf if image.backend == "pillow" else 38
        assert measure_psnr(image.image_data, expected) >= least


@pytest.mark.parametrize(
    ("resize", "fit", "resample"),  # each with each of the others
    [
        *[(224, "shorter", "bilinear"), (96, "shorter", "bicubic"), (224, "shorter", "lanczos")],
        *[(96, "crop", "bilinear"), (224, "crop", "bicubic"), (96, "crop", "lanczos")],
    ],
)
def test_scaled_decoding_suits_every_filter(tmp_path, large_photographs, resize, fit, resample):
    options = {"resize": resize, "fit": fit, "resample": resample}
    scaled = read(tmp_path, large_photographs, **options)
    exact = read(tmp_path, large_photographs, scaled_decoding=False, **options)
    psnr = [
        measure_psnr(one.image_data, other.image_data)
        for one, other in zip(scaled, exact, strict=True)
    ]
    assert np.isfinite(psnr).sum() >= 5
    assert min(psnr) >= 41


@pytest.mark.parametrize("options", [{}, {"decoder": "dali"}, {"isolate": True}])
def test_what_is_cropped_can_be_stacked(tmp_path, options):
    """Of any shape, without a limit for one that would be long if its shorter side were scaled."""
    sizes = [(640, 480), (3, 5000), (1, 1), (480, 640)]
    contents = [encode_picture(draw_picture(1, size)) for size in sizes] + [b"no image"]
    shard = write_shard(tmp_path / "s.tar", [(f"{n}.jpg", c) for n, c in enumerate(contents)])
    cropping = {"resize": (224, 160), "fit": "crop", "max_pixels": 640 * 480}
    reader = ImageReaderStage(device="cpu", **cropping, **options)
    (batch,) = reader.process(FileGroupTask(data=[shard]))
    assert batch.stack().shape == (4, 224, 160, 3)
    assert [(image.width, image.height) for image in batch] == sizes
    broken = write_shard(tmp_path / "b.tar", [("a.jpg", b"no image")])
    (none,) = reader.process(FileGroupTask(data=[broken]))
    assert none.stack().shape == (0, 224, 160, 3)
    (header,) = reader.with_options(decode=False).process(FileGroupTask(data=[broken]))
    assert header.image_size is None


def reduce_exactly(content, scale):
    return np.asarray(Image.fromarray(read_with_pillow(content)).reduce(scale))


@pytest.fixture(scope="module")
def scales(photographs):
    """Pictures in several formats, each with the smallest scale that leaves it 64 pixels."""
    sides = {63: 1, 127: 1, 128: 2, 255: 2, 256: 4, 511: 4, 512: 8, 777: 8}
    formats = {"JPEG": {"quality": 95}, "PNG": {"compress_level": 1}, "WEBP": {}, "BMP": {}}
    scales = {}
    for side, scale in sides.items():
        picture = photographs[1].resize((side + 30, side))
        for upright in (picture, picture.transpose(Image.Transpose.ROTATE_90)):
            scales |= {encode(upright, codec, **how): scale for codec, how in formats.items()}
    return scales


@pytest.mark.parametrize("options", [{}, {"decoder": "dali"}, {"isolate": True}])
def test_pictures_are_reduced_to_min_side(tmp_path, scales, options):
    """To the smallest scale that leaves so much, whatever decodes them."""
    images = read(tmp_path, scales, min_side=64, **options)
    for image, (content, scale) in zip(images, scales.items(), strict=True):
        expected = reduce_exactly(content, scale)
        assert image.image_data.shape == expected.shape
        if scale == 1:
            np.testing.assert_array_equal(image.image_data, expected)
        # What DALI reduces overlaps: it is as much softer as other filters are.
        assert measure_psnr(image.image_data, expected) > 28
        assert (image.height, image.width) == read_with_pillow(content).shape[:2]


@both_decoders
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_pictures_are_reduced_upright(tmp_path, orientation, decoder, photographs):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(photographs[1].resize((450, 301)), "JPEG", quality=95, exif=exif)
    (image,) = read(tmp_path, [content], min_side=75, decoder=decoder)
    expected = reduce_exactly(content, 4)
    assert image.image_data.shape == expected.shape
    # Where it is mirrored, the last pixels, of fewer than four, are at the other end.
    assert measure_psnr(image.image_data, expected) > 22


def test_a_jpeg_is_decoded_at_the_scale_alone(tmp_path, photographs):
    content = encode(photographs[0].resize((800, 640)), "JPEG", quality=95, subsampling=0)
    for min_side, scale in ((80, 8), (81, 4), (160, 4), (320, 2), (321, 1)):
        (image,) = read(tmp_path, [content], min_side=min_side)
        assert image.backend == "libjpeg-turbo"
        drafted = simplejpeg.decode_jpeg(
            content,
            "RGB",
            min_height=640 // scale,
            min_width=800 // scale,
            min_factor=scale,
        )
        np.testing.assert_array_equal(image.image_data, drafted)


def test_min_side_reduces_the_memory_of_a_batch(tmp_path):
    content = encode_picture(draw_picture(1, (2000, 1000)))
    shard = write_shard(tmp_path / "s.tar", [(f"{n}.jpg", content) for n in range(10)])
    limit = 10 * max(125 * 250 * 3, len(content))
    reader = ImageReaderStage(device="cpu", min_side=100, max_batch_bytes=limit)
    assert [b.num_items for b in reader.process(FileGroupTask(data=[shard]))] == [10]


def test_min_side_is_checked():
    with pytest.raises(ValueError, match="min_side must be at least 1"):
        ImageReaderStage(min_side=0)
    with pytest.raises(ValueError, match="resize and min_side can't be given together"):
        ImageReaderStage(min_side=64, resize=64)


def test_the_memory_of_what_comes_out_cuts_a_batch(tmp_path):
    """What is decoded on the way is thrown away picture by picture."""
    content = encode_picture(draw_picture(1, (2000, 1000)))
    shard = write_shard(tmp_path / "s.tar", [(f"{n}.jpg", content) for n in range(10)])
    limit = 10 * max(100 * 200 * 3, len(content))
    reader = ImageReaderStage(device="cpu", resize=100, max_batch_bytes=limit)
    assert [b.num_items for b in reader.process(FileGroupTask(data=[shard]))] == [10]
    whole = ImageReaderStage(device="cpu", resize=100, max_batch_bytes=limit, decoder="dali")
    assert len(whole.process(FileGroupTask(data=[shard]))) > 1


@both_decoders
def test_what_would_come_out_too_large_is_refused(tmp_path, decoder):
    contents = [encode_picture(draw_picture(1, size)) for size in ((1, 20_000), (60, 40))]
    shard = write_shard(tmp_path / "s.tar", [(f"{n}.jpg", c) for n, c in enumerate(contents)])
    reader = ImageReaderStage(device="cpu", resize=224, decoder=decoder)
    (batch,) = reader.process(FileGroupTask(data=[shard]))
    assert batch.num_items == 1
    assert batch.failed[0].error.startswith("too large: resized to 224 x 4480000 pixels")


CODECS = {"jpg": "libjpeg-turbo", "png": "dali-cpu", "webp": "pillow", "gif": "pillow"}


@pytest.mark.parametrize("options", [{}, {"decoder": "dali"}, {"isolate": True}])
def test_what_is_enlarged_cuts_a_batch_whatever_decodes_it(tmp_path, options):
    picture = draw_picture(1, (16, 12))
    contents = [content for codec in CODECS for content in [encode_picture(picture, codec)] * 7]
    shard = write_shard(tmp_path / "s.tar", [(f"{n:02}.jpg", c) for n, c in enumerate(contents)])
    for resize, large in ((120, 120 * 160 * 3), ((100, 300), 100 * 300 * 3)):
        reader = ImageReaderStage(device="cpu", resize=resize, max_batch_bytes=3 * large, **options)
        batches = reader.process(FileGroupTask(data=[shard]))
        assert [b.num_items for b in batches] == [3] * 9 + [1]
        images = [image for batch in batches for image in batch.data]
        assert all(image.image_data.nbytes == large for image in images)
        if not options:
            assert [i.backend for i in images] == [b for b in CODECS.values() for _ in range(7)]


TALL = """
import sys
from pathlib import Path
from dask_imgread import FileGroupTask, ImageReaderStage
for decoder in ("auto", "dali"):
    reader = ImageReaderStage(device="cpu", verbose=False, decoder=decoder, resize=(500, 500))
    (batch,) = reader.process(FileGroupTask(data=[sys.argv[1]]))
    print([(i.key, i.image_data.shape, round(i.image_data.mean())) for i in batch.data])
print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10)
"""


def test_nothing_much_larger_is_made_on_the_way(tmp_path):
    """Rows first, a picture one pixel wide would take 500 times its memory."""
    tall = Image.new("RGB", (1, 1_000_000), (70, 70, 70))
    members = {"a": encode(tall, "PNG"), "b": encode(tall, "BMP")}
    members["c"] = encode(tall.crop((0, 0, 1, 65_000)), "JPEG")
    shard = write_shard(tmp_path / "s.tar", [(f"{k}.jpg", v) for k, v in members.items()])
    command = [sys.executable, "-c", TALL, shard]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    *images, peak = done.stdout.splitlines()
    assert images == [str([(key, (500, 500, 3), 70) for key in "abc"])] * 2
    assert int(peak) < 600  # MiB
