"""A hub on this machine: the part of the Hugging Face hub's HTTP interface that a download or an upload uses."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, repos: dict[str, Path], *arguments):
        self._repos = repos
        super().__init__(*arguments)

    def do_GET(self):
        self._answer(body=True)

    def do_POST(self):
        """Repositories are made, and files come within commits."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            made = json.loads(content)
            url = f"http://{self.headers['Host']}/{made['organization']}/{made['name']}"
            return self._send(200, json.dumps({"url": url}).encode(), True)
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(content)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self._send(200, json.dumps({"files": files}).encode(), True)
        if self.path.endswith("/validate-yaml"):
            return self._send(200, json.dumps({"errors": [], "warnings": []}).encode(), True)
        if "/commit/" not in self.path:
            return self._send(404, b"{}", True)
        folder = self._repos["uploads"] / "/".join(self.path.split("/")[3:5])
        for line in map(json.loads, content.splitlines()):
            if line["key"] == "file":
                file = folder / line["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(line["value"]["content"]))
        url = f"http://{self.headers['Host']}/{folder.parent.name}/{folder.name}/commit/{COMMIT}"
        return self._send(200, json.dumps({"commitUrl": url, "commitOid": COMMIT}).encode(), True)

    def do_HEAD(self):
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            folder = self._repos.get("/".join(parts[2:4]))
            if folder:
                files = sorted(path for path in folder.rglob("*") if path.is_file())
                names = [str(path.relative_to(folder)) for path in files]
                tree = [
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": _digest(path)}
                    for name, path in zip(names, files, strict=True)
                ]
                about = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
                return self._send(200, json.dumps(tree if "tree" in parts else about).encode(), body)
        elif len(parts) > 4 and parts[2] == "resolve":
            file = self._repos.get("/".join(parts[:2]), Path("/none")) / "/".join(parts[4:])
            if file.is_file():
                headers = {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": COMMIT}
                return self._send(200, file.read_bytes(), body, headers)
        return self._send(404, b"{}", body, {"X-Error-Code": "EntryNotFound" if len(parts) > 4 else "RepoNotFound"})

    def _send(self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments) -> None:
        pass


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serve_hub(repos: dict[str, Path]) -> Iterator[str]:
    """The address of a hub with these repositories, by name."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, repos))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
