"""What the project says of itself: its environments, its README, its examples, its docstrings."""

import ast
import asyncio
import doctest
import importlib.util
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import yaml

import dask_imgread
from dask_imgread.storage.filesystems import _EXTRAS

ROOT = Path(__file__).parents[1]
MODULES = ["dask_imgread"] + [
    name
    for _, name, _ in pkgutil.walk_packages(dask_imgread.__path__, "dask_imgread.")
    if not name.endswith(("__main__", "nemo_curator"))  # the latter needs nemo_curator
]


def split_requirement(text):
    name, _, constraint = re.fullmatch(r"([\w-]+)(\[.*\])?(.*)", text).groups()
    return name, constraint


NOT_IN_CONDA = {"nvidia-dali-cuda120", "simplejpeg"}


def read_environment():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["rapidsai", "conda-forge"]
    *conda, pip = environment["dependencies"]
    return conda, pip["pip"]


def test_conda_and_pip_environments_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = dict(
        map(split_requirement, project["dependencies"] + project["optional-dependencies"]["gpu"])
    )
    listed = dict(map(split_requirement, read_environment()[0]))
    assert listed.pop("python") == project["requires-python"]
    listed.pop("pip")
    assert listed == {n: version for n, version in wanted.items() if n not in NOT_IN_CONDA}


def test_the_extras_that_errors_name_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [path.read_text() for path in list_files()]
    named = {name for text in texts for name in re.findall(r"dask-imgread\[(\w+)\]", text)}
    assert named == {"gpu"}
    assert named | {*_EXTRAS.values()} <= {*project["optional-dependencies"]}


def test_pip_takes_the_environments_whole_list(tmp_path):
    """As conda gives it to pip: a file of requirements, in the project's folder."""
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("\n".join(read_environment()[1]))
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--requirement", requirements]
    offline = ["--no-index", "--no-build-isolation"]  # all that it needs is installed here
    done = subprocess.run(command + offline, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "Would install dask-imgread" in done.stdout
    assert all(name in done.stdout for name in NOT_IN_CONDA)


def test_the_readme_has_two_commands_for_a_fresh_machine():
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"^python3 -m venv .*$", readme, re.MULTILINE)
    assert [command.rsplit("/", 1)[1] for command in commands] == ["dask-imgread demo", "pytest"]


