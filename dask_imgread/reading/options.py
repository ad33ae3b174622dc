"""ReaderOptions: the names, types and defaults of a reader's options, and their checks.

The command line is made from them before Dask is imported, so nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from dask_imgread.hints import suggest
from dask_imgread.shards.ahead import READ_AHEAD


@dataclass
class ReaderOptions:
    """The options of an ImageReaderStage, whose docstring says what each of them does."""

    dali_batch_size: int = 100
    verbose: bool = True
    num_threads: int = 8
    num_gpus_per_worker: float = 0.25
    name: str = "image_reader"
    _: KW_ONLY
    device: Literal["auto", "gpu", "cpu"] = "auto"
    decode: bool = True
    sidecars: bool | Collection[str] = True
    checksum: bool = False
    md5: bool = False
    on_error: Literal["record", "skip", "raise"] = "record"
    max_pixels: int | None = 1 << 28
    max_batch_bytes: int = 256 << 20
    resize: int | tuple[int, int] | None = None
    fit: Literal["auto", "shorter", "exact", "crop"] = "auto"
    resample: Literal["bilinear", "bicubic", "lanczos"] = "bilinear"
    output: Literal["host", "device"] = "host"
    decoder: Literal["auto", "dali"] = "auto"
    scaled_decoding: bool = True
    min_side: int | None = None
    isolate: bool = False
    relative_to: str | None = None
    read_ahead: int = READ_AHEAD

    def __post_init__(self) -> None:
        """Check the values."""
        for field in ("dali_batch_size", "num_threads", "max_batch_bytes", "read_ahead"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)!r}")
        if not 0 < self.num_gpus_per_worker <= 1:
            raise ValueError(
                "num_gpus_per_worker must be above 0 and at most 1, "
                f"not {self.num_gpus_per_worker!r}"
            )
        if self.max_pixels is not None and self.max_pixels < 1:
            raise ValueError(f"max_pixels must be at least 1 or None, not {self.max_pixels!r}")
        self._check_sizes()
        if not isinstance(self.sidecars, bool):
            if isinstance(self.sidecars, str) or not isinstance(self.sidecars, Collection):
                raise ValueError(
                    "sidecars must be True, False or a collection of extensions, such as "
                    f"('json', 'txt'), not {self.sidecars!r}"
                )
            # In one form, whatever was given: it is part of Dask's keys.
            self.sidecars = tuple(sorted({clean_extension(name) for name in self.sidecars}))
        for field, hint in get_type_hints(ReaderOptions).items():
            if get_origin(hint) is Literal and getattr(self, field) not in get_args(hint):
                value = getattr(self, field)
                raise ValueError(
                    f"{field} must be one of {get_args(hint)}, not {value!r}"
                    + suggest(str(value), get_args(hint))
                )

    @property
    def digests(self) -> tuple[str, ...]:
        """Which digests of the encoded bytes are computed: ``sha256``, ``md5``."""
        return ("sha256",) * self.checksum + ("md5",) * self.md5

    def _check_sizes(self) -> None:
        sides = self.resize if isinstance(self.resize, tuple) else (self.resize,)
        if self.resize is not None and not (
            all(isinstance(side, int) and side > 0 for side in sides)
            and len(sides) == (2 if isinstance(self.resize, tuple) else 1)
        ):
            raise ValueError(
                f"resize must be a length, (height, width) or None, not {self.resize!r}"
            )
        if self.min_side is not None and self.min_side < 1:
            raise ValueError(f"min_side must be at least 1 or None, not {self.min_side!r}")
        if self.min_side is not None and self.resize is not None:
            raise ValueError("resize and min_side can't be given together: leave one out")
        for field in ("fit", "resample"):
            if self.resize is None and getattr(self, field) != getattr(ReaderOptions, field):
                raise ValueError(f"{field} is for resize: give that, too, such as resize=224")
        if self.fit == "shorter" and isinstance(self.resize, tuple):
            raise ValueError(
                f"fit='shorter' needs the length of one side, not resize={self.resize}: "
                "give an int, or fit='crop' or 'exact'"
            )


def clean_extension(extension: str) -> str:
    """Return an extension as the members' are compared: in lower case, without its first dot.

    >>> clean_extension(".JSON"), clean_extension("left.txt")
    ('json', 'left.txt')
    """
    return extension.lower().removeprefix(".")
