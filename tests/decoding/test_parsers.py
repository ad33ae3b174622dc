"""Nothing that DALI's header parsers refuse, or misread, reaches a batch of DALI's."""

import itertools
import json
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from dask_imgread import FileGroupTask, ImageReaderStage
from dask_imgread.decoding.contract import DecoderOptions, Encoded
from dask_imgread.decoding.decode import Decoding, choose_backend
from dask_imgread.decoding.header import ImageError, read_header
from dask_imgread.decoding.parsers import is_intact
from dask_imgread.testing import write_shard
from tests.conftest import count_fuzz_inputs
from tests.helpers import odd_headers
from tests.helpers.images import PICTURE, encode, read_with_pillow

CPU = DecoderOptions("cpu", 1, 100, decoder="dali")
GPU = DecoderOptions("gpu", 1, 100)
ODD = odd_headers.REFUSED | odd_headers.KILLERS
GOOD = odd_headers.JPEG


def choose(content, options):
    try:
        return choose_backend(content, read_header(content), options)
    except ImageError:
        return None


@pytest.mark.parametrize("name", odd_headers.REFUSED)
def test_what_the_parsers_refuse_is_kept_from_them(name):
    assert choose(ODD[name], CPU) in (None, "pillow")
    assert choose(ODD[name], GPU) in (None, "pillow")


@pytest.mark.parametrize("name", odd_headers.SOUND)
def test_what_they_accept_is_given_to_them(name):
    content = odd_headers.SOUND[name]
    assert choose(content, CPU) == "dali-cpu"
    if name != "RGB without YCbCr.jpg":
        extension = name.rpartition(".")[2]
        on_gpu = {"jpg": "dali-gpu", "png": "dali-cpu", "webp": "pillow"}
        assert choose(content, GPU) == on_gpu[extension]
    (decoded,) = Decoding([Encoded(name, content, read_header(content), "dali-cpu")], CPU).result()
    assert decoded.backend == "dali-cpu"
    np.testing.assert_array_equal(decoded.pixels, read_with_pillow(content))


def sample(jpeg, *factors):
    """Return a JPEG whose components are said to have other sampling factors."""
    content, frame = bytearray(jpeg), jpeg.index(b"\xff\xc0")
    content[frame + 11 : frame + 11 + 3 * len(factors) : 3] = bytes(factors)
    return bytes(content)


GREY = encode(PICTURE.convert("L"), "JPEG")


@pytest.mark.parametrize(
    ("content", "plain"),
    {
        "4:4:4": (encode(PICTURE, "JPEG", subsampling=0), True),
        "4:2:2": (encode(PICTURE, "JPEG", subsampling=1), True),
        "4:2:0": (encode(PICTURE, "JPEG", subsampling=2), True),
        "progressive": (encode(PICTURE, "JPEG", progressive=True), True),
        "all components of 2 x 2": (sample(GOOD, 0x22, 0x22, 0x22), False),
        "chroma finer than luma": (sample(GOOD, 0x11, 0x22, 0x22), False),
        "grey": (GREY, True),
        "grey of 2 x 2": (sample(GREY, 0x22), False),
        "RGB": (encode(PICTURE, "JPEG", keep_rgb=True), False),
        "Adobe's RGB": (odd_headers.SOUND["RGB without YCbCr.jpg"], False),
        "Adobe's YCbCr": (odd_headers.SOUND["odd Adobe segment.jpg"], True),
    }.values(),
)
def test_what_nvjpeg_gets_wrong_is_kept_from_it(content, plain):
    assert choose(content, GPU) == ("dali-gpu" if plain else "libjpeg-turbo")


_PROGRESSIVE = odd_headers.encode("JPEG", progressive=True)
_LATER = _PROGRESSIVE.index(b"\xff\xc4", _PROGRESSIVE.index(b"\xff\xda"))
NO_TABLE = b"\xff\xc4\0\x13\3" + b"\xff" * 16


