"""A server on this machine that speaks what huggingface_hub asks of the Hub, and counts it."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

GATED = (403, "GatedRepo", "Access to this model is restricted")
NOT_FOUND = (401, "RepoNotFound", "Invalid username or password.")
NO_REVISION = (404, "RevisionNotFound", "Invalid rev id")
NO_ENTRY = (404, "EntryNotFound", "Entry not found")
BAD_TOKEN = (401, "", "Invalid credentials in Authorization header")


@dataclass
class FakeHub:
    """What the server has, and what it was asked.

    Attributes:
        commits: Repository → commit → file name → bytes.
        refs: (repository, branch or tag) → commit.
        gated: Repositories whose files, but not whose names, are for those with the token.
        private: Repositories that are there only for those with the token.
        token: The one token that is valid.
        asked: (method, path, Authorization), in order.
        delay: Seconds that every file takes.
    """

    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refs: dict[tuple[str, str], str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    token: str = "hf_right"
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    delay: float = 0.0
    url: str = ""

    def push(self, repo: str, files: Mapping[str, bytes | str], branch: str = "main") -> str:
        """A commit of these files and no others; its hash."""
        whole = {n: t.encode() if isinstance(t, str) else t for n, t in files.items()}
        text = repr((repo, branch, sorted(whole.items())))
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits.setdefault(repo, {})[commit] = whole
        self.refs[repo, branch] = commit
        return commit

    def push_folder(self, repo: str, folder: Path, **more: bytes | str) -> str:
        """A commit of a folder's files, and of others by name with __ for the dot."""
        files: dict[str, bytes | str] = {
            p.relative_to(folder).as_posix(): p.read_bytes()
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        }
        return self.push(repo, files | {n.replace("__", "."): t for n, t in more.items()})

    def files(self) -> set[str]:
        """ORG/NAME/FILE of everything that was downloaded."""
        gets = (path for method, path, _ in self.asked if method == "GET" and "/resolve/" in path)
        return {f"{p.split('/resolve/')[0][1:]}/{p.split('/resolve/')[1][41:]}" for p in gets}


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """A block in which it answers."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self.answer(True)

        def do_HEAD(self) -> None:
            self.answer(False)

        def answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            login = self.headers.get("Authorization", "")
            hub.asked.append((self.command, path, login))
            code, headers, data = reply(hub, path, login.removeprefix("Bearer "))
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                time.sleep(hub.delay if "/resolve/" in path else 0)
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


Reply = tuple[int, dict[str, str], bytes]


def reply(hub: FakeHub, path: str, token: str) -> Reply:
    """Status, headers and body of an answer."""
    if token and token != hub.token:
        return error(BAD_TOKEN)
    api = path.startswith("/api/models/")
    parts = path.removeprefix("/api/models" if api else "").strip("/").split("/")
    repo, verb, rest = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "", parts[3:]
    if repo not in hub.commits or (repo in hub.private and not token):
        return error(NOT_FOUND)
    if not api and repo in hub.gated and not token:
        return error(GATED)
    if verb == "revision":
        rest = ["/".join(rest)]  # refs/pr/1 has slashes
    commit = hub.refs.get((repo, rest[0]), rest[0])
    files = hub.commits[repo].get(commit)
    if files is None:
        return error(NO_REVISION)
    if verb == "revision":
        found: Any = {"id": repo, "sha": commit, "siblings": [{"rfilename": n} for n in files]}
        return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()
    if verb == "tree":
        rows = [
            {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
            for n, d in files.items()
        ]
        return 200, {"Content-Type": "application/json"}, json.dumps(rows).encode()
    data = files.get("/".join(rest[1:]))
    if data is None:
        return error(NO_ENTRY)
    etag = hashlib.sha1(data).hexdigest()
    headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "X-Linked-Size": str(len(data))}
    return 200, headers, data


def error(what: tuple[int, str, str]) -> Reply:
    """An answer that says no, as the Hub says it."""
    code, name, message = what
    headers = {"X-Error-Message": message} | ({"X-Error-Code": name} if name else {})
    return code, headers, b"{}"


@contextmanager
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub on this machine, an empty cache, nobody logged in, and tmp_path/work as the folder."""
    hub = import_module("huggingface_hub")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    hub.close_session()
    with serving(FakeHub()) as found:
        monkeypatch.setattr(hub.constants, "ENDPOINT", found.url)
        template = f"{found.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
        work = tmp_path / "work"
        work.mkdir()
        monkeypatch.chdir(work)
        yield found
        hub.close_session()


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE is set, and a socket that is opened fails the test."""

    hub = import_module("huggingface_hub")

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
