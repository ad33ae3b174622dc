"""Decide how an image is to be turned: the one place, for every format and decoder.

As ``ImageOps.exif_transpose`` of Pillow 13 decides it (``Image.getexif``, and
``ImageFileDirectory_v2.load`` for a directory that is damaged), but without a warning of what is
broken: what becomes of a warning is the user's to set, for the whole process.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Any

_ORIENTATION = 0x0112
_ORDERS = {b"II*\0": "<", b"II\0*": "<", b"MM\0*": ">", b"MM*\0": ">", b"MM\0+": ">"}
# TIFF 6.0, section 2: of each type its code for `struct`; bytes and texts are no numbers.
_TYPES = {1: "c", 2: "c", 3: "H", 4: "L", 5: "LL", 6: "b", 7: "c", 8: "h", 9: "l", 10: "ll"}
_TYPES |= {11: "f", 12: "d", 13: "L", 16: "Q"}
_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


def find_orientation(metadata: Mapping[Any, Any]) -> int:
    """Return the EXIF orientation, from 1 to 8, that an image's metadata asks for.

    Parameters
    ----------
    metadata
        ``"exif"``, ``"Raw profile type exif"`` and ``"xmp"``, as in Pillow's ``Image.info``.
    """
    exif = metadata.get("exif")
    try:
        if exif is None and "Raw profile type exif" in metadata:
            profile = metadata["Raw profile type exif"]
            if isinstance(profile, bytes):
                profile = profile.decode("latin-1")
            exif = bytes.fromhex("".join(profile.split("\n")[3:]))
        orientation = _read_exif(re.sub(b"^(Exif\0\0){1,2}", b"", exif)) if exif else None
    except (ValueError, struct.error):  # broken metadata does not break the picture
        return 1
    xmp = metadata.get("xmp")
    if orientation is None and isinstance(xmp, bytes) and (found := _XMP.search(xmp)):
        orientation = int(found[1])
    return int(orientation or 1) if orientation in range(2, 9) else 1


def _read_exif(exif: bytes) -> float | None:
    """Return the orientation in EXIF's first directory: 0 if it is no number, None without one.

    Raises
    ------
    ValueError
        If this is no EXIF.
    """
    if not exif:
        return None
    if exif[:4] not in _ORDERS:
        raise ValueError("no TIFF header")
    order = _ORDERS[exif[:4]]
    (place,) = struct.unpack_from(order + "L", exif, 4)
    if place + 2 > len(exif):
        return None
    (count,) = struct.unpack_from(order + "H", exif, place)
    seen, total = set(), 0
    for start in range(place + 2, min(place + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind, number, value = struct.unpack_from(order + "HHLL", exif, start)
        if tag in seen or kind not in _TYPES:
            continue
        layout = order + _TYPES[kind]
        size = number * struct.calcsize(layout)
        at = start + 8
        if size > 4:
            total += size
            if total > len(exif):
                continue
            at = value
        if at + size > len(exif):
            return None
        if not size:
            continue
        seen.add(tag)
        if tag == _ORIENTATION:
            return _to_number(struct.unpack_from(layout, exif, at))
    return None


def _to_number(values: tuple[Any, ...]) -> float:
    if isinstance(values[0], bytes):
        return 0
    if len(values) == 2:  # a fraction
        return float(values[0] / values[1]) if values[1] else 0
    return float(values[0])
