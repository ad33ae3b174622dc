"""The code in the pages, run in order in one folder, as a reader would."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
from itertools import takewhile

import pytest
from distributed import Client
from distributed.deploy import Cluster

from dask_imgread.cli.arguments import BAD_IMAGES, SUCCESS, WRONG_USAGE, make_parser
from dask_imgread.cli.main import main
from tests.helpers.markdown import ROOT, Block, list_blocks

README = ROOT / "README.md"
PAGES = [
    page
    for page in [README, *sorted((ROOT / "docs").glob("*.md"))]
    if {block.language for block in list_blocks(page.read_text())} & {"python", "sh"}
]
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
OPERATORS = {"|", "||", "&", "&&", ";", "<", ">", ">>", ">&", "&>", "$", "`"}
# What .ci/run does: the README's commands for a fresh machine, of which the second runs the tests.
SET_UP = re.compile(r"^python3 -m venv [^|]*/(?:pytest|(dask-imgread demo))$", re.MULTILINE)
WARNINGS = "error,ignore:The inplace keyword:DeprecationWarning"  # as pyproject.toml has it
pytestmark = pytest.mark.timeout(300)


def name_page(page):
    return str(page.relative_to(ROOT))


class SharedCluster:
    """A cluster that is not closed after use: starting one for each snippet takes seconds."""

    def __init__(self, cluster):
        self._cluster = cluster

    def __getattr__(self, name):
        return getattr(self._cluster, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def close(self):
        """Leave it to the fixture."""


@pytest.fixture(scope="module", autouse=True)
def shared_cluster(imgread_cluster):
    """Have all that starts a cluster, on whatever number of cores, share one of two workers."""
    with pytest.MonkeyPatch.context() as patch:
        cluster = SharedCluster(imgread_cluster)
        patch.setattr("dask_imgread.cluster.start._start_on_cores", lambda *_: cluster)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder in which each page is run: the same one, since images' ids depend on its path."""
    return tmp_path_factory.mktemp("reader") / "pages"


@pytest.fixture(scope="module")
def demo(place):
    """What ``dask-imgread demo`` leaves in that folder, kept beside it; of fewer pictures."""
    place.mkdir()
    with contextlib.chdir(place):
        assert main(["demo", "--images", "200"]) == SUCCESS
    return place.rename(place.with_name("demo"))


@pytest.fixture
def folder(page, place, demo, monkeypatch):
    """Go to that folder: empty for the README, which makes what it needs."""
    place.mkdir()
    if page != README:
        shutil.copytree(demo, place, dirs_exist_ok=True)
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    yield
    shutil.rmtree(place)


def run_block(block, page, names, demo, programs):
    where = f"{name_page(page)}:{block.line}"
    reason = NOT_RUN.fullmatch(block.before)
    assert reason or "not run" not in block.before, f"{where}: not run for what reason?"
    try:
        if reason:
            check_block(block)
        elif block.language == "python":
            # Lines are counted from the page's beginning, as tracebacks show them.
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)
        else:
            text = SET_UP.sub(lambda found: f"cp -a {demo}/. ." if found[1] else "", block.text)
            run_shell(text, programs)
    except Exception as error:
        error.add_note(where)
        raise


def run_shell(text, programs):
    """Run commands, those of dask-imgread in this process if there are no others: it is faster."""
    commands = [split_words(line) for line in list_lines(text)]
    if all(words[0] == "dask-imgread" and not OPERATORS & {*words} for words in commands):
        for _, *arguments in commands:
            assert call(main, arguments) in (SUCCESS, BAD_IMAGES), shlex.join(arguments)
        return
    path = f"{programs}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONWARNINGS": WARNINGS}
    command = ["bash", "-euo", "pipefail", "-c", text]
    subprocess.run(command, env=environment, check=True, timeout=100)


def call(function, arguments):
    """Return what a function returns, or the status with which it exits, as after ``--help``."""
    try:
        return function(arguments)
    except SystemExit as error:
        return error.code


def check_block(block):
    """Check what can be checked of a block that is not run."""
    if block.language == "python":
        compile(block.text, "block", "exec")
        return
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    for words in map(split_words, list_lines(block.text)):
        for start in (n for n, word in enumerate(words) if word.endswith("dask-imgread")):
            arguments = takewhile(lambda word: word not in OPERATORS, words[start + 1 :])
            assert call(make_parser().parse_args, [*arguments]) != WRONG_USAGE, arguments


def list_lines(text):
    """Return the commands of a shell's text, each in one line."""
    lines = text.replace("\\\n", "").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def split_words(line):
    """Return a line's words; operators are words, too, unless they are quoted."""
    words = shlex.shlex(line, posix=True, punctuation_chars="|&;<>$`")
    words.whitespace_split = True
    return list(words)


@pytest.mark.parametrize("page", PAGES, ids=name_page)
@pytest.mark.usefixtures("folder")
def test_the_code_of_a_page(page, demo, programs):
    names = {"__name__": "__main__"}
    try:
        for block in list_blocks(page.read_text()):
            if block.language in ("python", "sh"):
                run_block(block, page, names, demo, programs)
    finally:
        for value in names.values():
            if isinstance(value, Client | Cluster):
                value.close()


@pytest.mark.parametrize(
    ("language", "text", "before", "told"),
    [
        ("python", "1 / 0", "", "division by zero"),
        ("python", "1 +", "<!-- not run: needs a GPU -->", "invalid syntax"),
        ("python", "1", "<!-- not run -->", "for what reason"),
        ("sh", "dask-imgread report nowhere", "", "report nowhere"),
        ("sh", "false | cat", "", "status 1"),
        ("sh", "dask-imgread metadata a.tar --ou", "<!-- not run: no shards -->", "--ou"),
        ("sh", "if dask-imgread report result", "<!-- not run: no result -->", "status 2"),
    ],
)
def test_what_is_wrong_is_told(programs, language, text, before, told):
    block = Block(language, 7, f"{text}\n", before)
    with pytest.raises(Exception, match=told) as caught:
        run_block(block, README, {}, None, programs)
    assert "README.md:7" in [str(caught.value)[:11], *getattr(caught.value, "__notes__", [])]


def test_what_runs(programs):
    names = {}
    for language, text in [("python", "x = 1\n"), ("sh", "dask-imgread --help\n# end\n")]:
        run_block(Block(language, 1, text, ""), README, names, None, programs)
    run_block(
        Block("python", 1, "x / 0\n", "<!-- not run: wrong -->"), README, names, None, programs
    )
    assert names["x"] == 1
