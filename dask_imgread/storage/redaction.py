"""Remove secrets from URLs and messages before they are shown or stored."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_URL = re.compile(r"(?<![\w+.-])[\w+.-]{1,32}://[^\s'\"<>]+")
_USER_INFO = re.compile(r"(?<=://)[^/?#]*@")
_SECRET_NAME = re.compile(r"secret|passw|token|credential|signature|auth|cookie|key|^pass$", re.I)
# The query parameters of URLs signed for S3, Google and Azure: a new signature changes them all.
_SIGNING_PARAMETER = re.compile(
    r"x-(amz|goog)-.*|AWSAccessKeyId|Signature|Expires|Policy|Key-Pair-Id"
    r"|sig|s[ekprtv]|spr|sip|srt|ss|sk(oid|tid|t|e|s|v)",
    re.I,
)
_SIGNATURE = re.compile(r"[?&](x-(amz|goog)-signature|signature|sig)=", re.I)


def drop_signature(url: str) -> str:
    """Return a URL without user, password and signature: what a new signature leaves unchanged.

    >>> drop_signature("https://me:pw@host/a.tar?v=2&X-Amz-Signature=1f0c&X-Amz-Expires=99")
    'https://host/a.tar?v=2'
    """
    if "://" not in url:
        return url
    head, mark, query = _USER_INFO.sub("", url).partition("?")
    if not _SIGNATURE.search(mark + query):
        return head + mark + query
    kept = [
        part for part in query.split("&") if not _SIGNING_PARAMETER.fullmatch(part.split("=")[0])
    ]
    return head + mark + "&".join(kept) if kept else head


def redact_url(url: str) -> str:
    """Return a URL without user, password and signature, and with other secrets masked.

    >>> redact_url("https://me:pw@host/a.tar?v=2&token=1f0c")
    'https://host/a.tar?v=2&token=***'
    """
    head, mark, query = drop_signature(url).partition("?")
    if "://" not in head:
        return url
    parts = [part.partition("=") for part in query.split("&")]
    shown = [
        f"{name}{equals}{'***' if _SECRET_NAME.search(name) else value}"
        for name, equals, value in parts
    ]
    return head + mark + "&".join(shown)


def hide_secrets(text: str, storage_options: Mapping[str, Any] | None = None) -> str:
    """Return a message with URLs redacted and the secrets among the storage options masked.

    >>> hide_secrets("no https://me:pw@host/a.tar with s3cret", {"secret": "s3cret"})
    'no https://host/a.tar with ***'
    """
    text = _URL.sub(lambda match: redact_url(match.group()), text)
    for secret in _list_secrets(storage_options or {}):
        text = text.replace(secret, "***")
    return text


def _list_secrets(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _list_secrets(value)
        elif len(str(value)) > 3 and _SECRET_NAME.search(str(name)):
            yield str(value)
