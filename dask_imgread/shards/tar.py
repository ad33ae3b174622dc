"""Walk the headers of a tar archive: the name, offset and size of each file.

Only headers are read, not the content between them. The formats are ustar (POSIX.1-1988), PAX
(POSIX.1-2001) and GNU tar, as described in POSIX's ``pax`` page and in GNU tar's manual, "Basic Tar
Format".
"""

from __future__ import annotations

import functools
import posixpath
import zlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

BLOCK = 512
_ZEROS = bytes(BLOCK)
_RECORD = 10_240  # bytes: writers pad an archive with zeros to a multiple of it, by default
_FIRST_SCAN, _MAX_SCAN = 16 << 10, 4 << 20  # bytes read at a time in search of a header
_MAX_EXTENDED_HEADER = 1 << 20  # a real one holds a path; more is an attack on memory
_MAX_OFFSET = 1 << 62  # beyond the end of any file, but a valid offset for the system

_FILES = b"0\0007"  # regular file, regular file before POSIX, contiguous file
_GNU_LONG_NAME, _GNU_LONG_LINK, _GNU_SPARSE = b"L", b"K", b"S"
_PAX, _PAX_GLOBAL, _PAX_SOLARIS = b"x", b"g", b"X"
_PAX_KINDS = (_PAX, _PAX_GLOBAL, _PAX_SOLARIS)
_PAX_KEYS = frozenset(("path", "linkpath", "size", "GNU.sparse.name", "GNU.sparse.major"))
_EXTENDED = (_GNU_LONG_NAME, _GNU_LONG_LINK, _PAX, _PAX_GLOBAL, _PAX_SOLARIS)
_HARD_LINK, _SYMBOLIC_LINK = b"1", b"2"


class NotTarError(ValueError):
    """The bytes do not begin with a tar header."""


