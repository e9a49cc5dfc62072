"""A model hub on the loopback: the real clients download from it, nothing in them is replaced.

    with Hub() as hub:
        pin = hub.commit("model", "lab/tiny", {"config.json": b"{}"})
        subprocess.run([sys.executable, "-c", script], env=os.environ | hub.environment())

The clients read `HF_ENDPOINT` when they are imported, so they run in a process of their own. Served: repository
information, lists of commits, tree listings, paths-info and files; large files, as on the real hub, by a redirect to a
second host (here a second address of the loopback: clients before 2.0 tell hosts apart without the port). Left out:
uploads, branches and tags other than `main`, listings of more than one page, `expand`, the dataset viewer and xet.

Source: `_http.py`, `hf_api.py`, `file_download.py` of huggingface_hub 1.33 and 2.4; `load.py` of datasets 5.2.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

Kind = Literal["model", "dataset"]
ADDRESSES = {"hub": "127.0.0.1", "cdn": "127.0.0.2"}
# What a client sends as HF_TOKEN to be let into gated repositories; any other token is an account without access.
TOKEN = "hf_loopback"
# The files that go to LFS and are served by redirect: these suffixes, and whatever is larger than 10 MiB.
LARGE_SUFFIXES = {".safetensors", ".bin", ".gguf", ".parquet", ".arrow", ".model", ".gz", ".zip", ".zst"}
LARGE_BYTES = 10 * 2**20
_API = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+(?:/[^/]+)??)"  # `name` or `owner/name`
_ROUTES = {
    "information": rf"{_API}(?:/revision/(?P<revision>[^/]+))?",
    "commits": rf"{_API}/commits/(?P<revision>[^/]+)",
    "tree": rf"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?",
    "paths_info": rf"{_API}/paths-info/(?P<revision>[^/]+)",
    "file": r"/(?:(?P<kind>datasets)/)?(?P<repo>[^/]+(?:/[^/]+)??)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
}


class Blob:
    """The bytes of one file, under the names that git and (for a large file) LFS give them."""

    def __init__(self, path: str, data: bytes) -> None:
        self.data = data
        self.oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        self.large = PurePosixPath(path).suffix in LARGE_SUFFIXES or len(data) > LARGE_BYTES
        self.hash = hashlib.sha256(data).hexdigest() if self.large else self.oid
        self.entry: dict[str, Any] = {"type": "file", "path": path, "oid": self.oid, "size": len(data)}
        if self.large:
            self.entry["lfs"] = {"oid": self.hash, "sha256": self.hash, "size": len(data), "pointerSize": 134}


@dataclass(frozen=True)
class Request:
    """One line of the log, as the server saw and answered it."""

    host: str  # "hub" or "cdn"
    method: str
    path: str
    range: str | None
    authorised: bool
    status: int
    sent: int  # bytes of the body


class HubError(Exception):
    """Answered in place of the thing asked for; the clients turn `code` into an error of their own."""

    def __init__(self, status: int, code: str, message: str, commit: str = "") -> None:
        super().__init__(message)
        self.status = status
        known = {"X-Repo-Commit": commit} if commit else {}  # the client remembers what a commit lacks
        self.headers = {"X-Error-Code": code, "X-Error-Message": message} | known


class Hub:
    """The server, up from `with` to the end of the block."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        # (kind, repo) -> commit -> path -> blob; the latest commit comes last and is `main`.
        self.repositories: dict[tuple[str, str], dict[str, dict[str, Blob]]] = {}
        self.gated: set[str] = set()
        # The faults, by (repo, path); the semaphore counts the connections that are yet to break.
        self.corrupted: set[tuple[str, str]] = set()
        self.shortened: set[tuple[str, str]] = set()
        self.breaks: dict[tuple[str, str], threading.Semaphore] = {}
        self.ignores_revisions = False

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="hub-clients-")
        self._servers = [_Server(self, "hub"), _Server(self, "cdn")]
        self.url, self.cdn_url = (f"http://{ADDRESSES[s.host]}:{s.server_port}" for s in self._servers)
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._folder.cleanup()

    def environment(self) -> dict[str, str]:
        """Variables to lay over `os.environ`. Every call makes a new cache; keep the answer to share one."""
        home = tempfile.mkdtemp(dir=self._folder.name)
        places = {"HF_HOME": home, "HF_HUB_CACHE": f"{home}/hub", "HF_DATASETS_CACHE": f"{home}/datasets"}
        account = {"HF_TOKEN": "", "HUGGING_FACE_HUB_TOKEN": "", "HF_TOKEN_PATH": f"{home}/token"}
        off = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS")
        on = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS")
        switches = dict.fromkeys(off, "0") | dict.fromkeys(on, "1")
        direct = dict.fromkeys(("NO_PROXY", "no_proxy"), ",".join(ADDRESSES.values()))
        return {"HF_ENDPOINT": self.url, **direct} | places | account | switches

    def commit(self, kind: Kind, repo: str, files: Mapping[str, bytes] | Path) -> str:
        """Make `files` the whole of `main`; gives the commit, which follows from the contents and the parent."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        tree = {path: Blob(path, data) for path, data in sorted(files.items())}
        before = self.repositories.get((kind, repo), {})
        identity = [[*before][-1:], *((path, blob.oid) for path, blob in tree.items())]
        commit = hashlib.sha1(json.dumps(identity).encode()).hexdigest()
        self.repositories[kind, repo] = {**before, commit: tree}
        return commit

    def gate(self, repo: str) -> None:
        """Refuse the files to whoever does not send TOKEN. What the repository holds stays listed."""
        self.gated.add(repo)

    def truncate(self, repo: str, path: str, times: int = 1) -> None:
        """Break the next `times` connections that ask for bytes beyond the middle of the file, at the middle."""
        self.breaks[repo, path] = threading.Semaphore(times)

    def corrupt(self, repo: str, path: str) -> None:
        """Serve the file with one bit in its middle turned over, under the true length and etag."""
        self.corrupted.add((repo, path))

    def shorten(self, repo: str, path: str) -> None:
        """Serve the first half of the file as if it were the whole, under the etag of the whole."""
        self.shortened.add((repo, path))

    def mend(self) -> None:
        """Take back every order to corrupt, shorten or truncate."""
        self.corrupted.clear()
        self.shortened.clear()
        self.breaks.clear()

    def ignore_revisions(self) -> None:
        """From now on serve `main`, whatever known revision is asked for: a hub to whom a pin means nothing."""
        self.ignores_revisions = True


class _Server(ThreadingHTTPServer):
    def __init__(self, hub: Hub, host: str) -> None:
        super().__init__((ADDRESSES[host], 0), _Handler)
        self.hub, self.host = hub, host


class _Handler(BaseHTTPRequestHandler):
    """Answers one connection. A route is a method of the same name: it replies or raises HubError."""

    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nothing: `reply` knows how much it sends."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        posted = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        self.query = parse_qs(url.query) | parse_qs(posted)
        try:
            for route, pattern in _ROUTES.items():
                if match := re.fullmatch(pattern, url.path):
                    self.find(**{name: unquote(part or "") for name, part in match.groupdict().items()})
                    return getattr(self, route)()
            raise HubError(501, "", f"The loopback hub has no route for {url.path}")
        except HubError as error:
            self.reply_json({"error": str(error)}, error.status, **error.headers)

    do_HEAD = do_POST = do_GET  # noqa: N815

    def find(self, kind: str, repo: str, revision: str = "", path: str = "") -> None:
        """Look up what the URL names; the revision becomes a commit."""
        self.kind, self.repo, self.wanted = ("dataset" if kind == "datasets" else "model"), repo, path
        revisions = self.server.hub.repositories.get((self.kind, repo))
        if revisions is None:  # a stranger is not told whether a private repository exists
            raise HubError(404 if self.token else 401, "RepoNotFound", "Repository not found")
        self.commit = [*revisions][-1] if revision in ("", "main") else revision
        if self.commit not in revisions:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if self.server.hub.ignores_revisions:
            self.commit = [*revisions][-1]
        self.revisions, self.files = revisions, revisions[self.commit]

    def commits(self) -> None:
        """The history up to the revision, the newest first."""
        known = [*self.revisions]
        about = {"title": "", "message": "", "date": "2026-01-01T00:00:00.000Z", "authors": []}
        self.reply_json([{"id": commit, **about} for commit in reversed(known[: known.index(self.commit) + 1])])

    def information(self) -> None:
        siblings = [{"rfilename": name, "blobId": blob.oid, **blob.entry} for name, blob in self.files.items()]
        gated = "manual" if self.repo in self.server.hub.gated else False
        about = {"_id": self.commit[:24], "id": self.repo, "sha": self.commit, "gated": gated, "siblings": siblings}
        self.reply_json(about | {"private": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []})

    def entries(self) -> dict[str, dict[str, Any]]:
        """The listing: every folder and every file, by path."""
        folders = {str(parent) for path in self.files for parent in PurePosixPath(path).parents} - {"."}
        listed = [{"type": "directory", "path": path, "oid": self.commit, "size": 0} for path in sorted(folders)]
        return {entry["path"]: entry for entry in [*listed, *(blob.entry for blob in self.files.values())]}

    def tree(self) -> None:
        entries, top = self.entries(), PurePosixPath(self.wanted)
        if self.wanted and entries.get(self.wanted, {}).get("type") != "directory":
            raise HubError(404, "EntryNotFound", f"{self.wanted} does not exist", self.commit)
        depth = None if self.query.get("recursive") == ["true"] else 1
        self.reply_json([entries[name] for name in entries if top in PurePosixPath(name).parents[:depth]])

    def paths_info(self) -> None:
        entries = self.entries()
        self.reply_json([entries[name] for name in self.query.get("paths", []) if name in entries])

    def file(self) -> None:
        hub, cdn = self.server.hub, self.server.host == "cdn"
        if self.repo in hub.gated and self.token != TOKEN and not cdn:
            raise HubError(403 if self.token else 401, "GatedRepo", f"Access to {self.repo} is restricted.")
        blob = self.files.get(self.wanted)
        if blob is None:
            raise HubError(404, "EntryNotFound", "Entry not found", self.commit)
        headers = {"ETag": f'"{blob.hash}"'} | ({} if cdn else {"X-Repo-Commit": self.commit})
        if cdn or not blob.large:
            return self.stream(blob.data, headers)
        home = f"{hub.cdn_url}{'/datasets' if self.kind == 'dataset' else ''}/{self.repo}"
        headers |= {"Location": f"{home}/resolve/{self.commit}/{quote(self.wanted)}", "ETag": f'"{blob.oid}"'}
        headers |= {"X-Linked-Etag": f'"{blob.hash}"', "X-Linked-Size": str(len(blob.data))}
        self.reply(302, b"", headers)

    def stream(self, data: bytes, headers: dict[str, str]) -> None:
        """Send the range asked for, with the faults that were ordered."""
        status, start, stop, middle = 200, 0, len(data), len(data) // 2
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or ""):
            status, start = 206, int(asked[1])
            stop = min(stop, int(asked[2] or stop) + 1)
            if start >= stop:
                return self.reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        headers |= {"Accept-Ranges": "bytes", "Content-Length": str(stop - start)}
        fault = self.repo, self.wanted
        if self.command == "GET" and fault in self.server.hub.shortened:
            return self.reply(200, data[:middle], headers | {"Content-Length": str(middle)})
        if fault in self.server.hub.corrupted and data:
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        breaks = self.server.hub.breaks.get(fault)
        if self.command == "GET" and stop > middle and breaks and breaks.acquire(blocking=False):
            stop, self.close_connection = middle, True
        self.reply(status, data[start:stop], headers)

    def reply_json(self, value: Any, status: int = 200, **headers: str) -> None:
        self.reply(status, json.dumps(value).encode(), headers | {"Content-Type": "application/json"})

    def reply(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        length, body = str(len(body)), b"" if self.command == "HEAD" else body
        seen = (self.command, self.path, self.headers["Range"], bool(self.token), status, len(body))
        self.server.hub.requests.append(Request(self.server.host, *seen))
        self.send_response(status)
        for name, value in {"Content-Length": length, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
