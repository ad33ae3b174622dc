"""What decoders print becomes log records; what others print goes where it would."""

import ctypes
import logging
import os
import subprocess
import sys

import pytest
from PIL import ImageCms

from tests.helpers.images import BROKEN, JPEG, PICTURE, PNG, both_decoders, encode, read_members


@both_decoders
def test_captured_stderr_becomes_log_records(tmp_path, capfd, caplog, decoder):
    caplog.set_level(logging.WARNING, "dask_imgread")
    tiff = encode(PICTURE.convert("1"), "TIFF", compression="group4")
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[64:68] = b"\1\0\0\0"  # no such rendering intent: libpng says so
    png = encode(PICTURE, "PNG", icc_profile=bytes(profile))
    members = ("a.jpg", JPEG), ("b.tif", tiff), ("c.jpg", BROKEN), ("d.png", png), ("e.png", PNG)
    read_members(tmp_path, *members, decoder=decoder)
    printed = capfd.readouterr().err
    assert "[ERROR]" not in printed
    assert "lib" not in printed
    records = [r.getMessage() for r in caplog.records if r.name == "dask_imgread"]
    assert any(r.startswith(str(tmp_path / "s.tar" / "c.jpg")) for r in records), records
    shown = f"{tmp_path / 's.tar' / 'd.png'} to {tmp_path / 's.tar' / 'e.png'}"
    if decoder == "auto":
        assert any(r.startswith(f"one of 2 images, {shown}: libpng warning: iCCP") for r in records)


def print_in_c(text):
    """Print as a C library does."""
    libc = ctypes.CDLL(None)
    libc.fputs(text.encode(), ctypes.c_void_p.in_dll(libc, "stderr"))


def test_what_others_print_meanwhile_reaches_stderr(capfd, caplog):
    from dask_imgread.decoding import stderr

    with stderr.capture(["a.jpg"]):
        print("from Python", file=sys.__stderr__, flush=True)
        os.write(2, b"from the system\n")
        subprocess.run("echo from a program >&2", shell=True, check=True)
        print_in_c("from C\n")
        seen = capfd.readouterr().err
    assert seen == "from Python\nfrom the system\nfrom a program\n"
    assert [r.getMessage() for r in caplog.records] == ["a.jpg: from C"]
    print_in_c("from C afterwards\n")
    assert capfd.readouterr().err == "from C afterwards\n"


DYING = """
import faulthandler, logging, os, subprocess, sys, threading, time
faulthandler.enable()
logging.disable(logging.CRITICAL)
from dask_imgread import FileGroupTask, ImageReaderStage
from dask_imgread.decoding import stderr

def act():
    while not stderr._capture._users:
        time.sleep(0.0001)
    if sys.argv[2] == "crash":
        faulthandler._sigsegv()
    elif sys.argv[2] == "abort":
        os.abort()
    else:
        children.append(subprocess.Popen("sleep 0.5; echo last words >&2", shell=True))

children = []
thread = threading.Thread(target=act)
thread.start()
reader = ImageReaderStage(device="cpu", verbose=False, decoder="dali")
while thread.is_alive():
    reader.process(FileGroupTask(data=[sys.argv[1]]))
children[0].wait()
"""


@pytest.mark.parametrize(
    ("end", "words", "status"),
    [
        ("crash", "Fatal Python error: Segmentation fault", -11),
        ("abort", "Fatal Python error: Aborted", -6),
        ("child", "last words", 0),
    ],
)
def test_last_words_while_decoding_are_seen(photo_shards, end, words, status):
    command = [sys.executable, "-c", DYING, photo_shards[0], end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert words in done.stderr
