"""An edit of a function, or of what it uses, is noticed; what is no edit, is not."""

import copy
import functools
import importlib.util
import json
import linecache
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_imgread.jobs import code
from dask_imgread.jobs.code import describe_edits, digest_code

MODULE = '''
"""Brightness."""
import functools
import threading
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import numpy as np

THRESHOLD = 0.5
NAMES = {"a", "b"}
TABLE = {"x": [1, 2], "y": np.arange(3)}
LOCK = threading.Lock()
MODEL = [np.random.default_rng(), "v1"]
HERE = Path(__file__).parent / "weights.pt"
_loaded = None

class Kind(Enum):
    BRIGHT = 1

@dataclass
class Options:
    size: int = 3
    names: list = field(default_factory=lambda: ["a"])
    def scale(self, x): return x * self.size

class Base:
    FACTOR = 2
    def __init__(self, size): self.size = size
    def prepare(self, x): return x + 1

class Measure(Base):
    def __call__(self, batch): return self.prepare(batch) * self.size
    @staticmethod
    def fixed(batch): return 1
    @classmethod
    def of_class(cls, batch): return cls.FACTOR
    @property
    def half(self): return self.size / 2

def timed(fn):
    @functools.wraps(fn)
    def wrapper(*args): return fn(*args)
    return wrapper

def _helper(x):
    return x if x < 3 else measure(x - 1)

@timed
def decorated(x): return x

@functools.lru_cache
def cached(x): return x

double = lambda x: x * 2

def load():
    global _loaded
    _loaded = 3
    return _loaded

def unused(): return 1

def measure(batch, size=3, *, kind=Kind.BRIGHT):
    """Return it."""
    # A comment.
    if batch in {"a", "b", "c"} or batch is LOCK or MODEL is HERE:
        return [_helper(x) for x in NAMES]
    return decorated(cached(double(load()))), Options(), np.mean(TABLE["x"]) > THRESHOLD

def make(size):
    lock = threading.Lock()
    def closed(batch):
        with lock: return batch * size
    return closed

made = make(3)
partial = functools.partial(measure, size=5)
measurer = Measure(4)
'''


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Return a function that imports source as a module, each time from another folder."""
    folders = iter(range(100))

    def load(source, name="brightness", **others):
        folder = tmp_path / str(next(folders))
        folder.mkdir()
        for each, text in {**others, name: source}.items():  # the last one may import the others
            (folder / f"{each}.py").write_text(text)
            spec = importlib.util.spec_from_file_location(each, folder / f"{each}.py")
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, each, module)
            spec.loader.exec_module(module)
        return module

    return load


def compare(load, old, new, function="measure", module=MODULE):
    assert old in module
    digests = []
    for source in (module, module.replace(old, new)):
        fn = functools.reduce(getattr, function.split("."), load(source))
        digests.append(digest_code(fn))
    return "; ".join(describe_edits(*digests)).replace("brightness:", "")


NO_EDITS = [
    ("# A comment.", "# Another.\n    # And one."),
    ('"""Return it."""', ""),
    ('"""Return it."""', '"""Return that."""'),
    ('"""Brightness."""', "# Moved down.\n\n"),
    ("measure(x - 1)", "(\n        measure( x-1 ))"),
    ("def unused(): return 1", "def unused():\n    return 2"),
    ("THRESHOLD = 0.5", "THRESHOLD = 1 / 2"),
    ('NAMES = {"a", "b"}', 'NAMES = {"b", "a"}'),
    ("_loaded = None", "_loaded = 7"),  # load() assigns it
]


@pytest.mark.parametrize(("old", "new"), NO_EDITS)
def test_what_is_no_edit(load, old, new):
    assert compare(load, old, new) == ""


EDITS = [
    ("x < 3", "x < 4", "_helper was edited"),
    ("def decorated(x): return x", "def decorated(x): return -x", "decorated was edited"),
    ("return fn(*args)", "return fn(args[0])", "timed.<locals>.wrapper was edited"),
    ("def cached(x): return x", "def cached(x): return -x", "cached was edited"),
    ("lambda x: x * 2", "lambda x: x * 4", "<lambda> was edited"),
    ("x * self.size", "x + self.size", "Options.scale was edited"),
    ('["a"]', '["b"]', "Options.<lambda> was edited"),
    ("size: int = 3", "size: int = 4", "Options was edited; Options.size was changed"),
    ("BRIGHT = 1", "BRIGHT = 2", "Kind was edited; defaults of measure was changed"),
    ("size=3", "size=4", "measure was edited; defaults of measure was changed"),
    ("THRESHOLD = 0.5", "THRESHOLD = 0.75", "THRESHOLD was changed"),
    ('{"a", "b"}\n', '{"a", "c"}\n', "NAMES was changed"),
    ("np.arange(3)", "np.arange(4)", "TABLE was changed"),
    ("weights.pt", "other.pt", "HERE was changed"),
    ('"v1"', '"v2"', "MODEL was changed"),
    ("default_rng()", "default_rng(7)", "MODEL was changed"),  # the statement was
    ("load()", "unused()", "measure was edited; unused is new; load is not used any more"),
    (
        "[_helper(x) for x in NAMES]",
        "1",
        "measure was edited; NAMES is not used any more; _helper ",
    ),
]


@pytest.mark.parametrize(("old", "new", "edits"), EDITS)
def test_edits(load, old, new, edits):
    found = compare(load, old, new)
    assert found.startswith(edits)
    assert found == edits or edits.endswith(" ")


OTHERS = [
    ("double", "x * 2", "x * 3", "<lambda> was edited"),
    ("cached", "cached(x): return x", "cached(x): return 2", "cached was edited"),
    ("made", "make(3)", "make(4)", "make.<locals>.closed closure 'size' was changed"),
    ("made", "batch * size", "size * batch", "make.<locals>.closed was edited"),
    ("partial", "size=5", "size=6", "argument 'size' of measure was changed"),
    ("partial", "x < 3", "x < 4", "_helper was edited"),
    ("measurer", "Measure(4)", "Measure(5)", "attribute 'size' of Measure was changed"),
    ("measurer", "(batch) * self", "(batch) + self", "Measure.__call__ was edited"),
    ("measurer", "x + 1", "x + 2", "Base.prepare was edited"),
    ("measurer", "Measure(Base)", "Measure(Base, list)", "Measure was edited"),
    ("measurer.prepare", "Measure(4)", "Measure(5)", "attribute 'size' of Measure was changed"),
    ("measurer.prepare", "x + 1", "x + 2", "Base.prepare was edited"),
    (
        "Measure.fixed",
        "fixed(batch): return 1",
        "fixed(batch): return 2",
        "Measure.fixed was edited",
    ),
    ("Measure.of_class", "FACTOR = 2", "FACTOR = 3", "Base.FACTOR was changed"),
    ("Measure", "self.size / 2", "self.size", "Measure.half was edited"),
]


@pytest.mark.parametrize(("function", "old", "new", "edits"), OTHERS)
def test_edits_of_other_callables(load, function, old, new, edits):
    assert compare(load, old, new, function) == edits


USER = """
import helpers
from helpers import shift as move

