"""Command lines in processes that are forked from one which has imported all that they need.

A new interpreter spends seconds on importing Dask, pandas and DALI, and so does each worker.
"""

import contextlib
import multiprocessing
import os
import sys
import tempfile
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import MappingProxyType

import dask
import psutil
from distributed.config import initialize_logging

ROOT = Path(__file__).parents[2]
IMPORTED = [
    *("tests.helpers.commands", "dask_imgread.decoding.dali", "dask_imgread.report.page"),
    *("dask_imgread.cli.demo", "dask_imgread.cli.select", "dask_imgread.cli.duplicates"),
    *("distributed.nanny", "distributed.dashboard.scheduler"),
    *("nvidia.dali.fn", "simplejpeg", "skimage", "sklearn.datasets"),
]


def start_server():
    """Start the process to fork from, unless it runs; return its multiprocessing context."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with contextlib.chdir(ROOT):  # from where it imports the helpers
        forkserver.ensure_running()
    return context


class ForkedProcess(ForkServerProcess):
    """A forked process that inherits from the one that starts it, as a spawned one does."""

    descriptors = (1, 2)  # of its parent's, to which it prints
    variables = MappingProxyType({})  # that it has besides those of its parent

    def start(self):
        self._environment = os.environ | self.variables
        self._streams = [f"/proc/{os.getpid()}/fd/{number}" for number in self.descriptors]
        # With this Python 3.14 asks for forks; others have none.
        self._key = getattr(forkserver._forkserver, "_forkserver_authkey", None)
        super().start()

    def run(self):
        for number, stream in enumerate(self._streams, 1):
            os.dup2(os.open(stream, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY), number)
        forkserver._forkserver._forkserver_authkey = self._key
        set_environment(self._environment)
        super().run()


def set_environment(variables):
    """Have these variables, and what Dask reads from them when it is imported."""
    os.environ.clear()
    os.environ.update(variables)
    dask.config.refresh()
    initialize_logging(dask.config.config)


def fork_workers():
    """Have the workers of this process, which is forked, forked from where it was itself."""
    multiprocessing.get_context("forkserver").Process = ForkedProcess
    forkserver._forkserver.ensure_running = lambda: None  # else it starts one of its own
    dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})


def run_main(words):
    """Run a command; its workers are forked from the same process as it is itself."""
    fork_workers()
    from dask_imgread.cli.main import main

    sys.exit(main(words))


class Command:
    """A command line that runs, much as a ``Popen`` of it; ``wait`` for its end in any case.

    What it prints goes to files, or to a terminal, given as a descriptor. ``variables`` are added
    to its environment.
    """

    def __init__(self, *arguments, terminal=None, **variables):
        start_server()
        self._files = []
        if terminal is None:
            self._files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        words = [str(argument) for argument in arguments]
        self._process = ForkedProcess(target=run_main, args=(words,))
        self._process.descriptors = [file.fileno() for file in self._files] or [terminal] * 2
        self._process.variables = variables
        self._process.start()
        self.kill = self._process.kill

    @property
    def returncode(self):
        return self._process.exitcode

    def send_signal(self, number):
        os.kill(self._process.pid, number)

    def wait(self, timeout=100):
        """Wait for its end; return the exit status, and what it has printed."""
        self._process.join(timeout)
        ended = self.returncode is not None
        self.kill()
        self._process.join()
        printed = []
        for file in self._files:
            with file:
                file.seek(0)
                printed.append(file.read())
        assert ended, printed
        return self.returncode, *printed

    def list_workers(self):
        """Return its worker processes."""
        command = psutil.Process(self._process.pid)
        workers = []
        for process in command.parent().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.create_time() > command.create_time():
                    workers.append(process)
        return workers


def run_command(*arguments, **variables):
    """Run a command to its end; return its exit status, and what it has printed."""
    return Command(*arguments, **variables).wait()