@pytest.mark.parametrize(
    ("content", "whole"),
    {
        "as it was": (_PROGRESSIVE, True),
        "a table that can't be, of no use": (GOOD[:2] + NO_TABLE + GOOD[2:], False),
        "no quantization": (GOOD.replace(b"\xff\xdb", b"\xff\xfe"), False),
        "a table between scans that can't be": (
            _PROGRESSIVE[: _LATER + 5] + b"\xff" * 16 + _PROGRESSIVE[_LATER + 21 :],
            False,
        ),
        "the like in a comment": (
            _PROGRESSIVE[:_LATER]
            + odd_headers.segment(0xFE, NO_TABLE)
            + odd_headers.segment(0xE5, NO_TABLE)
            + _PROGRESSIVE[_LATER:],
            True,
        ),
        "the like behind the end": (_PROGRESSIVE + NO_TABLE * 9 + b"\xff\xd9", True),
        "tables longer than there can be": (
            GOOD[:2] + odd_headers.segment(0xC4, GOOD[odd_headers.DHT + 4 :][:29] * 200) + GOOD[2:],
            False,
        ),
    }.values(),
)
def test_tables_that_decoders_need(content, whole):
    """What is not whole fails its batch in DALI, and what is does not."""
    assert is_intact(content, "jpeg") == whole
    if whole:
        (decoded,) = Decoding(
            [Encoded("a", content, read_header(content), "dali-cpu")], CPU
        ).result()
        assert decoded.backend == "dali-cpu"


def test_a_scan_header_that_is_cut_short():
    """The end mark is there, and the length is right."""
    start = GOOD.index(b"\xff\xda")
    for cut in range(start + 5, start + 15):
        content = GOOD[:cut] + b"\xff\xd9"
        assert read_header(content).unambiguous
        assert is_intact(content, "jpeg") in (True, False)


def test_sums_that_decoders_need():
    png, text = odd_headers.PNG, odd_headers.chunk(b"tEXt", b"Comment\0text", check=7)
    with_text = png[:33] + text + png[33:]
    assert is_intact(with_text, "png")
    assert choose(with_text, CPU) == "dali-cpu"
    place = odd_headers.IDAT + 20
    assert not is_intact(png[:place] + bytes([png[place] ^ 1]) + png[place + 1 :], "png")


def test_tables_are_looked_through_once():
    """A megabyte of them, each within the one before, would take a minute."""
    nested = b"\xff\xc4\0\x15\0" + b"\0\0\0\1" + bytes(12) + b"\xc4"
    content = _PROGRESSIVE[:_LATER] + nested * 50_000 + _PROGRESSIVE[_LATER:]
    began = time.monotonic()
    is_intact(content, "jpeg")
    assert time.monotonic() - began < 5


def run_child(*arguments, timeout=100):
    command = [sys.executable, "-m", "tests.decoding.test_parsers", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="latin-1", timeout=timeout)


def test_dali_does_refuse_them():
    """The list is true to the DALI that is installed: each is refused, alone in its batch."""
    done = run_child("refuse")
    assert done.returncode == 0, done.stderr
    accepted = [name for name, refused in json.loads(done.stdout).items() if not refused]
    assert accepted == []


def test_one_odd_picture_costs_one_picture(tmp_path):
    """Each among 99 sound ones, batch after batch, in a process that ends well."""
    done = run_child("batches", tmp_path, 3)
    assert done.returncode == 0, (done.stdout[-300:], done.stderr[-3000:])
    assert len(done.stdout.splitlines()) == 2 * len(ODD)


@pytest.mark.slow
def test_fuzz_headers():
    """More by hand: ``python -m tests.decoding.test_parsers fuzz SEED SECONDS BATCHES``."""
    done = run_child("fuzz", random.randrange(1 << 30), 2, 100_000)
    assert done.returncode == 0, (done.stdout[-300:], done.stderr[-3000:])
    for line in done.stdout.splitlines()[-2:]:
        decoder, batches, pictures = line.split()
        count_fuzz_inputs(f"headers of batches ({decoder})", int(pictures))
        assert int(batches) > 20


# In child processes


def ask_dali(contents):
    """Say whether DALI refuses each picture, in a batch of its own."""
    from nvidia.dali import Pipeline, fn, types

    refused = {}
    for name, content in contents.items():
        pipeline = Pipeline(1, num_threads=1, device_id=None, prefetch_queue_depth=1)
        with pipeline:
            encoded = fn.external_source(name="encoded", no_copy=True)
            pipeline.set_outputs(
                fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False)
            )
        pipeline.build()
        pipeline.feed_input("encoded", [np.frombuffer(content, np.uint8)])
        try:
            pipeline.run()
            refused[name] = False
        except RuntimeError:
            refused[name] = True
    return refused


def try_pillow(content):
    try:
        return read_with_pillow(content)
    except Exception:  # whatever Pillow runs into
        return None