def test_the_changelog_has_this_version():
    """Under its own heading, or what is to be in it as unreleased."""
    headings = re.findall(r"^## (.*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert dask_imgread.__version__ == project["version"]
    released = [heading for heading in headings if heading != "[Unreleased]"]
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", h) for h in released)
    assert headings[0].partition(" - ")[0] in ("[Unreleased]", f"[{project['version']}]")


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("name", MODULES)
def test_docstrings_examples(name, tmp_path, monkeypatch):
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for example in doctest.DocTestFinder().find(importlib.import_module(name)):
        folder = tmp_path / example.name
        folder.mkdir()
        monkeypatch.chdir(folder)
        runner.run(example)
    assert runner.failures == 0


# They need a store or a cluster that fails, for longer than an example may take.
WITHOUT_EXAMPLE = {"JobError", "NoWorkersError", "OtherJobError", "StorageError"}


@pytest.mark.parametrize("name", dask_imgread.__all__)
def test_public_names_are_documented_with_an_example(name):
    public = getattr(dask_imgread, name)
    text = inspect.cleandoc(public.__doc__)
    examples = doctest.DocTestParser().get_examples(text)
    assert bool(examples) == (name not in WITHOUT_EXAMPLE)
    assert bool(examples) == ("\nExamples\n--------\n" in text)
    if inspect.isfunction(public) or hasattr(public, "__post_init__"):
        assert "\nRaises\n------\n" in text


def test_the_source_distribution_has_all_files(tmp_path):
    """Also those that only tests read: whoever packages it runs them."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (built,) = tmp_path.iterdir()
    with tarfile.open(built) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    folders = [".ci", "benchmarks", "dask_imgread", "docs", "examples", "tests"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [p for p in ROOT.iterdir() if p.name != ".git" and not p.match(".coverage*")]
    wanted = {
        str(path.relative_to(ROOT))
        for path in files
        if path.is_file()
        and not {"__pycache__", ".ipynb_checkpoints", "_build", "generated"} & {*path.parts}
    }
    assert {"environment.yml", ".ci/run", "docs/gpus.md", "tests/test_project.py"} <= wanted
    assert wanted <= packed


def name_module(path):
    """Return the dotted name of a file of the package, without the package's own."""
    return ".".join(path.relative_to(ROOT / "dask_imgread").with_suffix("").parts)


def list_imports(path, modules):
    """Return the project's own modules that a file imports: in functions and for types, too."""
    package = f"dask_imgread.{name_module(path)}".rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    inner = {
        name.removeprefix("dask_imgread.") for name in names if name.startswith("dask_imgread.")
    }
    return {dask_imgread._HOMES.get(name, name) for name in inner} & modules


def find_circle(files):
    """Return the modules that can't be put into an order in which imports run one way."""
    modules = {name_module(path) for path in files}
    graph = {name_module(path): list_imports(path, modules) for path in files}
    while free := {name for name, needs in graph.items() if not needs & graph.keys()}:
        graph = {name: needs for name, needs in graph.items() if name not in free}
    return graph


def list_files():
    return [p for p in (ROOT / "dask_imgread").rglob("*.py") if not p.stem.startswith("__")]


def test_imports_run_one_way():
    assert {"reading.reader", "decoding.decode"} <= {name_module(path) for path in list_files()}
    assert find_circle(list_files()) == {}


@pytest.mark.parametrize(
    "back",
    [
        *("from dask_imgread.room.a import thing", "from dask_imgread.room import a"),
        *("import dask_imgread.room.a", "from .a import thing", "from . import a"),
        *("from dask_imgread import thing", "def use():\n    from dask_imgread.room import a"),
        "if TYPE_CHECKING:\n    from dask_imgread.room import a",
    ],
)
def test_a_circle_would_be_seen(monkeypatch, tmp_path, back):
    package = tmp_path / "dask_imgread" / "room"
    package.mkdir(parents=True)
    (package / "a.py").write_text("from dask_imgread.room import b")
    (package / "b.py").write_text(back)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(dask_imgread._HOMES, "thing", "room.a")
    assert set(find_circle(list_files())) == {"room.a", "room.b"}


def test_every_file_is_in_the_list_of_contributing():
    table = re.findall(r"^\| `.*", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    listed = {n.replace("/", ".") for line in table for n in re.findall(r"`([\w/]+)\.py`", line)}
    assert listed == {name_module(path) for path in list_files()}


def test_type_checkers_see_the_public_names():
    tree = ast.parse((ROOT / "dask_imgread" / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = {
        alias.name: node.module.removeprefix("dask_imgread.")
        for node in imports
        for alias in node.names
        if node.module.startswith("dask_imgread.")
    }
    assert seen == dask_imgread._HOMES


def test_only_one_file_runs_dali():
    users = [name_module(p) for p in list_files() if "nvidia.dali" in p.read_text()]
    assert users == ["decoding.dali"]


@pytest.mark.slow
def test_the_batch_script(tmp_path, photo_shards, programs):
    import pandas as pd

    script = ROOT / "examples" / "batch_job.py"

    def run(shards):
        done = subprocess.run(
            [programs / "python", script, *shards, "--out", "out", "--update"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("out/*.parquet")}

    printed, before = run(photo_shards[:3])
    assert "75 images, mean brightness" in printed
    printed, after = run(photo_shards)
    assert "100 images, mean brightness" in printed
    assert after.items() >= before.items()
    assert (len(before), len(after)) == (3, 4)
    assert len(pd.read_parquet(tmp_path / "out")) == 100


@pytest.fixture
def quick_kernel(tmp_path, monkeypatch, programs):
    """Have the kernel of notebooks forked."""
    folder = tmp_path / "jupyter" / "kernels" / "python3"
    folder.mkdir(parents=True)
    command = [str(programs / "python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel = {"argv": command, "display_name": "Python 3", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("quick_kernel")
@pytest.mark.parametrize(
    ("name", "shown", "picture"),
    [
        ("read_images", ["(99, 'images')", "truncated"], "image/png"),
        ("curate", ["38", "<ContactSheet: 8 images>", "source_id"], "text/html"),
    ],
)
def test_the_notebooks(tmp_path, name, shown, picture):
    import nbformat
    from nbclient import NotebookClient

    def check(notebook):
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        printed = str([output.get("text", output.get("data")) for output in outputs])
        assert [text for text in shown if text not in printed] == []
        assert any(picture in output.get("data", {}) for output in outputs)
        counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
        assert counts == list(range(1, len(counts) + 1))

    notebook = nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)
    check(notebook)  # with the outputs that it was committed with
    client = NotebookClient(notebook, timeout=100, resources={"metadata": {"path": str(tmp_path)}})
    asyncio.run(client.async_execute())  # execute() leaves an event loop behind
    check(notebook)
