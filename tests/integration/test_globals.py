"""What belongs to the whole process stays as its owner has set it."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from dask_imgread.testing import draw_picture, write_shard
from tests.helpers.images import both_decoders, encode
from tests.helpers.odd_headers import BROKEN_ENTRY, exif_segment, make_exif

# `look` tells of all that an import or a call might change; libraries that we use are there before.
LOOK = """
import ctypes, faulthandler, gc, io, json, locale, logging, os, random, resource, signal, socket
import sys, threading, time, warnings
import numpy as np, pandas, pyarrow, simplejpeg
import bokeh.plotting, dask.bag, dask.dataframe, distributed, fsspec, nvidia.dali.fn, scipy.special
from PIL import Image, ImageFile
Image.init()
libc = ctypes.CDLL(None)
libc.getenv.restype = ctypes.c_char_p

def look():
    names = [*os.environ, "DALI_NVIMGCODEC_LOG_LEVEL", "DALI_MALLOC_POOL_THRESHOLD"]
    descriptors = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # that of the listing
            continue
    return {
        "pillow": (Image.MAX_IMAGE_PIXELS, Image.WARN_POSSIBLE_FORMATS, list(Image.OPEN)),
        "truncated": (ImageFile.LOAD_TRUNCATED_IMAGES, ImageFile.MAXBLOCK),
        "warnings": (list(map(str, warnings.filters)), str(warnings.showwarning)),
        "environment": dict(os.environ),
        "environment in C": {n: str(libc.getenv(n.encode())) for n in names},
        # What is printed while DALI runs is led into memory of that name.
        "descriptors": {n: d for n, d in descriptors.items() if "memfd:stderr" not in d},
        "signals": [str(signal.getsignal(n)) for n in signal.valid_signals()],
        "wakeup": signal.set_wakeup_fd(-1),
        "faulthandler": faulthandler.is_enabled(),
        "limits": [resource.getrlimit(n) for n in range(16)],
        "hooks": list(map(str, (sys.excepthook, sys.unraisablehook, threading.excepthook))),
        "streams": list(map(str, (sys.stdout, sys.stderr, sys.stdin))),
        "folder": (os.getcwd(), os.umask(os.umask(0)), sys.path),
        "locale": locale.setlocale(locale.LC_ALL),
        "numbers": (np.geterr(), random.getstate()[1][:9]),
        "gc": (gc.isenabled(), gc.get_threshold(), sys.getswitchinterval()),
        "timeout": socket.getdefaulttimeout(),
        "logging": (str(logging.root.handlers), logging.root.level, logging.root.disabled),
        "recursion": (sys.getrecursionlimit(), threading.stack_size()),
        "processes": str(__import__("multiprocessing").get_start_method(allow_none=True)),
    }

def differ(before):
    after = json.loads(json.dumps(look()))
    return {n: (before[n], after[n]) for n in before if before[n] != after[n]}

Image.MAX_IMAGE_PIXELS = 3000
warnings.simplefilter("ignore")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
signal.signal(signal.SIGTERM, lambda *_: None)
"""

# A new interpreter for each script would spend seconds on importing all that again.
FORK = """
for line in sys.stdin:
    script, *sys.argv[1:] = json.loads(line)
    if not (child := os.fork()):
        before = json.loads(json.dumps(look()))
        exec(script)
        sys.exit()
    print(os.waitpid(child, 0)[1], end="\\n\\n", flush=True)
"""

IMPORT = """
import importlib, pkgutil, dask_imgread
for module in pkgutil.walk_packages(dask_imgread.__path__, "dask_imgread."):
    if not module.name.endswith(("__main__", "nemo_curator")):  # the latter needs nemo_curator
        importlib.import_module(module.name)
print(json.dumps(differ(before)))
"""

READ = """
from dask_imgread import FileGroupTask, ImageReaderStage
task = FileGroupTask(data=[sys.argv[1]])
for options in json.loads(sys.argv[2]):
    (batch,) = ImageReaderStage(device="cpu", verbose=False, **options).process(task)
    assert [i.key for i in batch.failed] == ["broken"] * options.get("decode", True), batch.failed
    assert batch.num_items + len(batch.failed) == 9