def read_batches(decoder, folder, repeats):
    reader = ImageReaderStage(device="cpu", verbose=False, decoder=decoder, num_threads=2)
    good = read_with_pillow(GOOD)
    for name, content in ODD.items():
        print(decoder, name, flush=True)
        members = [(f"{n:03d}.jpg", GOOD) for n in range(100)]
        members[random.randrange(100)] = ("odd.jpg", content)
        shard = write_shard(f"{folder}/s.tar", members)
        expected = try_pillow(content)
        for _ in range(repeats):
            (batch,) = reader.process(FileGroupTask(data=[shard]))
            assert batch.num_items + len(batch.failed) == 100
            for image in batch.data:
                right = expected if image.key == "odd" else good
                assert np.array_equal(image.image_data, right), image.key
            assert [image.key for image in batch.failed] == ["odd"] * (expected is None)


def cut_into_pieces(content):
    """Cut a file where its segments or chunks begin."""
    if content[:4] == b"\x89PNG":
        cuts, place = [8], 8
        while place < len(content):
            place += 12 + int.from_bytes(content[place : place + 4], "big")
            cuts.append(place)
    elif content[:4] == b"RIFF":
        cuts, place = [12], 12
        while place < len(content):
            place += 8 + -(-int.from_bytes(content[place + 4 : place + 8], "little") // 2) * 2
            cuts.append(place)
    else:
        cuts, place = [2], 2
        while content[place + 1] != 0xDA:
            while content[place + 1] == 0xFF:
                place += 1
            place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
            cuts.append(place)
    cuts = [0, *cuts, len(content)]
    return [content[a:b] for a, b in itertools.pairwise(cuts)]


_STRAY = [b"\0", b"\xff", b"\xff\0", b"\xff\x01", b"\xff\xd0", b"\xff\xd8", b"A"]


def mutate(rng, seeds):
    """Insert, delete, repeat, swap or take over pieces of a header; change bytes in it."""
    pieces = cut_into_pieces(rng.choice(seeds))
    for _ in range(rng.choice([1, 1, 2, 3])):
        at, other = rng.randrange(len(pieces)), rng.randrange(len(pieces))
        kind = rng.randrange(7)
        if kind == 0 and len(pieces) > 2:
            del pieces[at]
        elif kind == 1:
            pieces[at], pieces[other] = pieces[other], pieces[at]
        elif kind == 2:
            pieces.insert(at, pieces[other])
        elif kind == 3:
            pieces.insert(at, rng.choice(cut_into_pieces(rng.choice(seeds))))
        elif kind == 4:
            pieces.insert(at, rng.choice(_STRAY))
        elif pieces[at]:
            piece = bytearray(pieces[at])
            place = rng.randrange(min(40, len(piece)))
            if kind == 5:
                piece[place] = rng.choice([0, 1, 2, 255, rng.randrange(256), piece[place] ^ 1])
            else:
                del piece[place : place + rng.choice([1, 2, 4])]
            pieces[at] = bytes(piece)
    return b"".join(pieces)


def fuzz(decoder, seed, seconds, batches):
    """Decode batches of mixed sound and odd pictures; print how many."""
    rng = random.Random(seed)
    seeds = [*odd_headers.SOUND.values(), odd_headers.TALL, odd_headers.WIDE]
    options = DecoderOptions("cpu", 2, 40, decoder=decoder)
    header = read_header(GOOD)
    sound = [Encoded("good", GOOD, header, choose_backend(GOOD, header, options))] * 40
    Decoding(sound, options).result()  # which imports DALI
    ends = time.monotonic() + seconds
    tried = done = 0
    good = read_with_pillow(GOOD)
    while done < batches and time.monotonic() < ends:
        batch = list(sound)
        for _ in range(rng.choice([1, 2, 4])):
            content = mutate(rng, seeds)
            tried += 1
            try:
                header = read_header(content)
            except ImageError:
                continue
            if header.width * header.height <= 1 << 20:
                backend = choose_backend(content, header, options)
                batch[rng.randrange(40)] = Encoded("odd", content, header, backend)
        decoded = Decoding(batch, options).result()
        done += 1
        for image, result in zip(batch, decoded, strict=True):
            assert (result.pixels is None) == (result.error is not None)
            if image.name == "good":
                assert np.array_equal(result.pixels, good)
            elif result.pixels is not None:
                height, width = result.pixels.shape[:2]
                assert (height, width) == (image.header.height, image.header.width)
    print(decoder, done, tried, flush=True)


if __name__ == "__main__":
    import logging

    logging.disable(logging.CRITICAL)
    Image.MAX_IMAGE_PIXELS = None
    command, *arguments = sys.argv[1:]
    if command == "refuse":
        print(json.dumps(ask_dali(odd_headers.REFUSED)))
    elif command == "batches":
        for decoder in ("dali", "auto"):
            read_batches(decoder, arguments[0], int(arguments[1]))
    else:
        for decoder in ("dali", "auto"):
            fuzz(decoder, *map(int, arguments))
