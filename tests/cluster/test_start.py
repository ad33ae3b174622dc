import inspect
import subprocess
import sys

import dask
import numpy as np
import pytest
from dask.sizeof import sizeof

from dask_imgread import FileGroupTask, ImageReaderStage, partition_shards, start_cluster
from dask_imgread.cluster.start import choose_gpu_options
from dask_imgread.cluster.window import map_windowed
from dask_imgread.testing import make_shards


def test_client_map(client, photo_shards):
    reader = ImageReaderStage(dali_batch_size=10)
    tasks = partition_shards(photo_shards)
    results = client.gather(client.map(reader, tasks, **reader.annotations(client)))
    assert [len(batches) for batches in results] == [3] * 4
    local = reader.process(tasks[0])[0].data[3]
    np.testing.assert_array_equal(results[0][0].data[3].image_data, local.image_data)


def test_batches_travel_between_workers_unchanged(client, photo_shards):
    first, second = client.scheduler_info(n_workers=-1)["workers"]
    reader = ImageReaderStage()
    task = FileGroupTask(data=photo_shards[:1])
    future = client.submit(reader, task, workers=[first], pure=False)
    sums = client.submit(
        lambda batches: [int(i.image_data.sum()) for b in batches for i in b.data],
        future,
        workers=[second],
    ).result()
    assert sums == [int(i.image_data.sum()) for b in reader(task) for i in b.data]


def test_pixels_stay_out_of_pickle_bytes(photo_shards):
    from distributed.protocol import deserialize, serialize

    (batch,) = ImageReaderStage()(FileGroupTask(data=photo_shards[:1]))
    header, frames = serialize(batch)
    pixels = sum(image.image_data.nbytes for image in batch.data)
    assert len(frames[0]) < 10_000
    assert sum(memoryview(frame).nbytes for frame in frames[1:]) == pixels
    again = deserialize(header, frames)
    np.testing.assert_array_equal(again.data[7].image_data, batch.data[7].image_data)
    assert pixels < sizeof(batch) < 1.2 * pixels
    assert batch.data[0].image_data.nbytes < sizeof(batch.data[0])


def test_annotations_fit_a_cpu_cluster(client):
    assert ImageReaderStage().annotations(client) == {}
    with pytest.raises(
        RuntimeError, match=r"0.25 of the resource 'GPU'.*declared: \[0\].*start_cl"
    ):
        ImageReaderStage(device="gpu").annotations(client)
    with pytest.raises(RuntimeError, match="would wait for ever"):
        next(map_windowed(client, abs, [1], resources={"GPU": 0.25}))


def test_annotations_fit_a_cluster_that_declares_gpus(imgread_gpu_client):
    reader = ImageReaderStage(num_gpus_per_worker=0.5)
    assert reader.annotations(imgread_gpu_client) == {"resources": {"GPU": 0.5}}
    assert ImageReaderStage(device="cpu").annotations(imgread_gpu_client) == {}
    assert ImageReaderStage(decode=False).annotations(imgread_gpu_client) == {}
    with dask.annotate(**reader.annotations(imgread_gpu_client)):
        assert imgread_gpu_client.submit(sum, [1, 2]).result(timeout=20) == 3


def test_start_cluster_prints_the_dashboard(capsys):
    with start_cluster(device="cpu", n_workers=1, dashboard_address=":0") as cluster:
        assert cluster.dashboard_link in capsys.readouterr().out


def test_start_cluster_without_the_gpu_asked_for(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(RuntimeError, match="no GPU was found: NVML"):
        start_cluster(device="gpu")


@pytest.mark.parametrize(("share", "threads"), [(0.25, 4), (0.3, 3), (1, 1)])
def test_gpu_workers_have_a_thread_for_each_share(share, threads):
    options = choose_gpu_options(None, share, {"memory_limit": "4GB"})
    assert options["threads_per_worker"] == threads
    assert options["resources"] == {"GPU": 1}
    assert options["memory_limit"] == "4GB"


def test_what_dask_cuda_is_given_is_what_it_takes():
    """Against the real signature; the class itself can't start without a driver."""
    dask_cuda = pytest.importorskip("dask_cuda", reason="dask-cuda is not installed")
    from distributed import Worker

    options = choose_gpu_options(2, 0.25, {"memory_limit": "8GB", "rmm_pool_size": "10GB"})
    signature = inspect.signature(dask_cuda.LocalCUDACluster.__init__)
    passed_on = signature.bind(None, **options).arguments.get("kwargs", {})
    assert set(passed_on) == {"resources"}
    assert "resources" in inspect.signature(Worker.__init__).parameters
    assert signature.parameters["threads_per_worker"].default == 1


def test_a_gpu_cluster_without_dask_cuda_says_what_to_install(monkeypatch):
    from dask_imgread.cluster import start as cluster

    monkeypatch.setattr(cluster, "count_gpus", lambda: 1)
    monkeypatch.setitem(sys.modules, "dask_cuda", None)
    with pytest.raises(ImportError, match=r'pip install "dask-imgread\[gpu\]"'):
        start_cluster()


@pytest.mark.parametrize(
    "call", ["start_cluster(device='cpu', n_workers=2)", "run_job('shards', 'out')"]
)
def test_a_script_without_a_guard_ends_with_one_line(tmp_path, call):
    make_shards(tmp_path / "shards", images_per_shard=2)
    name, _, _ = call.partition("(")
    script = f"from dask_imgread import {name}\n{call}\nprint('started')\n"
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert 'if __name__ == "__main__":' in done.stderr.splitlines()[-1]
    assert len(done.stderr.splitlines()) < 10
    assert "Traceback" not in done.stderr


def test_a_script_with_a_guard_starts_a_cluster(tmp_path, programs):
    (tmp_path / "script.py").write_text(
        "import os\n"
        "from dask_imgread import start_cluster\n"
        "if __name__ == '__main__':\n"
        "    with start_cluster(device='cpu', n_workers=1, verbose=False) as cluster:\n"
        "        print(len(cluster.workers), 'DASK_IMGREAD_UNGUARDED' in os.environ)\n"
    )
    done = subprocess.run(
        [programs / "python", "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "1 False\n")
