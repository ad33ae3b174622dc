"""Retry requests to object stores and web servers that fail for the moment."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from typing import ParamSpec, TypeVar

from dask_imgread.errors import StorageError
from dask_imgread.storage.redaction import hide_secrets, redact_url

P = ParamSpec("P")
Result = TypeVar("Result")

logger = logging.getLogger("dask_imgread")

ATTEMPTS = 7  # with half a minute of pauses in all
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0  # seconds
GIVEN_UP = threading.Event()  # set when the process is to end: then no thread tries again
PATIENCE = 60.0  # seconds after which no further attempt is made

_REQUEST_TIMEOUT, _TOO_EARLY, _TOO_MANY = 408, 425, 429
_PERMANENT = {401: PermissionError, 403: PermissionError, 404: FileNotFoundError}
# What aiohttp, botocore, http.client and httpx raise when a connection fails; by name, since not
# all of them need be installed.
_CONNECTION_ERRORS = {
    "ClientConnectionError",
    "ClientPayloadError",
    "HTTPClientError",
    "IncompleteRead",
    "TransportError",
}
_CERTIFICATE_ERRORS = {"ClientSSLError", "ClientConnectorCertificateError", "SSLError"}


def with_retries(
    call: Callable[P, Result], url: str, /, *args: P.args, **kwargs: P.kwargs
) -> Result:
    """Call ``call(*args, **kwargs)``; retry transient errors, with exponential backoff.

    Parameters
    ----------
    call
        A request to a store, such as a method of an fsspec file system.
    url
        What is requested, for messages.

    Raises
    ------
    StorageError
        If a time-out, a broken connection or a status such as 503 persists for about a minute,
        or for any other error that the store's library raises.
    FileNotFoundError, PermissionError
        At once, if the status is 404, or 401 or 403.
    ValueError
        If the store does not take the storage options.
    """
    return until_stopped(threading.Event(), call, url, *args, **kwargs)


def until_stopped(
    stopped: threading.Event,
    call: Callable[P, Result],
    url: str,
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> Result:
    """Do the same as ``with_retries``, but stop retrying when ``stopped`` is set."""
    start = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        final: Exception | None = None
        try:
            return call(*args, **kwargs)
        except CancelledError:
            raise StorageError(f"{redact_url(url)}: stopped") from None
        except Exception as error:
            if not is_transient(error):
                final = _explain(error, url)
            reason = f"{redact_url(url)}: {_describe(error)}"
        if final is not None:  # raised here, without its cause: that may hold secrets, and may
            raise final  # be no error that a worker can send
        seconds = time.monotonic() - start
        if attempt == ATTEMPTS or seconds > PATIENCE:
            break
        pause = min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE) * random.uniform(0.7, 1.3)
        logger.info("%s; trying again in %.1f s", reason, pause)
        if _pause(pause, stopped):
            raise StorageError(f"{reason}; stopped")
    raise StorageError(f"{reason} (tried {attempt} times in {seconds:.0f} s)")


def _pause(seconds: float, stopped: threading.Event) -> bool:
    """Wait; return whether the wait was cut short, since no further attempt is wanted."""
    end = time.monotonic() + seconds
    while not (GIVEN_UP.is_set() or stopped.is_set()):
        left = end - time.monotonic()
        if left <= 0:
            return False
        stopped.wait(min(left, 0.1))
    return True


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed if tried again."""
    status = find_status(error)
    if status is not None:
        return status >= 500 or status in (_REQUEST_TIMEOUT, _TOO_EARLY, _TOO_MANY)
    kinds = {kind.__name__ for cause in _list_causes(error) for kind in type(cause).__mro__}
    if kinds & _CERTIFICATE_ERRORS:
        return False
    return bool(kinds & (_CONNECTION_ERRORS | {"ConnectionError", "TimeoutError", "EOFError"}))


def _list_causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def find_status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error of aiohttp, botocore, httpx, gcsfs or adlfs."""
    for cause in _list_causes(error):
        if str(cause).startswith("Forbidden: "):  # as gcsfs says it, in an OSError
            return 403
        response = getattr(cause, "response", None)
        if isinstance(response, Mapping):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            names = ["status", "status_code"]
            if type(cause).__module__.startswith("gcsfs"):  # elsewhere `code` is no HTTP status
                names.append("code")
            sources = (cause, response)
            found = (getattr(source, name, None) for source in sources for name in names)
            status = next((value for value in found if value is not None), None)
        if isinstance(status, int) and 300 <= status < 600:
            return status
    return None


def _explain(error: Exception, url: str) -> Exception:
    """Return the exception to raise for a permanent error, with the URL and without secrets."""
    status = find_status(error)
    if isinstance(error, TypeError):  # some stores check their options only on the first request
        return ValueError(f"{redact_url(url)}: storage options that don't fit: {error}")
    if status is None and type(error).__module__ == "builtins":
        shown = hide_secrets(str(error))
        return error if shown == str(error) else type(error)(shown)
    kind = _PERMANENT.get(status or 0, StorageError)
    return kind(f"{redact_url(url)}: {_describe(error)}")


def _describe(error: BaseException) -> str:
    causes = list(_list_causes(error))[::-1]
    root, status = causes[0], find_status(error)
    texts = [hide_secrets(str(cause)) for cause in causes]
    # The Hugging Face Hub's client says in several lines what it says in one at the end.
    text = next((text for text in texts if "\n" not in text), texts[0].partition("\n")[0])
    if status is not None:
        reason = getattr(root, "message", None) or text  # aiohttp's own text repeats the URL
        # Azure's client goes on with the whole answer, which may tell a signature.
        text = reason.partition("\n")[0]
        return f"HTTP {status}: {text}"
    return f"{type(root).__name__}: {text}" if text else type(root).__name__