def measure(batch):
    return helpers.scale(batch) + helpers.SIZE + move(batch)
"""
HELPERS = """
SIZE = 3
def scale(x): return x
def shift(x): return x
def other(x): return x
"""


@pytest.mark.parametrize(
    ("old", "new", "edits"),
    [
        ("scale(x): return x", "scale(x): return -x", ["helpers:scale was edited"]),
        ("shift(x): return x", "shift(x): return -x", ["helpers:shift was edited"]),
        ("SIZE = 3", "SIZE = 4", ["helpers:SIZE was changed"]),
        ("other(x): return x", "other(x): return -x", []),
    ],
)
def test_modules_of_the_users_own_are_followed(load, old, new, edits):
    was = digest_code(load(USER, helpers=HELPERS).measure)
    assert sorted(was) == [
        *("brightness:measure", "brightness:move"),
        *("helpers:SIZE", "helpers:scale", "helpers:shift"),
    ]
    now = digest_code(load(USER, helpers=HELPERS.replace(old, new)).measure)
    assert describe_edits(was, now) == edits


def test_another_release_of_a_library_is_no_edit(load):
    fn = load("import numpy as np\ndef measure(batch): return np.mean(batch)").measure
    assert sorted(digest_code(fn)) == ["brightness:measure"]


PRINT = "import json, sys; from dask_imgread.jobs.code import digest_code\n"
PRINT_ALL = """
    print(json.dumps([digest_code(fn) for fn in (measure, made, partial, measurer, Measure)]))