del batch
gc.collect()
print(json.dumps(differ(before)))
"""

# A user's thread looks at pictures larger than it wants to, while another one reads them.
TOGETHER = """
from dask_imgread import FileGroupTask, ImageReaderStage
task = FileGroupTask(data=[sys.argv[1]])
bomb = open(sys.argv[3], "rb").read()
stop, refused, seen = threading.Event(), [], set()
sys.setswitchinterval(1e-5)

class Watched(type(Image)):
    def __setattr__(self, name, value):
        seen.add(name)
        super().__setattr__(name, value)

Image.__class__ = ImageFile.__class__ = Watched

def look_at_bombs():
    while not stop.is_set():
        try:
            Image.open(io.BytesIO(bomb))
        except Image.DecompressionBombError:
            refused.append(True)
        else:
            refused.append(False)

thread = threading.Thread(target=look_at_bombs)
thread.start()
for options in json.loads(sys.argv[2]):
    for _ in range(5):
        list(ImageReaderStage(device="cpu", verbose=False, **options).process(task))
stop.set()
thread.join()
print(json.dumps([len(refused), all(refused), sorted(seen)]))
"""

OPTIONS = [
    {"decode": False},
    {},
    {"decoder": "dali", "num_threads": 2},
    {"resize": 20},
    {"isolate": True},
]


@pytest.fixture
def shard(tmp_path):
    picture = draw_picture(5, (90, 70))
    clear = picture.convert("P")
    jpeg = encode(picture, "JPEG")
    broken_exif = exif_segment(make_exif((0x112, 3, 1, b"\6\0\0\0"), BROKEN_ENTRY))
    members = {
        "a.jpg": jpeg,
        "b.jpg": jpeg[:2] + broken_exif + jpeg[2:],
        "broken.jpg": jpeg[:-300],
        "c.png": encode(picture, "PNG"),
        "d.png": encode(clear, "PNG", transparency=bytes(range(256))),
        "e.webp": encode(picture, "WEBP"),
        "f.tif": encode(picture, "TIFF"),
        "g.gif": encode(picture, "GIF"),
        "h.avif": encode(picture, "AVIF"),
    }
    return write_shard(tmp_path / "s.tar", members.items())


@pytest.fixture(scope="module")
def run():
    """Run a script in a process that has imported what it may, but nothing of ours."""
    command = [sys.executable, "-c", LOOK + FORK]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen(command, **pipes) as process:

        def ask(script, *arguments):
            print(json.dumps([script, *map(str, arguments)]), file=process.stdin)
            *printed, status = iter(process.stdout.readline, "\n")
            assert status == "0\n", printed
            return json.loads(printed[-1])

        yield ask


def test_an_import_changes_nothing(run):
    assert run(IMPORT) == {}


def test_reading_changes_nothing(run, shard):
    assert run(READ, shard, json.dumps(OPTIONS)) == {}


def test_reading_is_not_seen_by_others_who_use_pillow(run, tmp_path, shard):
    bomb = tmp_path / "bomb.png"
    Image.new("1", (4000, 4000)).save(bomb)
    tried, all_refused, set_meanwhile = run(TOGETHER, shard, json.dumps(OPTIONS[:4]), bomb)
    assert tried > 10
    assert all_refused
    assert set_meanwhile == []


@both_decoders
def test_the_users_limit_is_not_ours(run, shard, decoder):
    """Neither Pillow's limit nor what becomes of warnings decides what is read."""
    script = (
        READ + "assert Image.MAX_IMAGE_PIXELS == 3000; print(json.dumps(len(warnings.filters)))"
    )
    strict = script.replace(
        "from dask_imgread import",
        'warnings.simplefilter("error")\nimport dask_imgread\nfrom dask_imgread import',
        1,
    )
    assert run(strict, shard, json.dumps([{"decoder": decoder}])) > 0
