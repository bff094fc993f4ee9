"""A Hugging Face Hub of one dataset or one model on the loopback interface.

It answers what datasets 5.2 and huggingface_hub 2.4 ask for when they look a repository up and read
its files: the repository's state, its file tree, and the files, in ranges.
"""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class FakeHub:
    """The repository `name`; each commit (40 hex digits) has its files; the last one is `main`."""

    name: str
    commits: dict[str, dict[str, bytes]]
    kind: str = "datasets"  # or "models"
    gated: int = 0  # the status of its files: 401 to a stranger, 403 to who wasn't let in
    cut_after: int | None = None  # the next file ends after so many bytes, as a connection may
    dies: bool = False  # with that cut; from then on every connection ends without an answer
    asked: list[str] = field(default_factory=list)  # "GET /path", in order
    bytes_sent: int = 0
    missing: set[str] = field(default_factory=set)  # files that are listed and can't be had
    failures: int = 0  # so many ranges of files get status 503 first

    @contextmanager
    def serving(self):
        """Serve until the end of the `with` block; yields the value for HF_ENDPOINT."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()

    def commit(self, revision: str) -> str | None:
        """The commit that a revision names."""
        if revision == "main":
            return list(self.commits)[-1]
        return revision if revision in self.commits else None

    def info(self, commit: str) -> dict:
        """What the Hub says of the repository."""
        return {
            "_id": "0",
            "id": self.name,
            "sha": commit,
            "private": False,
            "gated": False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": path} for path in self.commits[commit]],
        }

    def tree(self, commit: str, folder: str, recursive: bool) -> list[dict]:
        """The entries below a folder."""
        entries: dict[str, dict] = {}
        prefix = f"{folder}/" if folder else ""
        for path, content in self.commits[commit].items():
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                parent = prefix + "/".join(parts[:depth])
                entries[parent] = {"type": "directory", "path": parent, "oid": "0", "size": 0}
            if recursive or len(parts) == 1:
                entries[path] = self.entry(path, content)
        return list(entries.values())

    def entry(self, path: str, content: bytes) -> dict:
        """A file as the tree shows it."""
        oid, size = hashlib.sha1(content).hexdigest(), len(content)
        entry = {"type": "file", "path": path, "oid": oid, "size": size}
        if path.endswith(".bin"):  # large files are kept apart, and told by another hash
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": size, "pointerSize": 134}
        return entry

    def paths_info(self, commit: str, paths: list[str]) -> list[dict]:
        """What is at each of `paths`."""
        found = []
        for path in paths:
            if path in self.commits[commit]:
                found.append(self.entry(path, self.commits[commit][path]))
            elif any(name.startswith(path + "/") for name in self.commits[commit]):
                found.append({"type": "directory", "path": path, "oid": "0", "size": 0})
        return found


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        headers.setdefault("Content_Length", str(len(content)))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_json(self, content: object) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b"{}", X_Error_Code=code, X_Error_Message=f"fake: {code}")

    def do_GET(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        if hub.dies and hub.cut_after is None:
            self.close_connection = True
            return
        path, query = unquote(url.path), parse_qs(url.query)
        hub.asked.append(f"{self.command} {path}")
        api = f"/api/{hub.kind}/{hub.name}"
        files = f"{'' if hub.kind == 'models' else '/datasets'}/{hub.name}/resolve/"
        if path == api:
            self.answer_json(hub.info(hub.commit("main")))
        elif path.startswith((api + "/", files)):
            rest = path.removeprefix(api + "/").replace(files, "resolve/", 1)
            kind, revision, rest = [*rest.split("/", 2), ""][:3]
            commit = hub.commit(revision)
            if commit is None:
                self.refuse(404, "RevisionNotFound")
            elif kind == "revision":
                self.answer_json(hub.info(commit))
            elif kind == "tree":
                recursive = query.get("recursive", ["false"])[0].lower() == "true"
                self.answer_json(hub.tree(commit, rest, recursive))
            elif kind == "paths-info":
                self.answer_json(hub.paths_info(commit, self.posted_paths()))
            elif kind == "resolve":
                self.file(commit, rest)
            else:
                self.refuse(404, "EntryNotFound")
        else:
            self.refuse(404, "RepoNotFound")

    do_HEAD = do_POST = do_GET

    def posted_paths(self) -> list[str]:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if "json" in self.headers.get("Content-Type", ""):
            return json.loads(body)["paths"]
        return parse_qs(body)["paths"]

    def file(self, commit: str, path: str) -> None:
        content = self.hub.commits[commit].get(path)
        if content is None or path in self.hub.missing:
            self.refuse(404, "EntryNotFound")
            return
        if self.hub.gated:
            self.refuse(self.hub.gated, "GatedRepo")
            return
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": commit}
        wanted, cut = self.headers.get("Range"), self.hub.cut_after
        if self.command == "GET" and cut is not None and len(content) > cut:
            self.hub.cut_after = None
            self.hub.bytes_sent += cut
            self.answer(200, content[:cut], Content_Length=str(len(content)), **headers)
            self.close_connection = True
            return
        if self.command != "HEAD" and not wanted:
            self.hub.bytes_sent += len(content)
        if self.command == "HEAD" or not wanted:
            self.answer(200, content, Accept_Ranges="bytes", **headers)
            return
        if self.hub.failures:
            self.hub.failures -= 1
            self.answer(503)
            return
        start, _, end = wanted.removeprefix("bytes=").partition("-")
        part = content[int(start) : int(end or len(content)) + 1]
        self.hub.bytes_sent += len(part)
        span = f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}"
        self.answer(206, part, Content_Range=span, **headers)