"""


def run(folder, *arguments, seed="0"):
    environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_digests_are_the_same_in_every_process_folder_and_as_a_script(tmp_path):
    script = f"{MODULE}\nif __name__ == '__main__':\n    {PRINT}{PRINT_ALL}"
    folders = tmp_path / "one", tmp_path / "another" / "deeper"
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "brightness.py").write_text(script)
    imported = f"{PRINT}import brightness\nfrom brightness import *\nif True:{PRINT_ALL}"
    first = run(folders[0], "-c", imported)
    assert len(first[0]) > 15
    assert "brightness:Measure" in first[3]
    for folder, arguments, seed in [
        (folders[0], ["-c", imported], "1"),
        (folders[1], ["-c", imported], "2"),
        (folders[1], ["brightness.py"], "3"),
        (tmp_path, [folders[0] / "brightness.py"], "4"),
        (folders[0], ["-m", "brightness"], "5"),
        (folders[0], ["-m", "coverage", "run", f"--data-file={tmp_path}/c", "brightness.py"], "6"),
    ]:
        assert run(folder, *arguments, seed=seed) == first


def asserting(batch):
    assert batch in {"a", "b"}
    return np.mean(batch)


def test_assertions_rewritten_by_pytest_are_no_edit():
    assert any(name.startswith("@py") for name in asserting.__code__.co_varnames)
    plain = f"{PRINT}from tests.jobs.test_code import asserting as fn; "
    found = run(Path(__file__).parents[2], "-c", f"{plain}print(json.dumps(digest_code(fn)))")
    assert found == digest_code(asserting)


CELL = """
class Measure:
    def __call__(self, batch): return batch + SIZE

SIZE = 3
def measure(batch):
    return Measure()(batch)