class ByteSource(Protocol):
    """Bytes that can be read at any offset."""

    def read_at(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset``; fewer if the source ends before."""

    def view_at(self, offset: int, size: int) -> memoryview:
        """Return the same, without a copy if the bytes are already in memory."""

    def keep(self, offset: int) -> None:
        """Allow the bytes before ``offset`` to be discarded; those from it on may still be read."""

    def end(self) -> int:
        """Return the offset at which the source ends; call it only after a short read."""

    @property
    def streamed(self) -> bool:
        """Whether bytes should be read only once, and in order."""

    @property
    def sequential(self) -> bool:
        """Whether it can be read only once, and from its beginning on: no part by itself."""

    @property
    def problem(self) -> str:
        """The decompressor's error, if the source ends because of one; else empty."""


class Member(NamedTuple):
    """One file of a tar archive, or one place where the archive is damaged.

    ``start`` is the offset of its first header block; its content is the ``size`` bytes at
    ``offset``. ``problem`` is the reason why the content can't be read, None if it can. Damage
    that belongs to no file has a ``problem`` and an empty ``name``. A member with neither marks
    the boundary between two archives that were concatenated with ``cat``.

    For a link, ``link`` is the path of its target in the archive. The target of a ``hard`` link
    is a member before it.
    """

    name: str
    start: int
    offset: int
    size: int
    problem: str | None = None
    link: str | None = None
    hard: bool = False


def walk_members(source: ByteSource, start: int = 0, stop: int | None = None) -> Iterator[Member]:
    """Yield the files of an archive in order; damage after the first header is yielded, not raised.

    Parameters
    ----------
    source
        The archive.
    start, stop
        The part of the archive to walk: offsets of the first header block to read, and of the
        first not to read. ``start`` must be a member's first header block.

    Yields
    ------
    Member
        Regular files and links; directories and devices are skipped. Damage is yielded as a
        member without a name, and the walk goes on at the next header. If the archive is
        truncated, the last member has a ``problem``.

    Raises
    ------
    NotTarError
        If an archive walked from offset 0 does not begin with a tar header.
    """
    position = start
    begin: int | None = None  # where the member begins, once an extended header of it is read
    long_name: str | None = None
    long_link: str | None = None
    attributes: dict[str, str] = {}
    global_pax: dict[str, str] = {}
    archive_start = 0  # of the current one, if several were concatenated with `cat`
    previous: Member | None = None  # yielded once the next header shows that it is not truncated

    read_at, new = source.read_at, tuple.__new__
    while stop is None or position < stop or begin is not None:
        header = read_at(position, BLOCK)
        if len(header) < BLOCK and (header.strip(b"\0") or not header):
            yield from _end_truncated(source, position, previous)
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
            if kind == b"0" and begin is None and not global_pax:  # the common case, optimized
                name = _parse_name(header)
                if name[-1:] != "/":  # how a directory is marked before ustar
                    # The same as Member(...), in a third of the time.
                    previous = new(Member, (name, position, body, size, None, None, False))
                position = body + (size + 511 & -512)
                continue
            text = _read_extended(source, body, size) if kind in _EXTENDED else b""
            pax = _parse_pax(text) if kind in _PAX_KINDS else {}
        except ValueError as error:
            if position == 0 and header.strip(b"\0"):
                raise NotTarError(f"not a tar archive: {error}") from None
            found, damage = _find_next_header(source, position, str(error), archive_start)
            if damage is not None:
                yield damage
            if found is None:
                return
            if damage is not None and damage.problem is None:
                archive_start = found
            position, begin, long_name, long_link, attributes = found, None, None, None, {}
            continue

        if begin is None:
            begin = position
        if kind in _EXTENDED:
            if kind == _GNU_LONG_NAME:
                long_name = _decode(_c_string(text))
            elif kind == _GNU_LONG_LINK:
                long_link = _decode(_c_string(text))
            elif kind == _PAX_GLOBAL:
                global_pax.update(pax)
                begin = None
                if global_pax.keys() & _PAX_KEYS:  # no later part can be read without it
                    yield Member("", position, position, 0)
            else:
                attributes = pax
            position = body + pad(size)
            continue

        if global_pax:
            attributes = global_pax | attributes
        if "size" in attributes:
            size = _parse_decimal(attributes["size"], size)
        name = attributes.get("path") or long_name or _parse_name(header)
        if kind in (_HARD_LINK, _SYMBOLIC_LINK):
            target = attributes.get("linkpath") or long_link or _decode(_c_string(header[157:257]))
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
        position = body + (pad(size) if kind not in b"123456" else 0)
        begin, long_name, long_link, attributes = None, None, None, {}

    if previous is not None:
        yield previous


def _end_truncated(source: ByteSource, position: int, previous: Member | None) -> Iterator[Member]:
    """Yield the last member of an archive without an end mark, and a record of the truncation."""
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


def _find_next_header(
    source: ByteSource, start: int, problem: str, archive_start: int
) -> tuple[int | None, Member | None]:
    """Return the offset of the next header, or None, and a record of the gap before it.

    Zeros mark the end of an archive and pad its last record. Anything else is damage, and so are
    more zeros than that: an interrupted download into preallocated space leaves holes of zeros.
    """
    position, found = start + BLOCK, None
    size, zeros = _FIRST_SCAN, problem == "zeros"
    while found is None:
        piece = source.read_at(position, size)
        blocks = np.frombuffer(piece, np.uint8, len(piece) & -BLOCK).reshape(-1, BLOCK)
        (filled,) = np.nonzero(blocks.any(axis=1))
        # A header's checksum is an octal number; few other blocks have digits in its place.
        likely = ((blocks[filled, 149:152] & 0xF8) == 0x30).all(axis=1)
        header = next((n for n in filled[likely].tolist() if is_header(blocks[n].tobytes())), None)
        zeros &= len(filled) == 0 or filled[0] == header
        if header is not None:
            found = position + header * BLOCK
        elif len(piece) < size:
            zeros &= not piece[len(blocks) * BLOCK :].strip(b"\0")
            break
        position, size = position + size, min(4 * size, _MAX_SCAN)
    end = source.end() if found is None else found
    # If the block before the gap is zeros too, a hole began inside the last member.
    hole = found is not None and start and not source.read_at(start - BLOCK, BLOCK).strip(b"\0")
    if zeros and not hole and _is_end_mark(start, end, archive_start, more=found is not None):
        # Two archives, one after the other: no sample spans both.
        return found, Member("", end, end, 0) if found is not None else None
    problem = "zeros (a hole, or padding for tapes)" if zeros else problem
    text = f"damaged archive: {problem} at offset {start}, no header in {end - start} bytes"
    if found is None and source.problem:
        text += f": {source.problem}"
    return found, Member("", start, start, 0, text)


def _is_end_mark(start: int, end: int, archive_start: int, *, more: bool) -> bool:
    """Return whether zeros can be an archive's end mark; ``more`` if another archive follows.

    An end mark is two blocks, and padding to a record of the default size. With larger records, as
    for tapes, the padding can't be distinguished from a hole.
    """
    if start == 0:
        return not more and 2 * BLOCK <= end <= _RECORD  # an empty archive
    padding = end - start < _RECORD + 2 * BLOCK
    at_record = (end - archive_start) % _RECORD == 0
    return end - start == 2 * BLOCK or (padding and (not more or at_record))


def is_header(block: bytes) -> bool:
    """Return whether a block is a valid tar header."""
    try:
        _verify_checksum(block)
        _parse_number(block[124:136])
    except ValueError:
        return False
    return True


def pad(size: int) -> int:
    """Return how many bytes a member's content takes, with the zeros after it."""
    return -(-size // BLOCK) * BLOCK


def _verify_checksum(header: bytes) -> None:
    """Raise ValueError unless a header's checksum matches its bytes."""
    total = _expect_sum(header[148:156])
    # The low half of Adler-32 is 1 + the sum of the bytes, modulo 65521, computed in C.
    if zlib.adler32(header) & 0xFFFF == (1 + total) % 65521:
        return
    # Some old writers summed signed bytes.
    if total != sum(byte - 256 if byte > 127 else byte for byte in header):
        raise ValueError("wrong checksum in a tar header")


@functools.lru_cache(1 << 14)  # more than there are sums of ordinary headers
def _expect_sum(field: bytes) -> int:
    """Return the sum of a header's bytes, given its checksum, in which this itself is blanks."""
    try:
        stated = int(field.strip(b" \0"), 8)
    except ValueError:
        raise ValueError("no tar header") from None
    return stated + sum(field) - 8 * ord(" ")


def _parse_number(field: bytes) -> int:
    """Parse an octal field, or a base-256 one, which GNU tar writes for large numbers."""
    if field[:11].isdigit() and field[11] in (0, 32):  # as nearly every writer writes it
        return int(field[:11], 8)
    if field[0] == 0x80:
        return min(int.from_bytes(field[1:], "big"), _MAX_OFFSET)
    text = field.split(b"\0", 1)[0].strip() or b"0"
    if not text.isdigit() or b"8" in text or b"9" in text:
        raise ValueError(f"unreadable size {text!r} in a tar header")
    return int(text, 8)


def _parse_decimal(text: str, default: int) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else default


def _parse_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":
        name = _c_string(header[345:500]) + b"/" + name
    return _decode(name)


def _parse_pax(text: bytes) -> dict[str, str]:
    """Parse PAX records, ``<length> <key>=<value>`` lines, up to the first malformed one.

    Raises
    ------
    ValueError
        If the first one is malformed.
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
    """Return the offset of a GNU sparse file's data, after the blocks that continue its map."""
    more = header[482:483] == b"\1"
    while more:
        block = source.read_at(body, BLOCK)
        more = len(block) == BLOCK and block[504:505] == b"\1"
        body += BLOCK
    return body


def _c_string(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def _decode(name: bytes) -> str:
    # Writers use UTF-8; other bytes become \xNN, so that a name can be stored and printed.
    return name.decode("utf-8", "backslashreplace")
