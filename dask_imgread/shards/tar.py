"""Walk the headers of a tar archive: the name, offset and size of each file.

Only headers are read, whatever lies between them. The formats are ustar
(POSIX.1-1988), PAX (POSIX.1-2001) and GNU tar, as described in POSIX's ``pax``
page and in GNU tar's manual, "Basic Tar Format".
"""

from __future__ import annotations

import posixpath
import zlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

BLOCK = 512
_ZEROS = bytes(BLOCK)
_RECORD = 10_240  # bytes: what writers fill up to behind the mark of an archive's end
_FIRST_LOOK, _FAR_LOOK = 16 << 10, 4 << 20  # bytes at a time, where a header is looked for
_MAX_EXTENDED_HEADER = 1 << 20  # a real one holds a path; more is an attack on memory
_FARTHEST = 1 << 62  # past any file's end, and still an offset that the system takes

_FILES = b"0\0007"  # regular file, regular file before POSIX, contiguous file
_GNU_LONG_NAME, _GNU_LONG_LINK, _GNU_SPARSE = b"L", b"K", b"S"
_PAX, _PAX_GLOBAL, _PAX_SOLARIS = b"x", b"g", b"X"
_PAX_KINDS = (_PAX, _PAX_GLOBAL, _PAX_SOLARIS)
_PAX_TELLING = frozenset(("path", "linkpath", "size", "GNU.sparse.name", "GNU.sparse.major"))
_EXTENDED = (_GNU_LONG_NAME, _GNU_LONG_LINK, _PAX, _PAX_GLOBAL, _PAX_SOLARIS)
_HARD_LINK, _SYMBOLIC_LINK = b"1", b"2"


class NotTarError(ValueError):
    """The bytes do not begin with a tar header."""