"""


def run_cell(source, number, in_linecache):
    """Run a cell of a notebook: as IPython does, which puts its source into the linecache."""
    file = f"/tmp/ipykernel_{number}/{number}.py" if in_linecache else "<cell>"
    if in_linecache:
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    names = {"__name__": "__main__"}
    exec(compile(source, file, "exec"), names)
    return names["measure"]


@pytest.mark.parametrize("in_linecache", [True, False])
def test_notebooks(monkeypatch, in_linecache):
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    was = digest_code(run_cell(CELL, 1, in_linecache))
    assert digest_code(run_cell("\n# More.\n" + CELL, 2, in_linecache)) == was
    edited = digest_code(run_cell(CELL.replace("+ SIZE", "- SIZE"), 3, in_linecache))
    version = "" if in_linecache else f" (Python 3.{sys.version_info.minor})"
    assert describe_edits(was, edited) == [f"__main__:Measure.__call__{version} was edited"]
    changed = digest_code(run_cell(CELL.replace("SIZE = 3", "SIZE = 4"), 4, in_linecache))
    assert describe_edits(was, changed) == ["__main__:SIZE was changed"]


def test_a_library_of_another_kind_of_object(load):
    """Such as numba's functions, which hold the user's."""
    source = "from json import JSONDecoder\ndef inner(x): return 1\njitted = JSONDecoder()\n"
    source += "jitted.py_func = inner\ndef measure(batch): return jitted(batch)"
    was, now = (digest_code(load(text).measure) for text in (source, source.replace("1", "2")))
    assert describe_edits(was, now) == ["brightness:inner was edited"]


def test_two_closures_of_one_function_are_told_apart(load):
    source = MODULE + "\nSTEPS = [make(1), make(2)]\ndef steps(batch): return STEPS"
    swapped = compare(load, "make(1), make(2)", "make(2), make(1)", "steps", source)
    assert swapped == "STEPS was changed"
    edited = compare(load, "make(1)", "make(4)", "steps", source)
    assert edited == "STEPS was changed; make.<locals>.closed closure 'size' was changed"


class Hostile:
    """An object that must not be touched."""

    __slots__ = ("__dict__", "held", "unset")

    def __init__(self):
        self.held = threading.Lock()

    def __getattribute__(self, name):
        pytest.fail(f"{name} was asked for")

    __getattr__ = __reduce_ex__ = __iter__ = __eq__ = __getattribute__

    __hash__ = object.__hash__

    @property
    def __class__(self):
        pytest.fail("the class was asked for")

    def __call__(self, batch):
        return 1


def test_objects_are_not_touched():
    assert len(digest_code(Hostile())) > 3
    assert len(digest_code(functools.partial(asserting, Hostile(), key=[Hostile()]))) > 4


def make_closure(value):
    def measure(batch):
        return value

    return measure


def make_deep(levels, value=0):
    deep = value
    for _ in range(levels):
        deep = {"a": [deep]}
    return deep


def make_cycle():
    cycle = {"a": []}
    cycle["a"].append(cycle)
    return cycle


STRANGE = [
    *(
        threading.Lock(),
        sys,
        sys.stdout,
        iter([1]),
        (x for x in "ab"),
        object(),
        type,
        len,
        "a".join,
    ),
    *(make_cycle(), functools.partial(print, 1), functools.partialmethod(print, 1), 10**5000),
    *(np.array([object()]), SimpleNamespace(a=1), "\ud800", float("nan"), np.random.default_rng()),
    *(str.upper, Ellipsis, NotImplemented, Exception, np.add, memoryview(b""), Path.cwd, Hostile),
]


@pytest.mark.parametrize("value", STRANGE, ids=lambda value: type(value).__name__)
def test_nothing_is_raised(value):
    modules = set(sys.modules)
    for fn in (value, make_closure(value), functools.partial(asserting, value)):
        assert digest_code(fn) == digest_code(fn)
    assert set(sys.modules) == modules


def test_deep_values():
    def digest(levels, value):
        return digest_code(make_closure(make_deep(levels, value)))

    assert digest(49, 1) != digest(49, 2)
    assert digest(50_000, 1) == digest(50_000, 2) != digest(49, 1)  # by the type only


def test_large_values_count_by_type_and_shape(monkeypatch):
    monkeypatch.setattr(code, "_LARGEST", 1000)
    monkeypatch.setattr(code, "_MOST", 100)

    def digest(value):
        return digest_code(make_closure(value))

    assert digest(np.zeros(10)) != digest(np.ones(10))
    assert digest(np.zeros(1000)) == digest(np.ones(1000))
    assert digest(np.zeros(1000)) != digest(np.zeros(1001)) != digest(np.zeros(1001, "f4"))
    assert digest("a" * 1001) == digest("b" * 1001) != digest("b" * 1002)
    assert digest([1] * 100) == digest([2] * 100) != digest({2: [1] * 100})


def test_code_is_followed_beside_a_large_value(load, monkeypatch):
    monkeypatch.setattr(code, "_MOST", 100)
    source = MODULE + "\nMANY = [1] * 1000\ndef use(batch): return Options(), MANY"
    assert compare(load, "x * self.size", "x", "use", source) == "Options.scale was edited"
    source = MODULE + "\npart = functools.partial(make([1] * 1000), size=5)"
    changed = "argument 'size' of make.<locals>.closed was changed"
    assert compare(load, "1000), size=5", "1000), size=6", "part", source) == changed


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


def test_no_value_is_shown(load):
    fn = functools.partial(make_closure("secret"), asserting, Hostile(), key="secret")
    assert "secret" not in json.dumps(digest_code(fn))
    names = [name for name in digest_code(fn) if name.startswith("argument")]
    fn = functools.partial(Hostile(), key=["secret"])
    names += [name for name in digest_code(fn) if name.startswith("argument")]
    closure = f"{__name__}:make_closure.<locals>.measure"
    assert names == [
        *(f"argument 'key' of {closure}", f"argument 1 of {closure}", f"argument 2 of {closure}"),
        f"argument 'key' of {__name__}:Hostile",
    ]


@settings(deadline=None)
@given(values, values)
def test_values_are_told_apart(one, another):
    was, now = digest_code(make_closure(one)), digest_code(make_closure(another))
    assert (was == now) == (repr(one) == repr(another)) or sorted_alike(one, another)
    assert digest_code(make_closure(copy.deepcopy(one))) == was


def sorted_alike(one, another):
    """Whether they differ in nothing but the order of a dict."""
    return one == another and "{" in repr(one)


@settings(deadline=None)
@given(st.dictionaries(st.text(), st.text()))
def test_sets_and_dicts_have_no_order(items):
    turned = dict(reversed(items.items()))
    assert digest_code(make_closure(items)) == digest_code(make_closure(turned))
    was, now = (digest_code(make_closure(frozenset(each))) for each in (items, turned))
    assert was == now


def test_an_edit_in_words():
    was = {"m:f": "aa", "m:g": "ab", "m:A": "AA", "m:B": "AB", "m:old": "1"}
    now = {"m:f": "ba", "m:g": "ab", "m:A": "BB", "m:B": "AB", "m:new": "1"}
    words = ["m:f was edited", "m:A was changed", "m:new is new", "m:old is not used any more"]
    assert describe_edits(was, now) == words
    assert describe_edits(was, was) == describe_edits({}, now) == describe_edits(was, {}) == []
    many = {f"m:{number}": "1" for number in range(8)}
    assert describe_edits(was, was | many)[-2:] == ["m:4 is new", "and 3 more"]
