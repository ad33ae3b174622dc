"""Digests of all that decides what a user's function does, so that an edit of it is noticed.

Followed are the functions, classes and values that code refers to by name, as far as they are the
user's own. Libraries are not: with a new release of one, a nightly job goes on.

Not noticed are edits of data files and of modules imported inside a function, names looked up as
strings, attributes set on functions, globals and closures that the code itself assigns. Of a
library's object (a model, a client) nothing is known unless Dask has a token for its type, as for
arrays and frames; where a global holds one, the statement that assigns it counts. Values that
change at run time in other ways, such as a dict used as a cache, look like an edit if the function
is digested again in the same process.

Source is read from disk, as new workers read it. Where there is none, bytecode is compared, which
differs between versions of Python.
"""

from __future__ import annotations

import ast
import dis
import hashlib
import inspect
import linecache
import os
import re
import sys
import sysconfig
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import tzinfo
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path, PurePath
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from dask.base import normalize_token, tokenize
from dask.sizeof import sizeof

_LARGEST = 100_000_000  # bytes of an array or of text
_MOST, _DEEPEST = 1_000_000, 100  # values in a value, and levels of them
_SHOWN = 5  # edits
_SCALARS = (bool, int, float, complex, str, bytes, bytearray, type(None), type(...))
_CONTAINERS = (dict, types.MappingProxyType, set, frozenset, list, tuple, deque)
_UNORDERED = (set, frozenset)
_PICKLED = (np.generic, range, re.Pattern, tzinfo)  # alike in all processes
_BUILTINS = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
_WRAPPED = ("__wrapped__", "__func__", "fget", "fset", "fdel", "func", "py_func", "pyfunc")
_BOUND = ("__self__", "args", "keywords")
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_LIBRARIES = {sysconfig.get_path(n) for n in ("stdlib", "platstdlib", "purelib", "platlib")}


def digest_code(fn: Callable[..., Any]) -> dict[str, str]:
    """Return a digest of each thing that decides what a function does, under a name for users.

    The digests depend neither on the process nor on the folder of the code. Nothing is imported,
    and nothing is raised, whatever the function is.
    """
    walk = _Walk()
    with suppress(Exception):
        walk.start(fn)
    return walk.finish()


