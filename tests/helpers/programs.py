"""Programs for ``PATH`` that run in forked processes, as those of `commands` do.

They are this environment's own: what stands in ``PATH`` hands its arguments, its folder, its
variables and its streams to a process that forks, passes signals on, and ends as the fork does.
"""

import ast
import contextlib
import os
import runpy
import signal
import socket
import sys
import warnings
from multiprocessing import forkserver, process
from pathlib import Path

import psutil

from tests.helpers.commands import ForkedProcess, fork_workers, set_environment, start_server

BIN = Path(sys.executable).parent
PROGRAM = """#!{python} -IS
import os, signal, socket, sys
signals = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"streams"], [0, 1, 2])
    server.sendall(repr((sys.argv, os.getcwd(), dict(os.environ))).encode())
    server.shutdown(socket.SHUT_WR)
    number = int(server.recv(20))
    for one in signals:
        signal.signal(one, lambda sent, _: os.kill(number, sent))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    status = int(server.recv(20))
sys.exit(status if status >= 0 else 128 - status)
"""


@contextlib.contextmanager
def write_programs(folder, names=("dask", "dask-imgread", "python")):
    """Write programs into a folder, which work until the context is left."""
    start_server()
    with socket.socket(socket.AF_UNIX) as server:
        address = str(folder / "socket")
        server.bind(address)
        server.listen()
        forking = ForkedProcess(target=fork_programs, args=(server,))
        forking.start()
    for name in names:
        path = folder / name
        path.write_text(PROGRAM.format(python=sys.executable, address=address))
        path.chmod(0o755)
    try:
        yield folder
    finally:
        forking.kill()
        forking.join()
        forking.close()


def list_forked():
    """Return the processes of programs, and the workers of these: all from the same process."""
    return {*psutil.Process(forkserver._forkserver._forkserver_pid).children(recursive=True)}


def fork_programs(server):
    """Fork a process for each program that connects; return in the forked one."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that report
    while True:
        connection, _ = server.accept()
        if os.fork() == 0:
            break
        connection.close()
    server.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with connection:
        _, streams, _, _ = socket.recv_fds(connection, 7, 3)
        words, folder, variables = ast.literal_eval(connection.makefile().read())
        if number := os.fork():
            report(connection, number)
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
        os.close(stream)
    sys.stdin = open(0)  # noqa: SIM115  # which multiprocessing has replaced
    os.chdir(folder)
    process.ORIGINAL_DIR = folder  # to which the name of a script is relative
    set_environment(variables)
    warnings._processoptions(list(filter(None, os.environ.get("PYTHONWARNINGS", "").split(","))))
    fork_workers()
    run_program(Path(words[0]).name, words[1:])


def report(connection, number):
    """Say which process was forked, and how it ends."""
    connection.sendall(b"%d" % number)
    _, status = os.waitpid(number, 0)
    connection.sendall(b"%d" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def run_program(name, words):
    """Run one as an interpreter runs it: a module, a script or one of the environment's."""
    if name != "python":
        words = [str(BIN / name), *words]
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, os.path.dirname(words[0])
        runpy.run_path(words[0], run_name="__main__")
