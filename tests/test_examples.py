"""The examples, run as far as can be without the systems that they are for.

Slurm's commands are stood in for by scripts that run the same things on this machine.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import uuid
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import yaml

from dask_imgread import read_metadata
from dask_imgread.cli.arguments import make_parser, parse_arguments
from dask_imgread.jobs.claim import claim_folder
from dask_imgread.jobs.folder import JobFolder
from dask_imgread.testing import make_shards
from tests.helpers.programs import list_forked
from tests.helpers.servers import serve_http
from tests.helpers.waiting import wait_for

EXAMPLES = Path(__file__).parents[1] / "examples"
CRONTAB = EXAMPLES / "cron" / "crontab"
SBATCH = EXAMPLES / "slurm" / "job.sbatch"
SCRONTAB = EXAMPLES / "slurm" / "scrontab"

SRUN = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done  # its own options
exec "$@"
"""
SCONTROL = """#!/bin/sh
echo "$@" >> scontrol.log
"""
SBATCH_COMMAND = """#!/bin/sh
cp "$1" "job-$$.sh"
setsid bash "job-$$.sh" > "job-$$.log" 2>&1 &
echo "Submitted batch job $!"
"""
SCANCEL = """#!/bin/sh
echo "$@" >> scancel.log
kill -- "-$1"
"""
ENDLESS = """#!/bin/sh
echo "$$ $(basename "$0") $@" >> started.log
exec sleep 60
"""


@pytest.fixture
def environment(tmp_path, programs):
    """Variables for child processes, none of which may be left in the end."""
    mark = uuid.uuid4().hex
    before = list_forked()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    yield kept | {
        "PATH": f"{tmp_path / 'bin'}:{programs}:{os.environ['PATH']}",
        "DASK_JOBQUEUE__SLURM__PYTHON": str(programs / "python"),
        "MARK": mark,
        "DASK_IMGREAD__DEVICE": "cpu",  # the workers declare GPUs that may not be there
        "SLURM_JOB_ID": "17",
        "SLURM_CPUS_PER_TASK": "2",
    }
    left = list(find_marked(mark))
    _, forked = psutil.wait_procs(list_forked() - before, timeout=5)
    left += forked
    for process in left:
        process.kill()
    assert not left


def find_marked(mark):
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("MARK") == mark:
                yield process


def write_commands(folder, **scripts):
    (folder / "bin").mkdir()
    for name, script in scripts.items():
        path = folder / "bin" / name.replace("_", "-")
        path.write_text(script)
        path.chmod(0o755)


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copy_shards(shards, folder):
    folder.mkdir(exist_ok=True)
    for shard in shards:
        shutil.copy(shard, folder)


