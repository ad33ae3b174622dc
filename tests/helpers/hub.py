"""A small Hugging Face Hub on the loopback interface: one dataset, as its own client asks for it.

As on the real one, files are at another address, to which the Hub redirects each request.
"""

import hashlib
import json
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import close_session

from tests.helpers.servers import Handler, Server, serve_http


class HubHandler(Handler):
    """Answers what `HfFileSystem` asks for; anything else is not found."""

    do_POST = Handler.do_GET  # noqa: N815

    def respond(self):
        sent = b"".join(self.body()).decode()
        path = urlsplit(self.path).path + "/"
        token, dataset = self.server.token, self.server.dataset
        known = path.startswith((f"/api/datasets/{dataset}/", f"/datasets/{dataset}/"))
        if (token or not known) and self.headers.get("Authorization") != f"Bearer {token}":
            self.refuse(401, "RepoNotFound")  # whether it is private, or there is none
            return
        action, _, rest = path.partition(f"datasets/{dataset}/")[2].partition("/")
        revision, _, name = rest.partition("/")
        file = self.server.folder / unquote(name := name.rstrip("/"))
        if not known:
            self.refuse(404, "RepoNotFound")
        elif revision not in ("", "main"):
            self.refuse(404, "RevisionNotFound")
        elif action in ("", "revision"):
            self.send_json({"id": dataset, "sha": "0" * 40, "private": token is not None})
        elif action == "paths-info":
            self.send_json([self.describe(self.server.folder / p) for p in parse_qs(sent)["paths"]])
        elif action == "tree" and file.is_dir():
            everything = "recursive=true" in self.path.lower()
            found = sorted(file.rglob("*") if everything else file.iterdir())
            self.send_json([self.describe(path) for path in found])
        elif action == "resolve" and file.is_file():
            self.send_bytes(302, "text/plain", b"", ("Location", f"{self.server.files.url}/{name}"))
        else:
            self.refuse(404, "EntryNotFound")

    def describe(self, file):
        path = str(file.relative_to(self.server.folder))
        if file.is_dir():
            return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
        digest = hashlib.sha1(file.read_bytes()).hexdigest()
        return {"type": "file", "path": path, "oid": digest, "size": file.stat().st_size}

    def send_json(self, value):
        self.send_bytes(200, "application/json", json.dumps(value).encode())

    def refuse(self, status, code):
        self.send_bytes(status, "text/plain", b"", ("X-Error-Code", code))

    def fail(self, status, *headers):
        self.send_bytes(status, "text/html", b"<html></html>", *headers)


class HubServer(Server):
    """A server of one dataset; see `serve_hub`."""

    def __init__(self, folder, dataset, token, files):
        super().__init__(HubHandler, None)
        self.folder, self.dataset, self.token, self.files = Path(folder), dataset, token, files
        self.storage_options = {"endpoint": self.url} | ({"token": token} if token else {})

    def count(self, action):
        """Return how often "tree", "resolve" and so on was asked for; "": the dataset itself."""
        asked = [f"{urlsplit(request.path).path}/" for request in self.requests]
        return sum(path.partition(f"{self.dataset}/")[2].split("/")[0] == action for path in asked)


@contextmanager
def serve_hub(folder, dataset="owner/name", *, token=None):
    """Serve `folder` as ``hf://datasets/<dataset>`` with `.storage_options`; yield the server.

    `.files` is the server of the files; with a `token`, the dataset is private.
    """
    with serve_http(folder) as files, HubServer(folder, dataset, token, files).running() as server:
        yield server
    close_session()  # the client of this process keeps connections
