"""The reference of the public names: all are there, and their docstrings are complete."""

import inspect
import re

import pytest
from numpydoc.validate import validate

import dask_imgread
import dask_imgread.testing
from tests.helpers.markdown import ROOT

# See numpydoc.validate.ERROR_MSGS. Types are in the annotations, from which the reference has them;
# which names have examples, another test says.
NOT_ASKED = {"ES01", "EX01", "PR04", "SA01"}


def list_names():
    for module in (dask_imgread, dask_imgread.testing):
        for name in module.__all__:
            yield f"{module.__name__}.{name}"


def list_members(name):
    """Return the names of a class's own public methods and properties."""
    public = getattr(dask_imgread, name)
    members = vars(public).items() if inspect.isclass(public) else ()
    return [
        f"dask_imgread.{name}.{member}"
        for member, value in members
        if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
    ]


MEMBERS = [member for name in dask_imgread.__all__ for member in list_members(name)]


@pytest.mark.parametrize("name", [*list_names(), *MEMBERS])
def test_docstrings_are_complete(name):
    errors = validate(name)["errors"]
    assert [message for code, message in errors if code not in NOT_ASKED] == []


def test_the_reference_has_every_name_once():
    page = (ROOT / "docs" / "api" / "index.rst").read_text()
    blocks = re.findall(r"\.\. (currentmodule:: .*|autosummary::(?:\n   .*|\n)+)", page)
    module, listed = "", []
    for block in blocks:
        if block.startswith("currentmodule"):
            module = block.split()[1]
        else:
            listed += [
                f"{module}.{name}" for name in re.findall(r"^   (\w+)$", block, re.MULTILINE)
            ]
    assert sorted(listed) == sorted(list_names())
