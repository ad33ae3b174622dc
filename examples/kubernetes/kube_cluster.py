"""Decode shards on a Dask cluster on Kubernetes, one GPU for each worker; write their metadata.

Runs in the pod of cronjob.yaml. Needs the Dask operator in the cluster, and
`pip install dask-kubernetes`, as in the image.
"""

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dask_kubernetes.operator import KubeCluster, make_cluster_spec
from distributed import Client

from dask_imgread import ImageReaderStage, run_job

READERS = 4  # that share a GPU
SECRET = "imgread-storage"  # its keys become environment variables of the workers


def make_spec(name: str, image: str, workers: int) -> dict[str, Any]:
    """Return the DaskCluster that the operator is to make."""
    command = ["dask", "cuda", "worker", "--nthreads", str(READERS), "--resources", "GPU=1"]
    spec = make_cluster_spec(
        name=name,
        image=image,
        n_workers=workers,
        env=[],
        worker_command=command,
        idle_timeout=3600,  # in case this client does not come back; a new GPU node may take long
    )
    (scheduler,) = spec["spec"]["scheduler"]["spec"]["containers"]
    # make_cluster_spec (dask-kubernetes 2026.3) says `dask-scheduler`, which distributed no
    # longer has since 2026.6.
    scheduler["args"] = ["dask", "scheduler", "--host", "0.0.0.0"]
    scheduler["resources"] = {"requests": {"cpu": "1"}, "limits": {"memory": "8Gi"}}

    pod = spec["spec"]["worker"]["spec"]
    pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    (worker,) = pod["containers"]
    worker["resources"] = {"limits": {"nvidia.com/gpu": "1", "cpu": "16", "memory": "64Gi"}}
    worker["envFrom"] = [{"secretRef": {"name": SECRET}}]
    return spec


@contextmanager
def start_cluster(spec: dict[str, Any]) -> Iterator[Client]:
    """Start a cluster, or take it over: if this pod's predecessor was killed, it is still there."""
    with (
        KubeCluster(
            custom_cluster_spec=spec,
            shutdown_on_close=True,
            resource_timeout=900,  # to pull the image
            quiet=True,
        ) as cluster,
        cluster.get_client() as client,
    ):
        client.wait_for_workers(1)
        yield client


def main(
    path: str | list[str],
    out: str,
    image: str,
    update: bool = False,
    workers: int = 8,
    name: str = "imgread",
) -> None:
    # Raised as an exception, SIGTERM deletes the cluster; process 1 of a pod would ignore it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    reader = ImageReaderStage(num_gpus_per_worker=1 / READERS, sidecars=False)
    # Started only if anything is left to do, and nobody else is at it.
    cluster = start_cluster(make_spec(name, image, workers))
    summary = run_job(path, out, client=cluster, reader=reader, update=update, progress=True)
    print(f"{summary.images} images, {summary.failed} failed, {summary.seconds:.0f} s")


def read_arguments() -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", nargs="+", help="URLs of shards, which workers can open")
    parser.add_argument("--out", required=True, help="URL for the metadata")
    parser.add_argument("--update", action="store_true", help="read what is new or has changed")
    parser.add_argument("--image", required=True, help="of scheduler and workers")
    parser.add_argument("--workers", type=int, default=8, help="pods, one GPU each")
    parser.add_argument("--name", default="imgread", help="of the DaskCluster")
    return vars(parser.parse_args())


if __name__ == "__main__":
    main(**read_arguments())
