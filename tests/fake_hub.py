"""A Hugging Face Hub of our own: one dataset with its revisions, served to whoever has this HF_ENDPOINT."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote

Files = Mapping[str, bytes]


@contextmanager
def fake_hub(name: str, revisions: Mapping[str, Files]) -> Generator[str]:
    """The endpoint of a hub with the files of a dataset `name` by revision."""
    commits = {revision: _hash(revision.encode()) for revision in revisions}

    class Handler(BaseHTTPRequestHandler):
        """The few addresses that `datasets.load_dataset` asks for."""

        def do_GET(self) -> None:
            path = unquote(self.path.split("?")[0])
            of_files, of_api = f"/datasets/{name}/resolve/", f"/api/datasets/{name}"
            if path.startswith(of_files):
                revision, file = path.removeprefix(of_files).split("/", 1)
                self._file(revision, file)
            elif path == of_api or path.startswith(f"{of_api}/"):
                what, _, rest = path.removeprefix(of_api).removeprefix("/").partition("/")
                self._api(what, *(rest or "main").partition("/")[::2])
            else:
                self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def _file(self, revision: str, file: str) -> None:
            if (files := self._files(revision)) is None:
                return
            if file in files:
                headers = {"X-Repo-Commit": commits.get(revision, revision), "ETag": f'"{_hash(files[file])}"'}
                self._answer(200, files[file], headers)
            else:
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})

        def _api(self, what: str, revision: str, folder: str) -> None:
            if (files := self._files(revision)) is None:
                return
            if what == "tree" and folder:
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            elif what == "tree":
                entries = [{"type": "file", "path": file, "size": len(c), "oid": _hash(c)} for file, c in files.items()]
                self._json(entries)
            else:
                siblings = [{"rfilename": file} for file in files]
                self._json({"id": name, "sha": commits.get(revision, revision), "siblings": siblings})

        def _files(self, revision: str) -> Files | None:
            """The files of a revision, by name or commit; None where there is none, and answered so."""
            found = next((r for r, commit in commits.items() if revision in (r, commit)), None)
            if found is None:
                self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return None if found is None else revisions[found]

        def _json(self, value: Any) -> None:
            self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _hash(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
