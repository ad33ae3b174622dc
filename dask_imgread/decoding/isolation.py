"""Decode pictures in a child process, which may die of them."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from types import TracebackType

from dask_imgread.decoding.contract import Decoded, DecoderOptions, Encoded
from dask_imgread.decoding.decode import Decoding

_PATIENCE = 2.0  # seconds, for a child to end by itself


class DecoderProcess:
    """A child process that decodes one picture after the other; a new one when it has died.

    A context manager, which ends the child. It is started when it is first needed, as a program
    of its own: Dask's workers may not fork, nor start children with ``multiprocessing``.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def begin(self, images: Sequence[Encoded], options: DecoderOptions) -> IsolatedDecoding:
        """Return the decoding of a batch; nothing is done before its result is asked for."""
        return IsolatedDecoding(self, images, options)

    def decode(self, image: Encoded, options: DecoderOptions) -> Decoded:
        """Decode one picture, in a batch of its own.

        Raises
        ------
        RuntimeError
            If the child can't be started.
        Exception
            What decoding raises for other reasons than the picture, as without a child.
        """
        pipe = self._pipe or self._start()
        try:
            pipe.send((image._replace(content=bytes(image.content)), options))
            answer: Decoded | Exception = pipe.recv()
        except (EOFError, OSError):
            status = _name_status(self._end())
            reason = f"kills its decoder: the process that decoded it ended with {status}"
            return Decoded(None, error=reason)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _start(self) -> Connection:
        self._pipe, theirs = Pipe()
        with theirs:
            descriptor = theirs.fileno()
            try:
                self._child = subprocess.Popen(
                    [sys.executable, "-P", "-m", __name__, str(descriptor)],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[descriptor],
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                    start_new_session=True,  # Ctrl-C is for the parent, with which the child ends
                )
            except OSError as error:
                self._end()
                raise RuntimeError(f"no child process to decode in: {error}") from error
        try:
            self._pipe.recv()  # it is ready: a death from now on is the picture's doing
        except (EOFError, OSError):
            status = _name_status(self._end())
            raise RuntimeError(f"a child process to decode in ended with {status}") from None
        return self._pipe

    def _end(self) -> int:
        """Let the child go, which ends when its pipe is closed; return its exit status."""
        child, pipe = self._child, self._pipe
        self._child = self._pipe = None
        if pipe is not None:
            pipe.close()
        if child is None:
            return 0
        try:
            return child.wait(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:  # it decodes, or a fork of ours holds the pipe too
            child.kill()
            return child.wait()

    def __enter__(self) -> DecoderProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()


def _name_status(status: int) -> str:
    return f"status {status}" if status >= 0 else signal.Signals(-status).name


class IsolatedDecoding:
    """A batch whose pictures are decoded one by one in another process."""

    def __init__(
        self, process: DecoderProcess, images: Sequence[Encoded], options: DecoderOptions
    ) -> None:
        self._process, self._images = process, images
        self._options = options._replace(batch_size=1, output="host")

    def result(self) -> list[Decoded]:
        """Return what became of each image, in order."""
        return [self._process.decode(image, self._options) for image in self._images]


def main(descriptor: int) -> None:
    """Decode what comes through a pipe until it is closed."""
    faulthandler.enable()
    os.dup2(2, 1)  # whatever a decoder prints
    with Connection(descriptor) as pipe:
        pipe.send("ready")
        while True:
            try:
                image, options = pipe.recv()
            except EOFError:
                return
            pipe.send(_decode(image, options))


def _decode(image: Encoded, options: DecoderOptions) -> Decoded | Exception:
    try:
        return Decoding([image], options).result()[0]
    except Exception as error:
        return error


if __name__ == "__main__":
    main(int(sys.argv[1]))
