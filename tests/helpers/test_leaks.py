"""What a test leaves behind is found, and what ends in time is not blamed."""

import os
import socket
import subprocess
import sys
import threading

import pytest
from distributed import Client

from tests.helpers import leaks


def test_what_is_left_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(leaks, "ENDING_SECONDS", 0.1)
    before = leaks.list_open()
    leaks.check_leaks(before)
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="left-behind")
    thread.start()
    child = subprocess.Popen(["sleep", "100"])
    with open(tmp_path / "left.txt", "w"), socket.socket() as listening:
        with pytest.raises(pytest.fail.Exception) as failed:
            leaks.check_leaks(before)
        child.kill()
        child.wait()
        end.set()
        thread.join()
    for left in ["left-behind", f"'{child.pid}'", "left.txt", "socket:"]:
        assert left in str(failed.value)
    assert listening.fileno() < 0
    leaks.check_leaks(before)


def test_what_is_ending_is_waited_for():
    before = leaks.list_open()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.2)"]) as child:
        reader, writer = os.pipe()
        timer = threading.Timer(0.2, lambda: (child.wait(), os.close(reader), os.close(writer)))
        timer.start()
        leaks.check_leaks(before)


def test_connections_of_a_cluster_are_its_own(client, monkeypatch):
    monkeypatch.setattr(leaks, "ENDING_SECONDS", 0.1)
    before = leaks.list_open()
    address = client.scheduler.address.removeprefix("tcp://").split(":")
    with socket.create_connection((address[0], int(address[1]))):
        leaks.check_leaks(before)


def test_a_cluster_in_this_process():
    with Client(n_workers=1, processes=False, dashboard_address=":0") as client:
        before = leaks.list_open()
        assert client.submit(abs, -1).result() == 1
        leaks.check_leaks(before)


@pytest.mark.parametrize("used", ["bag", "fsspec"])
def test_what_serves_the_process_stays(used):
    """Even if nothing has used it before."""
    before = leaks.list_open()
    if used == "bag":
        import dask.bag

        assert dask.bag.from_sequence([1, 2]).map(abs).compute(scheduler="threads") == [1, 2]
    else:
        import fsspec.asyn

        assert fsspec.asyn.get_loop().is_running()
    leaks.check_leaks(before)
