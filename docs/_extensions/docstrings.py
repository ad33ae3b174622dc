"""The parameters' types, which docstrings leave to annotations."""

import inspect
import re
from typing import Any

from sphinx.application import Sphinx

import dask_imgread

# What is said in the place of some annotations, and of parts of all others.
READABLE = {
    "BatchFunction": "callable",
    "Frame": "DataFrame",
    "Item": "object",
    "Paths": "str, path, list of these",
    "PathsOrTasks": "str, path, list of these or of FileGroupTask, DataFrame",
    "Pixels": "array",
    "Sidecars": "dict",
    "ShardIndex": "object",
}
REPLACED = [
    (r"os\.PathLike\[str\]", "path"),
    (r"\b(?:pd|np|Image)\.(?=[A-Z])", ""),
    (r"AbstractContextManager\[(\w+)\]", r"context manager of \1"),
    (r"(?:Collection|Sequence|Iterable)\[([^\]]+)\]", r"list of \1"),
    (r"list\[([^\]]+)\]", r"list of \1"),
    (r"dict\[[^\]]+\]", "dict"),
    (r"Callable\[\[[^\]]*\], [^\]]+\]", "callable"),
    (r"Literal\[([^\]]+)\]", r"{\1}"),
    (r"\s*\|\s*", " or "),
]


def add_types(
    app: Sphinx,  # noqa: ARG001
    what: str,  # noqa: ARG001
    name: str,  # noqa: ARG001
    documented: Any,
    options: Any,  # noqa: ARG001
    lines: list[str],
) -> None:
    """Give the entries of the section Parameters the types that the signature has."""
    if not callable(documented):
        return
    try:
        parameters = inspect.signature(documented).parameters
    except ValueError:  # an exception
        return
    section = ""
    for number, line in enumerate(lines):
        if "".join(lines[number + 1 : number + 2]).startswith("---"):
            section = line
        elif section == "Parameters" and re.match(r"\w", line):
            names = line.split(", ")
            types = {
                format_type(parameters[name].annotation) for name in names if name in parameters
            }
            if len(types) == 1:
                lines[number] = f"{line} : {types.pop()}"


def format_type(annotation: str) -> str:
    """Return an annotation as prose, with links to the public classes."""
    text = re.sub(r"\b\w+\b", lambda name: READABLE.get(name[0], name[0]), str(annotation))
    for pattern, readable in REPLACED:
        text = re.sub(pattern, readable, text)
    return re.sub(r"\w+", lambda name: link(name[0]), text)


def link(name: str) -> str:
    """Return a link to a public class; other words as they are."""
    return f":obj:`~dask_imgread.{name}`" if name in dask_imgread.__all__ else name


def setup(app: Sphinx) -> dict[str, bool]:
    """Add types before numpydoc reads the docstrings."""
    app.connect("autodoc-process-docstring", add_types, priority=400)
    return {"parallel_read_safe": True}
