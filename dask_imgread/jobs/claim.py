"""The claim that one job's process has on an output folder, so that no other writes there.

``_claim.json`` says whose the folder is. It is renewed while the process lives, and removed at the
end. One that was left by a process that is gone is taken over.

Of several processes that claim a folder at once one gets it: where the file system can create a
file exclusively, whoever was first; elsewhere, whoever wrote last. Should two think that they got
it, still only one can write, since each part is written after a look at the claim's token.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dask_imgread.errors import FolderInUseError, OtherJobError, StorageError
from dask_imgread.shards.frames import JOB
from dask_imgread.storage.files import DRAFT, shows_whole_objects, write_whole
from dask_imgread.storage.redaction import redact_url
from dask_imgread.storage.retries import find_status, is_transient, until_stopped, with_retries

CLAIM = "_claim.json"
BEAT_INTERVAL = 10.0  # seconds between two beats
LIFETIME = 60.0  # seconds after a beat in which a process that can't be seen counts as alive
SETTLING = 1.0  # seconds in which others who write at the same moment have written
_ATTEMPTS = 10
_CONFLICT, _PRECONDITION_FAILED, _NOT_IMPLEMENTED = 409, 412, 501

# The tokens of this process: what else has its pid was left by a claim that could not be removed.
_held: set[str] = set()

logger = logging.getLogger("dask_imgread")


class Folder(Protocol):
    """What is needed of an output folder."""

    @property
    def url(self) -> str:
        """A path or URL."""

    def connect(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """Return the folder's file system, and its path in it."""


@dataclass(frozen=True)
class Claim:
    """Which process has a folder.

    Parameters
    ----------
    token
        Different for each claim.
    host
        The name of the process's host.
    place
        Within which a pid means one process: a boot of the host, and a namespace of pids.
        Containers may share the host's name and yet not see each other's processes.
    pid
        The process.
    started
        When it was started, in the kernel's ticks since the boot. A clock that is set changes
        every process's time of day, but not this.
    began, beat
        When the claim was made, and when it was renewed; seconds since 1970.
    """

    token: str
    host: str
    place: str
    pid: int
    started: int
    began: float
    beat: float

    @classmethod
    def make(cls) -> Claim:
        """Return a new claim of this process."""
        now = time.time()
        pid = os.getpid()
        started = _read_start(pid) or 0
        return cls(uuid.uuid4().hex, socket.gethostname(), _name_place(), pid, started, now, now)

    @classmethod
    def parse(cls, content: bytes) -> Claim | None:
        """Return the claim that a file has, None if the file is damaged."""
        try:
            found = json.loads(content)
            claim = cls(
                *(str(found["token"]), str(found["host"]), str(found["place"])),
                pid=int(found["pid"]),
                started=int(found["started"]),
                began=float(found["began"]),
                beat=float(found["beat"]),
            )
            str(claim)  # raises if no such date exists
            return claim
        except (ValueError, TypeError, KeyError, OverflowError, OSError):
            return None

    def encode(self) -> bytes:
        """Return the content of the file."""
        return json.dumps(asdict(self), indent=1).encode()

    def is_near(self) -> bool:
        """Return whether the process can be seen from here, if it lives."""
        return bool(self.place) and (self.host, self.place) == (socket.gethostname(), _name_place())

    def is_alive(self) -> bool:
        """Return whether the process lives and has not given the folder up."""
        if self.is_near():
            given_up = self.pid == os.getpid() and self.token not in _held
            return _read_start(self.pid) == self.started and not given_up
        return abs(time.time() - self.beat) < LIFETIME

    def __str__(self) -> str:
        """Return whose the claim is, and since when."""
        since = datetime.fromtimestamp(self.began).astimezone().isoformat(" ", "seconds")
        return f"process {self.pid} on host {self.host}, since {since}"


@contextmanager
def claim_folder(folder: Folder) -> Iterator[Claim]:
    """Keep an output folder for this process, for as long as the ``with`` block runs.

    A child that this process forks meanwhile neither renews nor removes the claim.

    Raises
    ------
    FolderInUseError
        If another process has it, or another thread of this one.
    StorageError, PermissionError
        If the claim can't be written.
    """
    file, claim, ended = _File.of(folder, CLAIM), Claim.make(), threading.Event()
    beats = threading.Thread(
        target=_keep_fresh, args=(file, claim, ended), name="claim-beats", daemon=True
    )
    _held.add(claim.token)
    try:
        _take(file, claim)
        beats.start()
        yield claim
    finally:
        if os.getpid() == claim.pid:
            ended.set()
            if beats.is_alive():
                beats.join()
            _release(file, claim)
            _held.discard(claim.token)


def check_claim(folder: Folder, token: str) -> None:
    """Check that the folder still belongs to a job: its workers may outlive it.

    Raises
    ------
    OtherJobError
        If the folder is claimed by another job, or no longer by any.
    FileNotFoundError
        If no job is there at all.
    """
    file = _File.of(folder, CLAIM)
    content = file.read()
    if content is None:  # perhaps for a moment: not everywhere are files replaced in one step
        time.sleep(SETTLING)
        content = file.read()
    if content is None and _File.of(folder, JOB).read() is None:
        raise FileNotFoundError(
            f"{redact_url(folder.url)}/{JOB} is not there: does this worker see the same folder?"
        )
    if _find_token(content) != token:
        raise OtherJobError(
            f"{redact_url(folder.url)} now belongs to another job: give another folder"
        )