def read_times(out):
    """Return when each part of a job's output was written."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}


def check_update(out, before):
    """Check that one part, of 25 images, came to those that were there, which were left alone."""
    assert len(before) == 3
    assert read_times(out).items() >= before.items()
    assert len(read_times(out)) == 4
    assert pd.read_parquet(out)["shard"].value_counts().tolist() == [25] * 4


def read_entry(crontab):
    """Return the fields of the only entry, and its command."""
    lines = crontab.read_text().splitlines()
    (entry,) = (line for line in lines if line and not re.match(r"#|[A-Z]+=", line))
    *fields, command = entry.split(maxsplit=5)
    return fields, command


# All of them


def test_the_table_lists_every_example():
    table = (EXAMPLES / "README.md").read_text()
    linked = {EXAMPLES / link for link in re.findall(r"\]\(([^)]+)\)", table)}
    there = {p for p in EXAMPLES.rglob("*.*") if "__pycache__" not in p.parts and p.is_file()}
    there |= {CRONTAB, SCRONTAB, EXAMPLES / "kubernetes" / "Dockerfile"}
    assert linked == there - {EXAMPLES / "README.md"}


def find_commands():
    """Yield the arguments of each `dask-imgread`, and of the sbatch script that passes them on."""
    texts = [path.read_text() for path in (EXAMPLES / "README.md", SBATCH, SCRONTAB)]
    texts.append((EXAMPLES / "brightness.py").read_text())
    for text in texts:
        for command in re.findall(
            r"(?:dask-imgread|job\.sbatch) ((?:metadata|apply) [^`\n]*)", text
        ):
            yield shlex.split(command)
    job = yaml.safe_load((EXAMPLES / "kubernetes" / "job.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["dask-imgread"]
    yield container["args"]


def test_every_command_is_one():
    commands = list(find_commands())
    assert len(commands) == 6
    for command in commands:
        options = make_parser().parse_args(command)
        assert options.shards
        assert options.out


@pytest.mark.parametrize("crontab", [CRONTAB, SCRONTAB], ids=lambda path: path.name)
def test_the_time_of_a_nightly_job(crontab):
    fields, command = read_entry(crontab)
    for field, (lowest, highest) in zip(
        fields, [(0, 59), (0, 23), (1, 31), (1, 12), (0, 7)], strict=True
    ):
        assert field == "*" or lowest <= int(field) <= highest
    assert "%" not in command  # cron makes a line's end of it
    subprocess.run(["sh", "-n", "-c", command], check=True)


def test_a_function_for_the_command_line(tmp_path, photo_shards, environment, programs):
    command = [programs / "dask-imgread", "apply", "brightness:measure", *photo_shards[:1]]
    subprocess.run(
        [*command, "--out", tmp_path / "out", "--workers", "1"],
        cwd=EXAMPLES,
        env=environment,
        check=True,
        timeout=60,
    )
    rows = pd.read_parquet(tmp_path / "out")
    assert len(rows) == 25
    assert rows["brightness"].between(0, 255).all()


# In Python, each with a `main(path)`


@pytest.fixture
def run(tmp_path, monkeypatch, client):
    """Run an example on twelve drawn pictures, one of them broken, and a copy of three of them."""
    monkeypatch.chdir(tmp_path)
    shards = make_shards("shards", shards=4, images_per_shard=3, broken=1)
    shutil.copy(shards[0], "shards/again.tar")

    def run(name, *arguments):
        example = load(EXAMPLES / f"{name}.py")
        example.connect_client = lambda: contextlib.nullcontext(client)  # one for all tests
        return example.main(*arguments)

    return run


def test_captions(run):
    """All copies go: they have the same words."""
    rows = run("captions", "shards/*.tar", "out")
    assert sorted(rows["caption"]) == sorted(f"landscape number {n}" for n in range(3, 12))
    assert len(read_metadata("out")) == 9


def test_duplicates(run):
    for _ in range(2):  # the second time there is nothing left to do
        rows = run("duplicates", "shards/*.tar", "out")
    assert rows["sha256"].nunique() == len(rows) == len(read_metadata("out")) == 11


def test_embeddings(run):
    rows = run("embeddings", "shards/*.tar", "out")
    vectors = np.stack(rows["embedding"].to_numpy())
    assert vectors.shape == (14, 14)  # no more numbers than images to learn from
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    copies = rows[rows.index.str.contains("again")]
    assert [name.split("/")[-1] for name in copies["nearest"]] == [
        name.split("/")[-1] for name in copies.index
    ]


def test_remote(run, capsys):
    with serve_http("shards") as server:
        of_url = run("remote", f"{server.url}/{{00000..00003}}.tar")
    of_folder = run("remote", "shards")
    assert (len(of_url), len(of_folder)) == (12, 15)
    assert all(of_folder["shard"].str.startswith("http://127.0.0.1:"))
    assert "15 images in 5 shards\n<ImageObject" in capsys.readouterr().out


# Slurm, one allocation


def test_directives():
    """Slurm reads directives up to the first command, and refuses what it does not know."""
    known = {
        "job-name": r"[\w-]+",
        "output": r"%x-%j\.log",
        "open-mode": "append|truncate",
        "nodes": r"\d+",
        "ntasks-per-node": r"\d+",
        "cpus-per-task": r"\d+",
        "gpus-per-node": r"\d+",
        "mem": r"\d+[KMGT]",
        "time": r"(\d+-)?\d\d:\d\d:\d\d",
        "requeue": "",
        "signal": r"B:[A-Z0-9]+@\d+",
    }
    lines = SBATCH.read_text().splitlines()
    first_command = next(n for n, line in enumerate(lines) if line and line[0] != "#")
    directives = [n for n, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert max(directives) < first_command
    given = [re.fullmatch(r"#SBATCH --([\w-]+)=?(.*)", lines[n]).groups() for n in directives]
    assert sorted(name for name, _ in given) == sorted(known)
    for name, value in given:
        assert re.fullmatch(known[name], value), name


def find_options(path, mark):
    lines = re.findall(rf"^#{mark} (.+)$", path.read_text(), re.MULTILINE)
    return dict(re.findall(r"--([\w-]+)=?(\S*)", " ".join(lines)))


def test_a_night_has_the_same_allocation():
    script, night = find_options(SBATCH, "SBATCH"), find_options(SCRONTAB, "SCRON")
    del script["requeue"]  # scrontab does not know it
    script["output"] = f"imgread/{script['output']}"  # relative to the home folder
    assert night == script


def run_sbatch(*arguments, cwd, env):
    """Start the script as Slurm does: in the folder of the submission, its output in a file."""
    subprocess.run(["bash", "-n", SBATCH], check=True)
    with (cwd / "log").open("w") as log:
        return subprocess.Popen(
            ["bash", SBATCH, *arguments], cwd=cwd, env=env, stdout=log, stderr=log
        )


def run_night(folder, environment):
    """Start the entry of scrontab as Slurm does: its command is a script's last line."""
    home = folder / "imgread"
    (home / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
    (home / ".venv" / "bin" / "activate").touch()
    shutil.copy(SBATCH, home)
    script = folder / "night.sh"
    script.write_text(f"#!/bin/sh\n{read_entry(SCRONTAB)[1]}\n")
    with (home / "log").open("w") as log:
        environment = environment | {"HOME": str(folder)}
        return subprocess.Popen(["sh", script], env=environment, stdout=log, stderr=log)


# Dask notes, with a traceback, that a worker which ends was about to be sent something.
LOST_CONNECTION = re.compile(
    r"^.* - INFO - Batched Comm Closed (?s:.*?)(?=^\d{4}-|\Z)", re.MULTILINE
)


def check_night(started, home, count):
    log = home / "log"
    assert started.wait(60) == 0, log.read_text()
    assert count in log.read_text()
    assert "Traceback" not in LOST_CONNECTION.sub("", log.read_text())


def test_an_allocation(tmp_path, photo_shards, environment):
    """The first night is started by hand."""
    write_commands(tmp_path, srun=SRUN, scontrol=SCONTROL)
    home = tmp_path / "imgread"
    home.mkdir()
    copy_shards(photo_shards[:3], home / "shards")
    _, _, arguments = read_entry(SCRONTAB)[1].partition("job.sbatch ")
    started = run_sbatch(*arguments.split(), cwd=home, env=environment)
    check_night(started, home, "75 images, 0 failed")
    assert {path.name for path in home.iterdir()} == {"log", "result", "shards"}

    before = read_times(home / "result")
    copy_shards(photo_shards[3:], home / "shards")
    check_night(run_night(tmp_path, environment), home, "100 images, 0 failed")
    check_update(home / "result", before)


def start_endless(tmp_path, environment):
    """Start the script with a scheduler, workers and a job that do nothing and do not end."""
    write_commands(tmp_path, srun=SRUN, scontrol=SCONTROL, dask=ENDLESS, dask_imgread=ENDLESS)
    started = run_sbatch("metadata", "*.tar", "--out", "out", cwd=tmp_path, env=environment)
    wait_for(lambda: len(read_started(tmp_path)) == 3, 20)
    return started


def read_started(folder):
    """Return the number of each process by the start of its command."""
    log = folder / "started.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return {command: int(number) for number, _, command in (line.partition(" ") for line in lines)}


@pytest.mark.parametrize(("restarts", "requeued"), [("0", True), ("20", False)])
def test_an_allocation_whose_time_is_nearly_up(tmp_path, environment, restarts, requeued):
    started = start_endless(tmp_path, environment | {"SLURM_RESTART_COUNT": restarts})
    started.send_signal(signal.SIGUSR1)
    assert started.wait(20) == 143
    scontrol = tmp_path / "scontrol.log"
    assert scontrol.exists() == requeued
    assert not requeued or scontrol.read_text() == "requeue 17\n"
    assert not list(tmp_path.glob("imgread-*"))


def test_a_night_whose_time_is_nearly_up(tmp_path, environment):
    """The signal, which is for the shell alone, reaches the script."""
    write_commands(tmp_path, srun=SRUN, scontrol=SCONTROL, dask=ENDLESS, dask_imgread=ENDLESS)
    started = run_night(tmp_path, environment)
    home = tmp_path / "imgread"
    wait_for(lambda: len(read_started(home)) == 3, 20)
    started.send_signal(signal.SIGUSR1)
    assert started.wait(20) == 143
    assert (home / "scontrol.log").read_text() == "requeue 17\n"


def test_an_allocation_that_is_cancelled(tmp_path, environment):
    started = start_endless(tmp_path, environment)
    started.terminate()
    assert started.wait(20) == 143
    assert not (tmp_path / "scontrol.log").exists()
    assert not list(tmp_path.glob("imgread-*"))


def test_an_allocation_that_loses_its_workers(tmp_path, environment):
    started = start_endless(tmp_path, environment)
    (worker,) = (
        n for command, n in read_started(tmp_path).items() if command.startswith("dask worker")
    )
    os.kill(worker, signal.SIGKILL)
    assert started.wait(20) == 3
    assert "ended before the job" in (tmp_path / "log").read_text()


def test_workers_of_an_allocation_with_gpus(tmp_path, environment):
    started = start_endless(tmp_path, environment | {"SLURM_GPUS_ON_NODE": "4"})
    started.terminate()
    assert started.wait(20) == 143
    expected = "dask cuda worker --nthreads 4 --resources GPU=1 --scheduler-file "
    assert any(command.startswith(expected) for command in read_started(tmp_path))


def test_dask_cuda_knows_the_options(kube_cluster):
    cli = pytest.importorskip("dask_cuda.cli")
    (sbatch,) = re.findall(r"worker=\((dask cuda worker .+)\)", SBATCH.read_text())
    spec = kube_cluster.make_spec("imgread", "image", 1)
    args = spec["spec"]["worker"]["spec"]["containers"][0]["args"]
    for command in (shlex.split(sbatch), args):
        context = cli.worker.make_context("worker", command[3:])
        assert context.params["nthreads"] == 4
        assert context.params["resources"] == "GPU=1"
        assert context.params["scheduler"] is None  # for which it takes an unknown option


# Slurm, a job for each worker


@pytest.fixture
def slurm_cluster(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the folder of logs
    return load(EXAMPLES / "slurm" / "slurm_cluster.py")


def test_the_job_of_a_worker(slurm_cluster):
    with slurm_cluster.make_cluster() as cluster:
        script = cluster.job_script()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    directives = re.findall("^#SBATCH (.+)$", script, re.MULTILINE)
    assert {"-n 1", "--cpus-per-task=16", "--gpus-per-node=1", "-t 04:00:00"} <= {*directives}
    command = shlex.split(script.splitlines()[-1])
    options = dict(zip(command[4::2], command[5::2], strict=False))
    assert command[:3] == [sys.executable, "-m", "distributed.cli.dask_worker"]
    assert options["--nthreads"] == "4"
    assert "--resources GPU=1" in script


@pytest.mark.slow
def test_workers_that_are_jobs(tmp_path, photo_shards, environment, programs):
    write_commands(tmp_path, sbatch=SBATCH_COMMAND, scancel=SCANCEL)
    script = EXAMPLES / "slurm" / "slurm_cluster.py"

    def run(shards):
        done = subprocess.run(
            [programs / "python", script, *shards, "--out", "out", "--update", "--jobs", "1"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, len((tmp_path / "scancel.log").read_text().split())

    printed, jobs = run(photo_shards[:3])
    assert "75 images, 0 failed" in printed
    assert jobs == 1
    before = read_times(tmp_path / "out")
    for _ in range(2):  # the second time nothing is left to do
        printed, jobs = run(photo_shards)
        assert "100 images, 0 failed" in printed
        assert jobs == 2
    check_update(tmp_path / "out", before)
    assert pd.read_parquet(tmp_path / "out")["error"].isna().all()
    wait_for(lambda: not list(find_marked(environment["MARK"])), 20)  # scancel does not wait


# Kubernetes


def read_manifests():
    return [
        manifest
        for name in ("job", "cronjob")
        for manifest in yaml.safe_load_all((EXAMPLES / "kubernetes" / f"{name}.yaml").read_text())
    ]


def check_type(value, type):
    """Check that Kubernetes's own client knows every field, and misses none."""
    from kubernetes.client import ApiClient

    with ApiClient() as client:
        model = client.deserialize(SimpleNamespace(data=json.dumps(value)), type)
        assert client.sanitize_for_serialization(model) == value


@pytest.mark.parametrize("manifest", read_manifests(), ids=lambda manifest: manifest["kind"])
def test_manifests(manifest):
    assert manifest["apiVersion"]
    assert manifest["metadata"]["name"] == "imgread"
    check_type(manifest, f"V1{manifest['kind']}")


def find_pods():
    """Return the specs of both jobs, and those of their pods."""
    by_kind = {
        manifest["kind"]: manifest["spec"] for manifest in read_manifests() if "spec" in manifest
    }
    jobs = by_kind["Job"], by_kind["CronJob"]["jobTemplate"]["spec"]
    return [(job, job["template"]["spec"]) for job in jobs]


def test_pods_of_jobs():
    for job, pod in find_pods():
        (container,) = pod["containers"]
        assert pod["restartPolicy"] == "Never"  # what a podFailurePolicy asks for
        (rule, _) = job["podFailurePolicy"]["rules"]
        assert rule["onExitCodes"]["containerName"] == container["name"]
        assert container["image"] in (EXAMPLES / "kubernetes" / "Dockerfile").read_text()
        assert container["envFrom"] == [{"secretRef": {"name": "imgread-storage"}}]
        assert container["resources"]["limits"]["memory"]
    assert find_pods()[0][1]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "4"


def test_the_image():
    lines = (EXAMPLES / "kubernetes" / "Dockerfile").read_text().splitlines()
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY ")]
    for path in (path for paths in copied for path in paths):
        assert (EXAMPLES.parent / path).exists(), path
    (environment,) = (line for line in lines if line.startswith("ENV "))
    assert environment == "ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"


@pytest.fixture
def kube_cluster():
    handler = signal.getsignal(signal.SIGTERM)
    yield load(EXAMPLES / "kubernetes" / "kube_cluster.py")
    signal.signal(signal.SIGTERM, handler)


def test_the_cluster_on_kubernetes(kube_cluster):
    from distributed.cli import dask_scheduler

    spec = kube_cluster.make_spec("imgread", "registry.example.com/imgread:1", 8)
    assert (spec["apiVersion"], spec["kind"]) == ("kubernetes.dask.org/v1", "DaskCluster")
    pods = {name: spec["spec"][name]["spec"] for name in ("scheduler", "worker")}
    containers = {name: pod["containers"][0] for name, pod in pods.items()}
    for name, pod in pods.items():
        check_type(pod, "V1PodSpec")
        assert containers[name]["image"] == "registry.example.com/imgread:1"
        assert containers[name]["resources"]["limits"]["memory"]
    assert spec["spec"]["worker"]["replicas"] == 8

    assert containers["worker"]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert containers["worker"]["envFrom"] == [{"secretRef": {"name": "imgread-storage"}}]
    command = "dask cuda worker --nthreads 4 --resources GPU=1 --name $(DASK_WORKER_NAME)"
    assert " ".join(containers["worker"]["args"]).startswith(command)
    assert "nvidia.com/gpu" not in containers["scheduler"]["resources"]["limits"]
    program, command, *options = containers["scheduler"]["args"]
    assert (program, command) == ("dask", "scheduler")
    dask_scheduler.main.make_context("scheduler", options)


def test_the_client_on_kubernetes(
    tmp_path, photo_shards, environment, kube_cluster, imgread_gpu_cluster, monkeypatch, capsys
):
    """Run the pod's command, with shards and a cluster of this machine."""
    (container,) = find_pods()[1][1]["containers"]
    assert container["command"] == ["python", "kube_cluster.py"]
    arguments = [word.replace("s3://example-bucket", str(tmp_path)) for word in container["args"]]
    made = []

    def make_cluster(**options):
        made.append(options)
        return contextlib.nullcontext(imgread_gpu_cluster)

    monkeypatch.setattr(kube_cluster, "KubeCluster", make_cluster)
    monkeypatch.setattr(sys, "argv", ["kube_cluster.py", *arguments])
    copy_shards(photo_shards[:3], tmp_path / "shards")
    kube_cluster.main(**kube_cluster.read_arguments())
    assert made[0]["custom_cluster_spec"]["spec"]["worker"]["replicas"] == 8
    assert "75 images, 0 failed" in capsys.readouterr().out

    before = read_times(tmp_path / "metadata")
    copy_shards(photo_shards[3:], tmp_path / "shards")
    for _ in range(2):  # the second time nothing is left to do
        kube_cluster.main(**kube_cluster.read_arguments())
        assert "100 images, 0 failed" in capsys.readouterr().out
    check_update(tmp_path / "metadata", before)
    assert len(made) == 2


def find_final(job):
    """Return the exit statuses after which a job is not tried again."""
    (rule,) = (r for r in job["podFailurePolicy"]["rules"] if r["action"] == "FailJob")
    return rule["onExitCodes"]["values"]


def test_a_pod_is_tried_again_while_the_folder_is_in_use(
    tmp_path, photo_shards, environment, programs
):
    """Its predecessor may have been killed."""
    copy_shards(photo_shards[:1], tmp_path / "shards")
    with claim_folder(JobFolder(str(tmp_path / "metadata"))):
        for job, pod in find_pods():
            words = pod["containers"][0]["command"] + pod["containers"][0]["args"]
            words = [word.replace("s3://example-bucket", str(tmp_path)) for word in words]
            done = subprocess.run(
                [programs / words[0], *words[1:]],
                cwd=EXAMPLES / "kubernetes",
                env=environment,
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert "is in use by process" in done.stderr
            assert done.returncode not in find_final(job)


# cron


@pytest.mark.parametrize(("status", "mailed"), [(0, False), (124, False), (1, True), (3, True)])
def test_cron_mails_of_what_needs_someone(tmp_path, environment, status, mailed):
    home = write_home(tmp_path, f"#!/bin/sh\necho $@\necho hot >&2\nexit {status}\n")
    mail = run_cron(environment | {"HOME": str(tmp_path)})
    assert (home / "nightly.jsonl").read_text() == "metadata --config nightly.toml\nhot\n"
    assert bool(mail) == mailed
    assert not mailed or mail.splitlines()[0] == f"dask-imgread: status {status}"
    assert not mailed or "hot" in mail


def test_nights_of_cron(tmp_path, photo_shards, environment, programs):
    home = write_home(tmp_path, f'#!/bin/sh\nexec {programs}/dask-imgread "$@"\n')
    text = (EXAMPLES / "cron" / "nightly.toml").read_text()
    text = text.replace("s3://example-bucket/", "").replace("retries", "workers = 1\nretries")
    (home / "nightly.toml").write_text(text)
    environment |= {"HOME": str(tmp_path)}

    copy_shards(photo_shards[:3], home / "shards")
    assert run_cron(environment) == ""
    before = read_times(home / "metadata")
    copy_shards(photo_shards[3:], home / "shards")
    assert run_cron(environment) == ""
    check_update(home / "metadata", before)
    summary = json.loads((home / "nightly.jsonl").read_text().splitlines()[-1])
    assert (summary["new_shards"], summary["new_images"], summary["images"]) == (1, 25, 100)

    with claim_folder(JobFolder(str(home / "metadata"))):
        mail = run_cron(environment)
    assert mail.startswith("dask-imgread: status 3\n")
    assert f"metadata is in use by process {os.getpid()} on host " in mail.splitlines()[-1]


def write_home(folder, script):
    home = folder / "imgread"
    (home / ".venv").mkdir(parents=True)
    write_commands(home / ".venv", dask_imgread=script)
    return home


def run_cron(environment):
    """Return what cron would mail."""
    _, command = read_entry(CRONTAB)
    done = subprocess.run(
        ["sh", "-c", command], env=environment, capture_output=True, text=True, timeout=60
    )
    return done.stdout + done.stderr


def test_the_configuration():
    path = EXAMPLES / "cron" / "nightly.toml"
    parser = make_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    known = {
        name.removeprefix("--")
        for action in commands.choices["metadata"]._actions
        for name in action.option_strings or [action.dest]
    }
    config = tomllib.loads(path.read_text())
    assert {"shards", "out", "storage-option"} <= {*config} <= known
    options = parse_arguments(parser, ["metadata", "--config", str(path)])
    assert options.shards == config["shards"]
    assert options.images_per_partition == config["images-per-partition"]
    assert dict(options.storage_option) == config["storage-option"]