class ByteSource(Protocol):
    """Bytes that can be read at any offset."""

    def read_at(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset``; fewer where the source ends."""

    def view_at(self, offset: int, size: int) -> memoryview:
        """Return the same without a copy, where what follows is on its way already."""

    def keep(self, offset: int) -> None:
        """Say that nothing before an offset is needed any more, but what follows may be."""

    def end(self) -> int:
        """Return the offset at which the source ends; known after a short read."""

    @property
    def streamed(self) -> bool:
        """Whether bytes are best read once, and in order."""

    @property
    def compressed(self) -> bool:
        """Whether the file is compressed, so that no part of it can be read by itself."""

    @property
    def problem(self) -> str:
        """Why it ends there: the decompressor's error, if it is not the end of the file."""


class Member(NamedTuple):
    """One file of a tar archive, or one place at which the archive is broken.

    ``start`` is the offset of its first header block, ``offset`` and ``size`` span
    its bytes. ``problem`` says why the bytes can't be had; it is None for a file
    that is whole. A problem that belongs to no file has an empty ``name``. Where one
    archive ends and another begins, put together with `cat`, there is neither.

    Of a link ``link`` is the path in the archive that it stands for; a ``hard`` one stands for
    a member before it.
    """

    name: str
    start: int
    offset: int
    size: int
    problem: str | None = None
    link: str | None = None
    hard: bool = False


def walk_members(source: ByteSource, start: int = 0, stop: int | None = None) -> Iterator[Member]:
    """Yield each file in the archive in order; never raise for what comes after the first header.

    Parameters
    ----------
    source
        The archive.
    start, stop
        Offsets of the header blocks to begin with and to end before, so that a part
        of an archive can be walked by itself. ``start`` must be a member's first header.

    Yields
    ------
    Member
        Directories and devices are passed over. Where the archive is damaged a nameless
        member's ``problem`` says so; what follows from the next header on is read. Where the
        archive is cut the last member's says so.

    Raises
    ------
    NotTarError
        If an archive walked from offset 0 does not begin with a tar header.
    """
    position = start
    begin: int | None = None  # the first header block of the member, its extended headers included
    long_name: str | None = None
    long_link: str | None = None
    attributes: dict[str, str] = {}
    shared: dict[str, str] = {}
    archive = 0  # where this one begins, of several put together with `cat`
    previous: Member | None = None  # held back until it is known that its bytes are there

    read_at, new = source.read_at, tuple.__new__
    while stop is None or position < stop or begin is not None:
        header = read_at(position, BLOCK)
        if len(header) < BLOCK and (header.strip(b"\0") or not header):
            yield from _cut_archive(source, position, previous)
            return
        if previous is not None:
            yield previous
            previous = None
        try:
            if not header[0] and header == _ZEROS[: len(header)]:
                raise ValueError("zeros")
            _verify_checksum(header)
            size = _parse_number(header[124:136])
            kind = header[156:157]
            body = position + BLOCK
            if kind == b"0" and begin is None and not shared:  # the common case, made short
                name = _parse_name(header)
                if name[-1:] != "/":  # the old way to say "directory"
                    # As Member(...), which takes three times as long.
                    previous = new(Member, (name, position, body, size, None, None, False))
                position = body + (size + 511 & -512)
                continue
            text = _read_extended(source, body, size) if kind in _EXTENDED else b""
            pax = _parse_pax(text) if kind in _PAX_KINDS else {}
        except ValueError as error:
            if position == 0 and header.strip(b"\0"):
                raise NotTarError(f"not a tar archive: {error}") from None
            found, damage = _cross_gap(source, position, str(error), archive)
            if damage is not None:
                yield damage
            if found is None:
                return
            if damage is not None and damage.problem is None:
                archive = found
            position, begin, long_name, long_link, attributes = found, None, None, None, {}
            continue

        if begin is None:
            begin = position
        if kind in _EXTENDED:
            if kind == _GNU_LONG_NAME:
                long_name = _decode(_cut_text(text))
            elif kind == _GNU_LONG_LINK:
                long_link = _decode(_cut_text(text))
            elif kind == _PAX_GLOBAL:
                shared.update(pax)
                begin = None
                if shared.keys() & _PAX_TELLING:  # of what follows no part is whole without it
                    yield Member("", position, position, 0)
            else:
                attributes = pax
            position = body + _padded(size)
            continue

        if shared:
            attributes = shared | attributes
        if "size" in attributes:
            size = _parse_decimal(attributes["size"], size)
        name = attributes.get("path") or long_name or _parse_name(header)
        if kind in (_HARD_LINK, _SYMBOLIC_LINK):
            target = attributes.get("linkpath") or long_link or _decode(_cut_text(header[157:257]))
            if kind == _SYMBOLIC_LINK:
                target = posixpath.join(posixpath.dirname(name), target)
            previous = Member(name, begin, body, 0, link=target, hard=kind == _HARD_LINK)
        elif kind in _FILES or kind == _GNU_SPARSE:
            sparse = kind == _GNU_SPARSE or any(key.startswith("GNU.sparse") for key in attributes)
            if not name.endswith("/"):
                name = attributes.get("GNU.sparse.name", name)
                problem = "unsupported: stored as a sparse file" if sparse else None
                previous = Member(name, begin, body, size, problem)
        if kind == _GNU_SPARSE:
            body = _skip_sparse_map(source, header, body)
        position = body + (_padded(size) if kind not in b"123456" else 0)
        begin, long_name, long_link, attributes = None, None, None, {}

    if previous is not None:
        yield previous


def _cut_archive(source: ByteSource, position: int, previous: Member | None) -> Iterator[Member]:
    """Yield the last member, and a record of the cut, of an archive without an end mark."""
    end = source.end()
    reason = f": {source.problem}" if source.problem else ""
    if position == 0 and source.problem:
        raise NotTarError(f"it can't be decompressed: {source.problem}")
    if position == 0:
        raise NotTarError(
            "not a tar archive: " + (f"only {end} bytes long" if end else "the file is empty")
        )
    if previous is not None and previous.offset + previous.size > end:
        missing = previous.offset + previous.size - end
        cut = f"truncated archive: it ends at byte {end}, {missing} bytes before this member does"
        cut += reason
        yield previous._replace(problem=cut)
        return
    if previous is not None:
        yield previous
    cut = f"truncated archive: it ends at byte {end} without an end-of-archive mark{reason}"
    yield Member("", min(position, end), min(position, end), 0, cut)


def _read_extended(source: ByteSource, offset: int, size: int) -> bytes:
    text = source.read_at(offset, size) if size <= _MAX_EXTENDED_HEADER else b""
    if len(text) < size or (size and not text.strip(b"\0")):
        raise ValueError(f"extended header of {size} bytes")
    return text


def _cross_gap(
    source: ByteSource, start: int, problem: str, archive: int
) -> tuple[int | None, Member | None]:
    """Return where the next header lies, if there is one, and a record of what lies before it.

    Zeros are the mark of an archive's end, and fill its last record. All else is damage; of zeros,
    too, more: a download that was given its space at once, and broke off, has holes of them.
    """
    position, found = start + BLOCK, None
    size, zeros = _FIRST_LOOK, problem == "zeros"
    while found is None:
        piece = source.read_at(position, size)
        blocks = np.frombuffer(piece, np.uint8, len(piece) & -BLOCK).reshape(-1, BLOCK)
        (filled,) = np.nonzero(blocks.any(axis=1))
        # Checksums are octal numbers: of anything else few blocks have one.
        likely = ((blocks[filled, 149:152] & 0xF8) == 0x30).all(axis=1)
        header = next((n for n in filled[likely].tolist() if is_header(blocks[n].tobytes())), None)
        zeros &= len(filled) == 0 or filled[0] == header
        if header is not None:
            found = position + header * BLOCK
        elif len(piece) < size:
            zeros &= not piece[len(blocks) * BLOCK :].strip(b"\0")
            break
        position, size = position + size, min(4 * size, _FAR_LOOK)
    end = source.end() if found is None else found
    # Behind what ends in zeros they are more of the same.
    hole = found is not None and start and not source.read_at(start - BLOCK, BLOCK).strip(b"\0")
    if zeros and not hole and _is_end_mark(start, end, archive, more=found is not None):
        # One archive behind the other: their samples have nothing to do with each other.
        return found, Member("", end, end, 0) if found is not None else None
    problem = "zeros (a hole, or padding for tapes)" if zeros else problem
    text = f"damaged archive: {problem} at offset {start}, no header in {end - start} bytes"
    if found is None and source.problem:
        text += f": {source.problem}"
    return found, Member("", start, start, 0, text)


def _is_end_mark(start: int, end: int, archive: int, *, more: bool) -> bool:
    """Say whether zeros can be the end of an archive, with or without another one behind it.

    That is two blocks, and what fills a record of the usual size. Of larger ones, for tapes, it
    can't be told from a hole.
    """
    if start == 0:
        return not more and 2 * BLOCK <= end <= _RECORD  # an archive of nothing
    fills = end - start < _RECORD + 2 * BLOCK
    return end - start == 2 * BLOCK or (fills and (not more or (end - archive) % _RECORD == 0))


def is_header(block: bytes) -> bool:
    """Say whether a block is a whole tar header."""
    try:
        _verify_checksum(block)
        _parse_number(block[124:136])
    except ValueError:
        return False
    return True


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _verify_checksum(header: bytes) -> None:
    """Raise ValueError unless the header's own checksum agrees with its bytes."""
    try:
        stated = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        raise ValueError("no tar header") from None
    # The low half of Adler-32 is 1 + the sum of the bytes, modulo 65521, and comes from C.
    blanked = header[:148] + b"        " + header[156:]
    if zlib.adler32(blanked) & 0xFFFF == (1 + stated) % 65521:
        return
    # Some old writers summed signed bytes.
    if stated != sum(byte - 256 if byte > 127 else byte for byte in blanked):
        raise ValueError("wrong checksum in a tar header")


def _parse_number(field: bytes) -> int:
    """Parse an octal field, or a base-256 one as GNU tar writes for large numbers."""
    if field[:11].isdigit() and field[11] in (0, 32):  # as nearly every writer has it
        return int(field[:11], 8)
    if field[0] == 0x80:
        return min(int.from_bytes(field[1:], "big"), _FARTHEST)
    text = field.split(b"\0", 1)[0].strip() or b"0"
    if not text.isdigit() or b"8" in text or b"9" in text:
        raise ValueError(f"unreadable size {text!r} in a tar header")
    return int(text, 8)


def _parse_decimal(text: str, default: int) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else default


def _parse_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":
        name = _cut_text(header[345:500]) + b"/" + name
    return _decode(name)


def _parse_pax(text: bytes) -> dict[str, str]:
    """Parse PAX records, ``<length> <key>=<value>`` lines; stop at the first that is not one.

    Raises
    ------
    ValueError
        If there is none.
    """
    attributes: dict[str, str] = {}
    position = 0
    while position < len(text):
        space = text.find(b" ", position, position + 9)
        length = text[position:space] if space > 0 else b""
        end = position + int(length) if length.isdigit() else 0
        if end <= space + 2 or end > len(text):
            break
        key, _, value = text[space + 1 : end].rstrip(b"\n").partition(b"=")
        attributes[_decode(key)] = _decode(value)
        position = end
    if text and not attributes:
        raise ValueError(f"extended header of {len(text)} bytes")
    return attributes


def _skip_sparse_map(source: ByteSource, header: bytes, body: int) -> int:
    """Return where a GNU sparse file's data begins, after its further maps."""
    more = header[482:483] == b"\1"
    while more:
        block = source.read_at(body, BLOCK)
        more = len(block) == BLOCK and block[504:505] == b"\1"
        body += BLOCK
    return body


def _cut_text(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def _decode(name: bytes) -> str:
    # UTF-8 is what writers use; what is not becomes \xNN, so that it can be stored and printed.
    return name.decode("utf-8", "backslashreplace")
