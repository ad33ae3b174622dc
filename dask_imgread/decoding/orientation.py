"""Find an image's orientation: the only place that decides on it, for every format and decoder.

The result is that of ``ImageOps.exif_transpose`` in Pillow 13 (``Image.getexif``, and
``ImageFileDirectory_v2.load`` for damaged directories), but without Pillow's warnings: filters for
these are global, and belong to the user.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Any

_ORIENTATION = 0x0112
_BYTE_ORDERS = {b"II*\0": "<", b"II\0*": "<", b"MM\0*": ">", b"MM*\0": ">", b"MM\0+": ">"}
# TIFF 6.0, section 2: the `struct` code of each type; "c" for bytes and text, which are no numbers.
_TYPES = {1: "c", 2: "c", 3: "H", 4: "L", 5: "LL", 6: "b", 7: "c", 8: "h", 9: "l", 10: "ll"}
_TYPES |= {11: "f", 12: "d", 13: "L", 16: "Q"}
_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


def find_orientation(metadata: Mapping[Any, Any]) -> int:
    """Return the orientation, from 1 to 8, in an image's EXIF, or else in its XMP.

    Parameters
    ----------
    metadata
        The keys ``"exif"``, ``"Raw profile type exif"`` and ``"xmp"`` of Pillow's ``Image.info``.
    """
    exif = metadata.get("exif")
    try:
        if exif is None and "Raw profile type exif" in metadata:
            profile = metadata["Raw profile type exif"]
            if isinstance(profile, bytes):
                profile = profile.decode("latin-1")
            exif = bytes.fromhex("".join(profile.split("\n")[3:]))
        orientation = _read_exif(re.sub(b"^(Exif\0\0){1,2}", b"", exif)) if exif else None
    except (ValueError, struct.error):  # broken metadata does not make the image unreadable
        return 1
    xmp = metadata.get("xmp")
    if orientation is None and isinstance(xmp, bytes) and (found := _XMP.search(xmp)):
        orientation = int(found[1])
    return int(orientation or 1) if orientation in range(2, 9) else 1


def _read_exif(exif: bytes) -> float | None:
    """Return the orientation in the first EXIF directory: None if missing, 0 if not a number.

    Raises
    ------
    ValueError
        If this is not EXIF.
    """
    if not exif:
        return None
    if exif[:4] not in _BYTE_ORDERS:
        raise ValueError("no TIFF header")
    order = _BYTE_ORDERS[exif[:4]]
    (directory,) = struct.unpack_from(order + "L", exif, 4)
    if directory + 2 > len(exif):
        return None
    (count,) = struct.unpack_from(order + "H", exif, directory)
    seen, total = set(), 0
    for start in range(directory + 2, min(directory + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind, number, value = struct.unpack_from(order + "HHLL", exif, start)
        if tag in seen or kind not in _TYPES:
            continue
        layout = order + _TYPES[kind]
        size = number * struct.calcsize(layout)
        offset = start + 8
        if size > 4:
            total += size
            if total > len(exif):
                continue
            offset = value
        if offset + size > len(exif):
            return None
        if not size:
            continue
        seen.add(tag)
        if tag == _ORIENTATION:
            return _to_number(struct.unpack_from(layout, exif, offset))
    return None


def _to_number(values: tuple[Any, ...]) -> float:
    if isinstance(values[0], bytes):
        return 0
    if len(values) == 2:  # a fraction
        return float(values[0] / values[1]) if values[1] else 0
    return float(values[0])