def describe_edits(was: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return in words how a function differs from what it was; nothing if either is unknown.

    >>> describe_edits({"mean:measure": "1c", "mean:SIZE": "7B"}, {"mean:measure": "2f"})
    ['mean:measure was edited', 'mean:SIZE is not used any more']
    """
    if not was or not now:
        return []
    common = sorted(name for name in was.keys() & now.keys() if was[name] != now[name])
    edits = [f"{name} was edited" for name in common if not now[name].isupper()]
    edits += [f"{name} was changed" for name in common if now[name].isupper()]
    edits += [f"{name} is new" for name in sorted(now.keys() - was.keys())]
    edits += [f"{name} is not used any more" for name in sorted(was.keys() - now.keys())]
    more = [f"and {len(edits) - _SHOWN} more"] if len(edits) > _SHOWN else []
    return edits[:_SHOWN] + more


class _Walk:
    """The way from a function through the code and the values that it uses."""

    def __init__(self) -> None:
        self._digests: dict[str, set[str]] = {}  # several where a name is not unique: <lambda>
        self._reached: list[Any] = []  # functions and classes
        self._assigned: set[str] = set()  # globals that the code changes
        self._files: dict[str, dict[tuple[int, str], list[ast.AST]]] = {}
        # While a value is written:
        self._open: set[int] = set()  # ids of the values around the present one
        self._written = 0
        self._unknown = False  # whether part of it is

    def start(self, fn: Any) -> Any:
        """Begin with a function, or with what wraps one; return the function or class in it."""
        kind = type(fn)
        if issubclass(kind, partial):
            code = self.start(fn.func)
            for place, value in [*enumerate(fn.args, 1), *fn.keywords.items()]:
                self._add(f"argument {place!r} of {_name(code)}", value, _get_names(code))
            return code
        if kind is MethodType:
            self.start(fn.__self__)
            return self.start(fn.__func__)
        code = fn if issubclass(kind, (FunctionType, type, *_BUILTINS)) else kind
        names = _get_names(code)
        with suppress(Exception):  # such as of a closure that holds a large value
            self._write(code)
            if not _is_own(names):
                self._put(_name(code), self._write(fn))
        for attribute, value in _list_state(fn) if code is kind and _is_own(names) else ():
            self._add(f"attribute {attribute!r} of {_name(code)}", value, names)
        return code

    def finish(self) -> dict[str, str]:
        """Follow all code that has been reached, and return the digests."""
        for code in self._reached:  # grows meanwhile
            self._written = 0
            with suppress(Exception):
                if not _is_own(_get_names(code)):
                    self._visit_library(code)
                elif isinstance(code, type):
                    self._visit_class(code)
                else:
                    self._visit_function(code)
        return {
            name: "".join(digests) if len(digests) == 1 else _merge(name, sorted(digests))
            for name, digests in sorted(self._digests.items())
            if name not in self._assigned
        }

    def _visit_function(self, fn: FunctionType) -> None:
        name, names, code = _name(fn), fn.__globals__, fn.__code__
        if code.co_qualname.startswith("__create_fn__"):
            return  # made by dataclasses, from the fields
        if code.co_name == "__annotate__":
            return  # made by Python 3.14: annotations do nothing
        cells, uses = _get_cells(fn), list(_list_uses(code))
        place = (code.co_firstlineno, code.co_name)
        source = self._find_source(code.co_filename, names, *place)
        version = "Python {}.{}".format(*sys.version_info)
        self._put(name if source else f"{name} ({version})", source or self._write(code))
        if fn.__defaults__ or fn.__kwdefaults__:
            self._add(f"defaults of {name}", [fn.__defaults__, fn.__kwdefaults__], names)
        for use, (first, *attributes) in uses:
            if use in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                self._assigned.add(f"{_name_module(names)}:{first}")
            elif use == "STORE_DEREF":
                cells.pop(first, None)
            elif not use.endswith("DEREF"):
                self._add_global(names, [first, *attributes])
            elif type(cells.get(first)) is ModuleType and _is_own(vars(cells[first])):
                self._add_global(vars(cells[first]), attributes)
        for variable, value in cells.items():
            self._add(f"{name} closure {variable!r}", value, names)
        self._write(vars(fn).get("__wrapped__"))

    def _visit_class(self, cls: type) -> None:
        name, names, members = _name(cls), _get_names(cls), vars(cls)
        fields = [
            (field.name, field.default, field.default_factory, field.init, field.kw_only)
            for field in members.get("__dataclass_fields__", {}).values()
        ]
        self._put(name, self._write([cls.__bases__, fields, members.get("_member_map_")]))
        for member, value in members.items():
            if callable(value) or issubclass(type(value), property | staticmethod | classmethod):
                self._write(value)
            elif type(value) is not cls and not re.fullmatch("_.*_", member):  # a member of an Enum
                self._add(f"{name}.{member}", value, names)

    def _visit_library(self, code: Any) -> None:
        """Follow what wraps a function of the user's."""
        if isinstance(code, FunctionType):
            self._write([*_get_cells(code).values(), vars(code).get("__wrapped__")])

    def _add_global(self, names: dict[str, Any], chain: list[str]) -> None:
        """Digest what a name refers to, or ``helpers.SIZE`` in a module of the user's own."""
        for name in chain:
            if name not in names or not name.isidentifier() or re.fullmatch("__.*__", name):
                return  # a builtin, or a name that pytest or Python gives
            value = names[name]
            if not issubclass(type(value), ModuleType) or not _is_own(_get_dict(value)):
                self._add(f"{_name_module(names)}:{name}", value, names, name)
                return
            names = _get_dict(value)

    def _add(self, name: str, value: object, names: dict[str, Any], variable: str = "") -> None:
        """Digest a value that a module's code uses, if anything is known of it."""
        self._written, self._unknown = 0, False
        try:
            text = self._write(value)
        except OverflowError:
            text = _name(type(value))
        except Exception:  # a value unlike others of its type
            text, self._unknown = "", True
        self._written = 0  # of what is written next
        file = str(names.get("__file__", ""))
        if self._unknown and variable:
            text += self._find_source(file, names, 0, variable)
        if text and text != name:  # a function under its own name is digested with its code
            folder = os.path.dirname(file)  # other paths may lie beside the code
            self._put(name, text.replace(folder, ".") if len(folder) > 1 else text, str.upper)

    def _put(self, name: str, text: str, case: Callable[[str], str] = str) -> None:
        """Keep a digest: with capital letters of a value, which is "changed" and not "edited"."""
        self._digests.setdefault(name, set()).add(case(_digest(name, text)))

    def _find_source(self, file: str, names: dict[str, Any], line: int, name: str) -> str:
        """Return source without comments and docstrings; of all lambdas that begin in a line."""
        if file not in self._files:
            self._files[file] = _read_source(file, names)
        # ast.dump differs more between versions of Python.
        return "\n".join(map(ast.unparse, self._files[file].get((line, name), ())))

    def _write(self, value: Any) -> str:
        """Return a text that is the same for equal values in all processes; "" for unknown ones."""
        self._written += 1
        if self._written > _MOST or len(self._open) > _DEEPEST:
            raise OverflowError
        kind = type(value)
        if kind in _SCALARS:
            large = kind in (str, bytes, bytearray) and len(value) > _LARGEST
            return f"{kind} {len(value)}" if large else f"{value:x}" if kind is int else repr(value)
        if id(value) in self._open:
            return "..."
        self._open.add(id(value))
        try:
            if kind is FunctionType or issubclass(kind, (type, *_BUILTINS)):
                return self._write_code(value)
            if issubclass(kind, ModuleType):
                return ""
            container = next((base for base in _CONTAINERS if issubclass(kind, base)), None)
            written = self._write_items(value, container) if container else ""
            return written if kind is container else self._write_object(value, kind) + written
        finally:
            self._open.discard(id(value))

    def _write_code(self, code: Any) -> str:
        """Have code followed; return its name, with what distinguishes closures."""
        if not any(code is other for other in self._reached):
            self._reached.append(code)
        text, own = _name(code), _is_own(_get_names(code))
        if type(code) is FunctionType:
            cells = _get_cells(code).values()
            held = [self._write(cell) for cell in cells if own or type(cell) is FunctionType]
            return _join(text, held) if held else text
        bound = getattr(code, "__self__", None) if isinstance(code, _BUILTINS) else None
        return text if bound is None or type(bound) is ModuleType else text + self._write(bound)

    def _write_items(self, value: Any, container: Any) -> str:
        if container in (dict, types.MappingProxyType):
            items = container.items(value)
            written = sorted(f"{self._write(key)}: {self._write(held)}" for key, held in items)
        else:
            written = [self._write(item) for item in container.__iter__(value)]
        return _join(container.__name__, sorted(written) if container in _UNORDERED else written)

    def _write_object(self, value: Any, kind: type) -> str:
        own = kind is types.SimpleNamespace or _is_own(_get_names(kind))
        state = dict(_list_state(value))
        parts = [self._write(kind), self._write(state)] if own else []
        if issubclass(kind, PurePath):
            parts.append(repr(str(value)))
        elif kind is CodeType:
            names = (value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars)
            parts.append(self._write((value.co_code, names, value.co_consts)))
        elif not own and any(name in state for name in _WRAPPED):
            return " ".join(self._write(state[n]) for n in (*_WRAPPED, *_BOUND) if n in state)
        elif _has_token(kind, own):
            large = sizeof(value) > _LARGEST
            kept = [str(getattr(value, name, "")) for name in ("dtype", "shape")]
            parts += kept if large else [tokenize(value, ensure_deterministic=True)]
        elif not own and not issubclass(kind, _CONTAINERS):
            self._unknown = True
            return ""
        return _join(_name(kind), parts)


def _read_source(file: str, names: dict[str, Any]) -> dict[tuple[int, str], list[ast.AST]]:
    """Return a file's functions by line and name, and at line 0 what assigns each variable."""
    with suppress(Exception), warnings.catch_warnings():  # Python has given them before
        warnings.simplefilter("ignore")
        linecache.checkcache(file)
        return _index_source("".join(linecache.getlines(file, names)))
    return {}


@lru_cache(maxsize=8)  # a large file takes long, and is often the same
def _index_source(source: str) -> dict[tuple[int, str], list[ast.AST]]:
    tree = ast.parse(source)
    found: dict[tuple[int, str], list[ast.AST]] = {}
    for node in ast.walk(tree):
        if isinstance(node, _DEFINITIONS):
            if ast.get_docstring(node, clean=False) is not None:
                node.body[:1] = [] if len(node.body) > 1 else [ast.Pass()]
            line = min(part.lineno for part in (node, *node.decorator_list))
            found.setdefault((line, node.name), []).append(node)
        elif isinstance(node, ast.Lambda):
            found.setdefault((node.lineno, "<lambda>"), []).append(node)
    for statement in tree.body:
        for node in () if isinstance(statement, _DEFINITIONS) else ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.setdefault((0, node.id), []).append(statement)
    return found


def _digest(name: str, text: str) -> str:
    data = f"{name}\0{text}".encode("utf-8", "backslashreplace")
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _join(name: str, parts: list[str]) -> str:
    return f"{name}({', '.join(parts)})"  # without repr, which would escape again at each level


def _merge(name: str, digests: list[str]) -> str:
    merged = _digest(name, str(digests))
    return merged.upper() if all(map(str.isupper, digests)) else merged


def _list_uses(code: CodeType) -> Iterator[tuple[str, list[str]]]:
    """Yield how code uses each name that is not local, with the attributes that it takes of it."""
    use, chain = "", list[str]()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and chain:
            chain.append(step.argval)
        elif step.opname != "EXTENDED_ARG":
            if chain:
                yield use, chain
            named = re.search("_(GLOBALS?|NAME|DEREF)$", step.opname)
            use, chain = step.opname, [step.argval] if named else []
    for constant in code.co_consts:
        if type(constant) is CodeType:
            yield from _list_uses(constant)


def _list_state(value: object) -> Iterator[tuple[str, Any]]:
    """Yield the attributes that an object holds, but for those that it computes on demand."""
    for name, held in _get_dict(value).items():
        if type(inspect.getattr_static(type(value), name, None)) is not cached_property:
            yield name, held
    for kind in type(value).__mro__:
        for name, slot in vars(kind).items():
            if type(slot) is types.MemberDescriptorType:
                with suppress(AttributeError):  # not set
                    yield name, slot.__get__(value)


def _has_token(kind: type, own: bool) -> bool:
    """Return whether values of a type have a token that is the same in all processes."""
    if own and inspect.getattr_static(kind, "__dask_tokenize__", None):
        return True  # fsspec's has the process's id
    registered = normalize_token.dispatch(kind) is not normalize_token.dispatch(object)
    return registered or issubclass(kind, _PICKLED)


def _get_dict(value: object) -> dict[str, Any]:
    """Return what an object or a module holds, without running code of its own."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except Exception:
        return {}
    return found if type(found) is dict else {}


def _get_cells(fn: FunctionType) -> dict[str, Any]:
    found = {}
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        with suppress(ValueError):  # empty
            found[name] = cell.cell_contents
    return found


def _get_names(code: Any) -> dict[str, Any]:
    """Return the globals of the module of a function or class."""
    if isinstance(code, FunctionType):
        return code.__globals__
    module = getattr(code, "__module__", None) or "builtins"
    return _get_dict(sys.modules.get(module)) or {"__name__": module}


def _name(code: Any) -> str:
    names = _get_names(code)
    module = _name_module(names)
    name = code.__code__.co_qualname if isinstance(code, FunctionType) else code.__qualname__
    return f"{module if _is_own(names) else module.partition('.')[0]}:{name}"


def _name_module(names: Mapping[str, Any]) -> str:
    """Return a module's name; of a script, that by which it would be imported."""
    name = str(names.get("__name__", "__main__"))
    spec, file = names.get("__spec__"), names.get("__file__")
    if name != "__main__":
        return name
    return str(spec.name) if spec else Path(file).stem if file else name


def _is_own(names: Mapping[str, Any]) -> bool:
    """Return whether a module is the user's own, and no library's."""
    name, file = str(names.get("__name__", "__main__")), names.get("__file__")
    package = name.partition(".")[0]
    if name == "__main__" or package == "dask_imgread" or package.startswith("namedtuple_"):
        return name == "__main__"
    if isinstance(file, str):
        return not _is_installed(file)
    return package not in sys.stdlib_module_names


@cache
def _is_installed(file: str) -> bool:
    folders = Path(os.path.abspath(file)).parents
    installed = {"site-packages", "dist-packages"} & {folder.name for folder in folders}
    return bool(installed) or not _LIBRARIES.isdisjoint(map(str, folders))