@dataclass(frozen=True)
class _File:
    """A file of the folder. It is connected once: each thread has file systems of its own."""

    url: str  # the folder's
    fs: fsspec.AbstractFileSystem
    path: str

    @classmethod
    def of(cls, folder: Folder, name: str) -> _File:
        fs, root = folder.connect()
        return cls(folder.url, fs, f"{root}/{name}")

    def read(self, stopped: threading.Event | None = None) -> bytes | None:
        """Return the file's content, None if it is not there."""
        stopped = stopped or threading.Event()
        try:
            content: bytes = until_stopped(stopped, self.fs.cat_file, self.url, self.path)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ESTALE:  # NFS: it was replaced while it was read
                return None
            raise
        return content

    def put(self, content: bytes, before: bytes | None) -> None:
        """Try to write the file, in the place of what was there before; others may be faster."""
        if isinstance(self.fs, LocalFileSystem):
            if before is not None:
                _set_aside(self.path, before)
            draft = _name_draft(self.path)
            write_whole(self.fs, draft, content)
            _rename(draft, self.path)
        elif before is None and shows_whole_objects(self.fs):
            with_retries(self._create, self.url, content)
        else:
            with_retries(self._overwrite, self.url, content)

    def remove(self, before: bytes) -> None:
        """Remove the file, if nobody has replaced it."""
        if isinstance(self.fs, LocalFileSystem):
            _set_aside(self.path, before)
        else:
            with suppress(FileNotFoundError):
                with_retries(self.fs.rm_file, self.url, self.path)

    def _create(self, content: bytes) -> None:
        try:
            self.fs.pipe_file(self.path, content, mode="create")
        except FileExistsError:
            return
        except Exception as error:
            status = find_status(error)
            if status in (_CONFLICT, _PRECONDITION_FAILED):
                return
            if is_transient(error) and status != _NOT_IMPLEMENTED:
                raise
            self._overwrite(content)  # the store, or its client, may not know how to create

    def _overwrite(self, content: bytes) -> None:
        write_whole(self.fs, self.path, content)
        time.sleep(SETTLING)  # who wrote last has the folder, and everyone reads it back


def _take(file: _File, claim: Claim) -> None:
    """Write the claim, unless another is there whose process is alive."""
    ours, stale = claim.encode(), None
    for _ in range(_ATTEMPTS):
        there = file.read()
        if there == ours:
            if stale is not None:
                whose = Claim.parse(stale) or f"someone whose {CLAIM} is damaged"
                logger.warning("%s is taken over: left by %s", redact_url(file.url), whose)
            return
        if there is not None:
            other = Claim.parse(there)
            if other is not None and other.is_alive():
                raise FolderInUseError(_explain(file.url, other))
            stale = there
        file.put(ours, there)
    raise StorageError(f"{redact_url(file.url)}: {CLAIM} can't be kept there")


def _explain(url: str, other: Claim) -> str:
    text = f"{redact_url(url)} is in use by {other}: wait for it, end it, or give another folder"
    if other.is_near():
        return text
    return f"{text}. If it was killed, the folder is free {LIFETIME:g} s later"


def _release(file: _File, claim: Claim) -> None:
    """Remove the claim if it is still there. What the job has written is good all the same."""
    try:
        content = file.read()
        if content is not None and _find_token(content) == claim.token:
            file.remove(content)
    except Exception as error:
        logger.warning("%s: %s could not be removed: %s", redact_url(file.url), CLAIM, error)


def _keep_fresh(file: _File, claim: Claim, ended: threading.Event) -> None:
    while not ended.wait(BEAT_INTERVAL):
        try:
            if _find_token(file.read(ended)) != claim.token:
                logger.warning("%s no longer belongs to this job", redact_url(file.url))
                continue
            content = replace(claim, beat=time.time()).encode()
            until_stopped(ended, write_whole, file.url, file.fs, file.path, content)
        except Exception as error:
            if not ended.is_set():
                logger.warning("%s: %s is not renewed: %s", redact_url(file.url), CLAIM, error)


def _find_token(content: bytes | None) -> str | None:
    claim = None if content is None else Claim.parse(content)
    return None if claim is None else claim.token


def _name_draft(path: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"{folder}/{DRAFT}{name}-{uuid.uuid4().hex}"


def _set_aside(path: str, before: bytes) -> None:
    """Remove a file if this is its content: of several who try, one gets it."""
    aside = _name_draft(path)
    with suppress(FileNotFoundError):
        os.rename(path, aside)
        if Path(aside).read_bytes() == before:
            os.unlink(aside)
        else:
            _rename(aside, path)  # it was replaced meanwhile


def _rename(source: str, target: str) -> None:
    """Rename a file; if there is one of that name, that one stays."""
    with suppress(FileNotFoundError):
        try:
            os.link(source, target)
        except FileExistsError:
            pass
        except OSError:  # there are no hard links here
            if not os.path.exists(target):
                os.rename(source, target)
        os.unlink(source)


def _name_place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _read_start(pid: int) -> int | None:
    """Return when a process was started, in ticks since the boot; None if it does not run."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    state, *fields = stat.rpartition(b")")[2].split()
    return None if state in b"ZX" else int(fields[18])
