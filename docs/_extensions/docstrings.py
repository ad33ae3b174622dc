"""The parameters' types, which docstrings leave to annotations; links to public names."""

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
    "Paths": "str, path or list of these",
    "PathsOrTasks": "str, path, list of these or of FileGroupTask, or DataFrame",
    "Pixels": "array",
    "Sidecars": "dict",
    "ShardIndex": "object",
}
REPLACED = [
    (r"os\.PathLike\[str\]", "path"),
    (r"\b(?:pd|np|Image)\.(?=[A-Z])", ""),
    (r"AbstractContextManager\[(\w+)\]", r"context manager of \1"),
    (r"(?:Collection|Sequence|list)\[([^\]]+)\]", r"list of \1"),
    (r"Iterable\[([^\]]+)\]", r"iterable of \1"),
    (r"dict\[[^\]]+\]", "dict"),
    (r"tuple\[([^\]]+)\]", r"(\1)"),
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
    """Give parameters the types that the signature has; link what is returned and raised."""
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
        elif section in ("Returns", "Yields", "Raises", "Warns") and re.match(r"\w", line):
            lines[number] = link_names(line)


def format_type(annotation: str) -> str:
    """Return an annotation as prose, with links to the public classes."""
    text = re.sub(r"\b\w+\b", lambda name: READABLE.get(name[0], name[0]), str(annotation))
    for pattern, readable in REPLACED:
        text = re.sub(pattern, readable, text)
    return link_names(text)


def link_names(text: str) -> str:
    """Return a text with links to the public names in it."""
    names = "|".join(dask_imgread.__all__)
    return re.sub(rf"\b({names})\b", r":obj:`~dask_imgread.\1`", text)


def setup(app: Sphinx) -> dict[str, bool]:
    """Add types before numpydoc reads the docstrings."""
    app.connect("autodoc-process-docstring", add_types, priority=400)
    return {"parallel_read_safe": True}
