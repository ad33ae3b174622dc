"""Read shards from a server as if they were files. Needs `pip install "dask-imgread[http]"`.

A folder of shards is served by this script itself; a URL is read where it is (`s3://`, `gs://`,
`abfs://` and `hf://` need the extras `s3`, `gcs`, `azure` and `hf`):

    python examples/remote.py shards
    python examples/remote.py "https://example.com/shards/{00000..00099}.tar"
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd

from dask_imgread import connect_client, load_images, read_metadata


class Handler(SimpleHTTPRequestHandler):
    """Python's own knows no ranges: it sends each shard whole, and this package reads it once."""

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: there is a request for each shard."""


@contextmanager
def serve(folder: str) -> Iterator[str]:
    """Serve a folder on a free port of this machine, and yield its URL."""
    handler = partial(Handler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def read(urls: str | list[str]) -> pd.DataFrame:
    """Return a row for each image, and decode the first few."""
    with connect_client():
        rows = read_metadata(urls).compute()
        images = load_images(rows.head(3))
    print(f"{len(rows)} images in {rows['shard'].nunique()} shards")
    print(*images, sep="\n")
    return rows


def main(path: str) -> pd.DataFrame:
    """Read the shards of a URL, or of a folder that is served for it."""
    if "://" in path:
        return read(path)
    with serve(path) as url:
        return read([f"{url}/{shard.name}" for shard in sorted(Path(path).glob("*.tar"))])


if __name__ == "__main__":  # the worker processes import this file
    main(*sys.argv[1:])
