"""The claim on an output folder: one process has it, and leaves it when it ends or is killed."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from dask_imgread.errors import FolderInUseError, OtherJobError, StorageError
from dask_imgread.jobs import claim as claims
from dask_imgread.jobs.claim import CLAIM, Claim, check_claim, claim_folder
from dask_imgread.jobs.folder import JobFolder
from dask_imgread.shards.frames import JOB
from dask_imgread.storage.files import write_whole
from tests.helpers.servers import SECRET, Faults, ProxyHandler, serve_s3
from tests.helpers.waiting import wait_for

# For each line, "URL moment": claims the folder at that moment, and keeps it for one line more.
PROCESS = """
import sys, time
from dask_imgread.errors import FolderInUseError
from dask_imgread.jobs.claim import claim_folder
from dask_imgread.jobs.folder import JobFolder

print("ready", flush=True)
for line in sys.stdin:
    url, moment = line.split()
    time.sleep(max(0.0, float(moment) - time.time() - 0.002))
    while time.time() < float(moment):
        pass
    try:
        with claim_folder(JobFolder(url)) as claim:
            print(claim.token, flush=True)
            sys.stdin.readline()
    except FolderInUseError:
        print("refused", flush=True)
        sys.stdin.readline()
    print("ended", flush=True)
"""
FORK = """
import os, sys, warnings
from dask_imgread.errors import FolderInUseError
from dask_imgread.jobs.claim import check_claim, claim_folder
from dask_imgread.jobs.folder import JobFolder

warnings.simplefilter("ignore")  # of forks of a process with threads
folder = JobFolder(sys.argv[1])
with claim_folder(folder) as claim:
    child = os.fork()
    if not child:
        try:
            with claim_folder(folder):
                print("claimed")
        except FolderInUseError:
            print("refused", flush=True)
        raise SystemExit  # leaves the block of its parent, too
    assert os.waitpid(child, 0)[1] == 0
    check_claim(folder, claim.token)
