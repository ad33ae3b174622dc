"""Decode images in a child process, so that one that crashes its decoder is survived."""

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

_EXIT_TIMEOUT = 2.0  # seconds, before the child is killed


class DecoderProcess:
    """A child process that decodes images one by one, and is replaced when it dies.

    A context manager, which ends the child. The child is started on first use, as a separate
    program: Dask's workers must not fork, and can't start children with ``multiprocessing``.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def begin(self, images: Sequence[Encoded], decoder_options: DecoderOptions) -> IsolatedDecoding:
        """Return a batch to be decoded; the work is done by its ``result()``."""
        return IsolatedDecoding(self, images, decoder_options)

    def decode(self, image: Encoded, decoder_options: DecoderOptions) -> Decoded:
        """Decode one image, in a batch of its own.

        Raises
        ------
        RuntimeError
            If the child can't be started.
        Exception
            What decoding in this process would raise, too: errors that are not the image's.
        """
        pipe = self._pipe or self._start()
        try:
            pipe.send((image._replace(content=bytes(image.content)), decoder_options))
            answer: Decoded | Exception = pipe.recv()
        except (EOFError, OSError):
            status = _format_status(self._stop())
            reason = f"kills its decoder: the process that decoded it ended with {status}"
            return Decoded(None, error=reason)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _start(self) -> Connection:
        self._pipe, child_end = Pipe()
        with child_end:
            descriptor = child_end.fileno()
            try:
                self._child = subprocess.Popen(
                    [sys.executable, "-P", "-m", __name__, str(descriptor)],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[descriptor],
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                    start_new_session=True,  # no Ctrl-C: the child ends with its parent
                )
            except OSError as error:
                self._stop()
                raise RuntimeError(f"no child process to decode in: {error}") from error
        try:
            self._pipe.recv()  # ready: from now on an image is to blame for a crash
        except (EOFError, OSError):
            status = _format_status(self._stop())
            raise RuntimeError(f"a child process to decode in ended with {status}") from None
        return self._pipe

    def _stop(self) -> int:
        """Close the pipe, upon which the child exits; return its exit status."""
        child, pipe = self._child, self._pipe
        self._child = self._pipe = None
        if pipe is not None:
            pipe.close()
        if child is None:
            return 0
        try:
            return child.wait(timeout=_EXIT_TIMEOUT)
        except subprocess.TimeoutExpired:  # still decoding, or a fork of ours has the pipe open
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
        self._stop()


def _format_status(status: int) -> str:
    return f"status {status}" if status >= 0 else signal.Signals(-status).name


class IsolatedDecoding:
    """A batch whose images are decoded one by one in another process."""

    def __init__(
        self, process: DecoderProcess, images: Sequence[Encoded], decoder_options: DecoderOptions
    ) -> None:
        self._process, self._images = process, images
        self._decoder_options = decoder_options._replace(batch_size=1, output="host")

    def result(self) -> list[Decoded]:
        """Decode, and return an entry for each image, in order."""
        return [self._process.decode(image, self._decoder_options) for image in self._images]


def main(descriptor: int) -> None:
    """Decode images from a pipe until it is closed."""
    faulthandler.enable()
    os.dup2(2, 1)  # what decoders print goes to stderr
    with Connection(descriptor) as pipe:
        pipe.send("ready")
        while True:
            try:
                image, decoder_options = pipe.recv()
            except EOFError:
                return
            pipe.send(_decode(image, decoder_options))


def _decode(image: Encoded, decoder_options: DecoderOptions) -> Decoded | Exception:
    try:
        return Decoding([image], decoder_options).result()[0]
    except Exception as error:
        return error


if __name__ == "__main__":
    main(int(sys.argv[1]))
