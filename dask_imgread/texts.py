"""Long texts cut short."""

from __future__ import annotations


def shorten(text: str, length: int, mark: str = "…") -> str:
    """Leave out the middle of a text that is too long, not its end, in which paths differ.

    >>> shorten("shards/first/000017.jpg", 15)
    'shard…00017.jpg'
    """
    if len(text) <= length:
        return text
    head = length // 3
    return f"{text[:head]}{mark}{text[head + len(mark) - length :]}"
