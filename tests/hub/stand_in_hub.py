"""A Hub in this process: as much of its HTTP interface as pushing a model and loading it again takes.

The real client of huggingface_hub talks to it over HTTP; what it was sent is kept in memory, one snapshot a commit.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"
LARGE = 100_000
"""Bytes from which the stand-in wants a file as a large one; the Hub decides by its own rules."""


class StandInHub:
    """
    A server on a free port of this machine.

    Attributes:
        url: its address, for HF_ENDPOINT.
        repos: repository -> {commit: {path: content}}, the newest commit last.
        private: the repositories that were created as private.
        uploads: the sizes of the large files that were sent, in order.
        failing_uploads: how many uploads of large files fail from now on; to interrupt a push.
    """

    def __init__(self):
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.uploads: list[int] = []
        self.failing_uploads = 0
        hub = self

        class Handler(_Handler):
            stand_in = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def head(self, repo: str) -> str | None:
        return next(reversed(self.repos[repo]), None)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The content of a repository at a commit or at its newest one."""
        commit = self.head(repo) if revision == "main" else revision
        return self.repos[repo].get(commit, {}) if commit else {}

    def commit(self, repo: str, changes: dict[str, bytes]) -> str:
        name = hashlib.sha1(f"{repo}{len(self.repos[repo])}".encode()).hexdigest()
        self.repos[repo][name] = self.files(repo) | changes
        return name


class _Handler(BaseHTTPRequestHandler):
    stand_in: StandInHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            content = json.loads(body)["content"]
            is_valid = content.startswith("---\n") and "\n- unheard-of\n" not in content
            errors = [] if is_valid else [{"message": '"language" must be one of the known ones'}]
            return self._send({"errors": errors, "warnings": []}, 200 if is_valid else 400)
        if match := re.fullmatch(r"/api/models/(.+)/preupload/(.+)", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
                    "shouldIgnore": False,
                    "oid": self._oid(match[1], file["path"]),
                }
                for file in json.loads(body)["files"]
            ]
            return self._send({"files": files})
        if re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = [self._large_file(wanted) for wanted in json.loads(body)["objects"]]
            return self._send({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            lines = [json.loads(line) for line in body.splitlines()]
            return self._commit(match[1], lines)
        return self._send({"error": f"The stand-in has no POST {path}."}, 404)

    def _create(self, wanted):
        hub = self.stand_in
        repo = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        if repo in hub.repos:
            return self._send({"error": "You already created this model repo", "url": f"{hub.url}/{repo}"}, 409)
        hub.repos[repo] = {}
        if wanted.get("private") or wanted.get("visibility") == "private":
            hub.private.add(repo)
        return self._send({"url": f"{hub.url}/{repo}", "name": repo})

    def _oid(self, repo, path):
        content = self.stand_in.files(repo).get(path)
        if content is None:
            return None
        if len(content) >= LARGE:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def _large_file(self, wanted):
        known = wanted["oid"] in self.stand_in.blobs
        actions = {} if known else {"actions": {"upload": {"href": f"{self.stand_in.url}/upload/{wanted['oid']}"}}}
        return {"oid": wanted["oid"], "size": wanted["size"], **actions}

    def _commit(self, repo, lines):
        changes = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = self.stand_in.blobs[value["oid"]]
        name = self.stand_in.commit(repo, changes)
        return self._send({"commitUrl": f"{self.stand_in.url}/{repo}/commit/{name}", "commitOid": name})

    def do_PUT(self):
        hub = self.stand_in
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if hub.failing_uploads:
            hub.failing_uploads -= 1
            return self._send({"error": "The stand-in lost this one."}, 400)
        hub.blobs[hashlib.sha256(content).hexdigest()] = content
        hub.uploads.append(len(content))
        return self._send({})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.stand_in, unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._describe(match[1], match[2] or "main")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", path):
            return self._list(match[1], match[2], match[3] or "")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, revision, name = match.groups()
            content = hub.files(repo, revision).get(name) if repo in hub.repos else None
            if content is None:
                missing = "EntryNotFound" if repo in hub.repos else "RepoNotFound"
                return self._send({"error": f"{name} is not in {repo}"}, 404, {"X-Error-Code": missing})
            commit = hub.head(repo) if revision == "main" else revision
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self._send(content, 200, {"ETag": etag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"})
        return self._send({"error": f"The stand-in has no GET {path}."}, 404)

    def _describe(self, repo, revision):
        hub = self.stand_in
        if repo not in hub.repos:
            return self._send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        commit = hub.head(repo) if revision == "main" else revision
        siblings = [{"rfilename": name} for name in hub.files(repo, revision)]
        return self._send({"id": repo, "sha": commit, "siblings": siblings, "private": repo in hub.private, "tags": []})

    def _list(self, repo, revision, folder):
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for name, content in self.stand_in.files(repo, revision).items():
            if name.startswith(prefix):
                inside, is_folder, _ = name[len(prefix) :].partition("/")
                kind = "directory" if is_folder else "file"
                entries[prefix + inside] = {
                    "type": kind,
                    "path": prefix + inside,
                    "size": len(content),
                    "oid": "0" * 40,
                }
        return self._send(list(entries.values()))

    def _send(self, content, status=200, headers=None):
        is_json = not isinstance(content, bytes)
        body = json.dumps(content).encode() if is_json else content
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json" if is_json else "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