"""


@pytest.fixture
def folder(tmp_path):
    return JobFolder(str(tmp_path / "out"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / CLAIM


@pytest.fixture(autouse=True)
def quick(monkeypatch, short_pauses):
    monkeypatch.setattr(claims, "BEAT_INTERVAL", 0.02)
    monkeypatch.setattr(claims, "SETTLING", 0.2)


@pytest.fixture(scope="module")
def s3():
    with serve_s3() as server:
        server.make_bucket("bucket")
        yield server


@pytest.fixture
def in_store(s3, request):
    s3.requests.clear()
    yield JobFolder(f"s3://bucket/{request.node.name}", s3.storage_options)
    s3.faults = None


@contextmanager
def start_process():
    command = [sys.executable, "-c", PROCESS]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert read_line(process) == "ready"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def processes():
    with start_process() as one, start_process() as other:
        yield one, other


def send_line(process, text=""):
    process.stdin.write(f"{text}\n")
    process.stdin.flush()


def read_line(process):
    return process.stdout.readline().strip()


def leave(folder, **changes):
    """Write a claim that nobody holds; return it."""
    left = replace(Claim.make(), **changes)
    put(folder, left.encode())
    return left


def put(folder, content, name=CLAIM):
    fs, root = folder.connect()
    write_whole(fs, f"{root}/{name}", content)


def list_names(folder):
    fs, root = folder.connect()
    fs.invalidate_cache()
    return {name.rpartition("/")[2] for name in fs.find(root)}


def count_beats():
    return sum(thread.name == "claim-beats" for thread in threading.enumerate())


def check_taken(folder):
    with claim_folder(folder) as claim:
        check_claim(folder, claim.token)
        assert list_names(folder) == {CLAIM}
    assert list_names(folder) == set()


def check_refused(folder, words="is in use by process"):
    before = folder.connect()[0].cat_file(f"{folder.connect()[1]}/{CLAIM}")
    with pytest.raises(FolderInUseError, match=words), claim_folder(folder):
        pass
    there = folder.connect()[0].cat_file(f"{folder.connect()[1]}/{CLAIM}")
    assert Claim.parse(there).token == Claim.parse(before).token
    assert list_names(folder) == {CLAIM}


# One process


def test_it_is_there_renewed_and_removed(folder, path):
    with claim_folder(folder) as claim:
        first = json.loads(path.read_text())
        assert first["token"] == claim.token
        assert (first["pid"], first["beat"]) == (os.getpid(), first["began"])
        wait_for(lambda: json.loads(path.read_text())["beat"] > first["beat"])
        later = json.loads(path.read_text())
        assert {**later, "beat": first["beat"]} == first
        assert count_beats() == 1
    assert count_beats() == 0
    assert list_names(folder) == set()


def test_an_exception_ends_it(folder):
    with pytest.raises(ZeroDivisionError), claim_folder(folder):
        raise ZeroDivisionError
    assert count_beats() == 0
    check_taken(folder)


def test_without_a_thread_there_is_no_claim(folder, monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(RuntimeError, match="new thread"), claim_folder(folder):
        pass
    assert list_names(folder) == set()


def test_two_threads_can_not_both_have_it(folder):
    with claim_folder(folder):
        check_refused(folder, rf"out is in use by process {os.getpid()} on host .*, since \d{{4}}-")
        results = []

        def claim_again():
            try:
                check_taken(folder)
            except FolderInUseError as error:
                results.append(error)

        thread = threading.Thread(target=claim_again)
        thread.start()
        thread.join()
        assert len(results) == 1
    check_taken(folder)


def test_one_that_could_not_be_removed_does_not_lock_its_own_process_out(
    folder, monkeypatch, caplog
):
    def fail(file, before):
        raise PermissionError("no")

    with monkeypatch.context() as patch, claim_folder(folder):
        patch.setattr(claims._File, "remove", fail)
    assert "_claim.json could not be removed: no" in caplog.text
    check_taken(folder)


def test_a_fork_neither_renews_nor_removes_it(folder):
    done = subprocess.run([sys.executable, "-c", FORK, folder.url], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr
    assert list_names(folder) == set()


def test_beats_that_fail_are_logged(folder, monkeypatch, caplog):
    def fail(*arguments):
        raise OSError("the disk is full")

    with claim_folder(folder) as claim:
        with monkeypatch.context() as patch:
            patch.setattr(claims, "write_whole", fail)
            wait_for(lambda: "_claim.json is not renewed: the disk is full" in caplog.text)
        before = claims._File.of(folder, CLAIM).read()
        wait_for(lambda: claims._File.of(folder, CLAIM).read() != before)
        check_claim(folder, claim.token)


def test_what_another_has_taken_is_not_written(folder, caplog):
    """Such as by a process that was stopped for longer than its claim lasts."""
    with claim_folder(folder) as mine:
        other = leave(folder)
        wait_for(lambda: "no longer belongs to this job" in caplog.text)
        check_claim(folder, other.token)
        with pytest.raises(OtherJobError):
            check_claim(folder, mine.token)
    check_claim(folder, other.token)


def test_what_was_removed_is_not_written_again(folder, path, caplog):
    with claim_folder(folder):
        path.unlink()
        wait_for(lambda: "no longer belongs to this job" in caplog.text)
    assert list_names(folder) == set()


# Another process


def test_a_process_that_lives_is_not_disturbed_and_one_that_was_killed_is_followed(folder, caplog):
    with start_process() as process:
        send_line(process, f"{folder.url} 0")
        token = read_line(process)
        check_claim(folder, token)
        check_refused(folder, rf"process {process.pid} on host .* or give another folder$")
        process.send_signal(signal.SIGKILL)
        wait_for(lambda: Path(f"/proc/{process.pid}/stat").read_text().split(") ")[1][0] == "Z")
        # Nobody has asked for its exit status, so that its pid is still there.
        check_taken(folder)
        assert f"out is taken over: left by process {process.pid} on host" in caplog.text
        with pytest.raises(FileNotFoundError):
            check_claim(folder, token)


@pytest.mark.parametrize("left", [None, b"", {"pid": 2**22 + 1}])
def test_of_two_at_once_one_gets_it(folder, processes, left):
    for _ in range(20):
        if isinstance(left, dict):
            leave(folder, **left)
        elif left is not None:
            put(folder, left)
        moment = time.time() + 0.01
        for process in processes:
            send_line(process, f"{folder.url} {moment}")
        answers = [read_line(process) for process in processes]
        assert answers.count("refused") == 1
        (token,) = set(answers) - {"refused"}
        check_claim(folder, token)
        assert list_names(folder) == {CLAIM}
        for process in processes:
            send_line(process)
            assert read_line(process) == "ended"
        assert list_names(folder) == set()


def test_a_pid_that_another_process_has_now(folder):
    leave(folder, pid=os.getppid(), started=claims._read_start(os.getppid()))
    check_refused(folder, f"process {os.getppid()} ")
    leave(folder, pid=os.getppid(), started=claims._read_start(os.getppid()) - 1)
    check_taken(folder)


def test_a_living_process_needs_no_beats(folder):
    """Such as one that was stopped by Ctrl-Z."""
    process = {"pid": os.getppid(), "started": claims._read_start(os.getppid())}
    leave(folder, **process, beat=time.time() - 1000)
    check_refused(folder)


# Another host, or a container whose processes can't be seen


@pytest.mark.parametrize("elsewhere", [{"host": "node7"}, {"place": "a pid:[7]"}, {"place": ""}])
def test_who_can_not_be_seen_is_known_by_its_beats(folder, elsewhere, caplog):
    for age in (0, claims.LIFETIME - 10, 10 - claims.LIFETIME):
        left = leave(folder, **elsewhere, beat=time.time() - age)
        check_refused(folder, f"process .* on host {left.host}, .* the folder is free 60 s later")
    for age in (claims.LIFETIME + 1, -claims.LIFETIME - 10):
        caplog.clear()
        leave(folder, **elsewhere, beat=time.time() - age)
        check_taken(folder)
        assert f"taken over: left by process {left.pid} on host {left.host}, since" in caplog.text


def test_without_proc_claims_are_known_by_their_beats(folder, monkeypatch):
    monkeypatch.setattr(claims, "_name_place", lambda: "")
    monkeypatch.setattr(claims, "_read_start", lambda pid: None)
    with claim_folder(folder):
        check_refused(folder, "the folder is free 60 s later")
    check_taken(folder)


# Damaged files


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"\xff", b"7", b"[]", b'"token"', b"null", b"{}", b'{"token": "a"}'),
        *({"pid": None}, {"pid": []}, {"started": "x"}, {"beat": "soon"}, {"began": 1e30}),
        *({"beat": float("nan"), "host": "b"}, {"pid": -1}, {"pid": 2**70}),
    ],
)
def test_a_damaged_one_is_taken_over(folder, content, caplog):
    if isinstance(content, dict):
        content = json.dumps({**json.loads(Claim.make().encode()), **content}).encode()
    put(folder, content)
    check_taken(folder)
    assert "out is taken over: left by" in caplog.text


def test_a_claim_with_more_in_it_is_none_the_less_one(folder):
    left = replace(Claim.make(), host="node7")
    put(folder, json.dumps({**json.loads(left.encode()), "new": 1}).encode())
    check_refused(folder)


# Workers


def test_a_worker_of_another_job_is_stopped(folder):
    with claim_folder(folder) as first:
        check_claim(folder, first.token)
        with pytest.raises(OtherJobError, match=r"out now belongs to another job: give another"):
            check_claim(folder, "other")
        put(folder, b"{}", JOB)
    with pytest.raises(OtherJobError, match=r"out now belongs to another job: give another"):
        check_claim(folder, first.token)
    put(folder, b"damaged")
    with pytest.raises(OtherJobError, match="another job"):
        check_claim(folder, first.token)


def test_a_worker_that_sees_another_folder_says_so(folder):
    told = r"out/_job.json is not there: does this worker see the same folder\?"
    with pytest.raises(FileNotFoundError, match=told):
        check_claim(folder, "any")
    nowhere = JobFolder("memory://claims-of-nobody?token=1f0c")
    with pytest.raises(FileNotFoundError, match=r"^memory://claims-of-nobody\?token=\*\*\*/_job"):
        check_claim(nowhere, "any")


def replace_sleep(monkeypatch, sleep):
    """In this module alone: other threads of the process sleep, too."""
    monkeypatch.setattr(claims, "time", SimpleNamespace(time=time.time, sleep=sleep))


def test_a_worker_always_sees_a_claim_that_is_renewed(folder, monkeypatch):
    monkeypatch.setattr(claims, "BEAT_INTERVAL", 0.0)
    replace_sleep(monkeypatch, lambda seconds: pytest.fail("it was not there"))
    with claim_folder(folder) as claim:
        for _ in range(500):
            check_claim(folder, claim.token)


def test_a_claim_out_of_sight_for_a_moment(folder, path, monkeypatch):
    with claim_folder(folder) as claim:
        path.rename(path.with_name("elsewhere"))
        replace_sleep(monkeypatch, lambda seconds: path.with_name("elsewhere").rename(path))
        check_claim(folder, claim.token)


def test_a_claim_that_is_replaced_on_a_network_disk_while_it_is_read(folder, monkeypatch):
    read, failures = LocalFileSystem.cat_file, [OSError(errno.ESTALE, "Stale file handle")]

    def fail_once(*arguments, **options):
        if failures:
            raise failures.pop()
        return read(*arguments, **options)

    monkeypatch.setattr(claims, "BEAT_INTERVAL", 60.0)
    with claim_folder(folder) as claim:
        monkeypatch.setattr(LocalFileSystem, "cat_file", fail_once)
        check_claim(folder, claim.token)
    assert not failures


# Other file systems


def test_a_claim_that_was_replaced_since_it_was_read_stays(folder, path):
    left = leave(folder)
    claims._File.of(folder, CLAIM).remove(b"what was read before")
    assert Claim.parse(path.read_bytes()) == left
    assert list_names(folder) == {CLAIM}


def test_a_disk_without_hard_links(folder, monkeypatch):
    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    check_taken(folder)
    leave(folder)
    check_taken(folder)
    with claim_folder(folder):
        check_refused(folder)
        claims._set_aside(f"{folder.url}/{CLAIM}", b"what was read before")
        check_refused(folder)


class OtherFolder:
    """A folder in a file system of which nothing is known."""

    def __init__(self, path):
        self.url = f"other:/{path}"
        self._fs = DirFileSystem(str(path), fsspec.filesystem("file"))

    def connect(self):
        return self._fs, "out"


def test_a_file_system_of_which_nothing_is_known(tmp_path, monkeypatch):
    folder = OtherFolder(tmp_path)
    check_taken(folder)
    leave(folder)
    check_taken(folder)
    with claim_folder(folder):
        check_refused(folder)
    monkeypatch.setattr(claims, "BEAT_INTERVAL", 60.0)
    assert claim_at_once([folder] * 4).count(True) == 1


def claim_at_once(folders):
    """Claim folders in threads; return for each that got it whether it could write.

    Where a file can't be created exclusively, one that is slow may get it after another has.
    """
    barrier = threading.Barrier(len(folders))
    could = []

    def claim(folder):
        barrier.wait()
        with ExitStack() as stack:
            token = None
            with suppress(FolderInUseError):
                token = stack.enter_context(claim_folder(folder)).token
            barrier.wait()
            if token is not None:
                could.append(can_write(folder, token))
            barrier.wait()

    threads = [threading.Thread(target=claim, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return could


def can_write(folder, token):
    try:
        check_claim(folder, token)
    except OtherJobError:
        return False
    return True


# Stores


def test_in_a_store(in_store, s3, caplog):
    with claim_folder(in_store) as claim:
        check_claim(in_store, claim.token)
        puts = [request for request in s3.requests if request.method == "PUT"]
        assert [request.status for request in puts] == [200]
        check_refused(in_store, f"s3://bucket/.* is in use by process {os.getpid()} ")
        wait_for(lambda: sum(request.method == "PUT" for request in s3.requests) > 2)
        check_claim(in_store, claim.token)
    assert list_names(in_store) == set()
    assert not count_beats()
    leave(in_store, host="node7", beat=0.0)
    check_taken(in_store)
    assert "is taken over: left by process" in caplog.text
    assert SECRET not in caplog.text
    put(in_store, b"damaged")
    check_taken(in_store)


def test_a_store_keeps_the_claim_that_came_first(in_store, s3):
    """Also from one who has seen none there a moment ago."""
    with claim_folder(in_store) as claim:
        claims._File.of(in_store, CLAIM).put(Claim.make().encode(), before=None)
        assert 412 in [request.status for request in s3.requests if request.method == "PUT"]
        check_claim(in_store, claim.token)


@pytest.mark.parametrize("url", ["s3://bucket/at-once", "memory://at-once"])
def test_of_several_at_once_one_gets_it_in_a_store(s3, url, monkeypatch):
    monkeypatch.setattr(claims, "BEAT_INTERVAL", 60.0)
    folder = JobFolder(url, s3.storage_options if url.startswith("s3") else {})
    for _ in range(5):
        assert claim_at_once([folder] * 4).count(True) == 1


def test_one_of_several_takes_it_over_in_a_store(in_store, monkeypatch):
    leave(in_store, host="node7", beat=0.0)
    monkeypatch.setattr(claims, "BEAT_INTERVAL", 60.0)
    assert claim_at_once([in_store] * 4).count(True) == 1


@pytest.mark.parametrize("status", ["501", "400", "409"])
def test_a_store_that_refuses_conditions(in_store, s3, status):
    s3.faults = Faults(first=1, kinds=(status,), match="PUT")
    check_taken(in_store)
    assert s3.faults.injected == {status: 1}


def test_a_store_that_ignores_conditions(in_store, monkeypatch):
    monkeypatch.setattr(ProxyHandler, "hop_by_hop", ProxyHandler.hop_by_hop | {"if-none-match"})
    check_taken(in_store)
    with claim_folder(in_store) as claim:
        check_refused(in_store)
        check_claim(in_store, claim.token)
    monkeypatch.setattr(claims, "BEAT_INTERVAL", 60.0)
    assert claim_at_once([in_store] * 4).count(True) == 1


@pytest.mark.parametrize("kind", ["cut", "503"])
def test_a_request_to_a_store_that_is_repeated(in_store, s3, kind):
    """After `cut` the claim is there, but this process has not been told so."""
    s3.faults = Faults(first=1, kinds=(kind,), match="PUT")
    check_taken(in_store)
    assert s3.faults.injected == {kind: 1}


def test_a_store_that_denies_access(in_store, s3):
    s3.faults = Faults(every=1, kinds=("403",), match="PUT")
    with pytest.raises(PermissionError, match="403"), claim_folder(in_store):
        pass


def test_a_store_that_keeps_nothing(in_store, monkeypatch):
    monkeypatch.setattr(claims._File, "put", lambda *arguments: None)
    with pytest.raises(StorageError, match=r"_claim.json can't be kept there"):
        check_taken(in_store)


def test_a_store_in_memory():
    folder = JobFolder("memory://claims")
    check_taken(folder)
