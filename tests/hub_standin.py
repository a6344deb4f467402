"""A stand-in for the Hub's API that the real `huggingface_hub` client talks to, over HTTP and on loopback.

    with HubStandin() as hub:
        hub.script["commit"] = [500, None]  # fails once, then works
        ...
        hub.files["user/model"]["main"]["README.md"]

It speaks the LFS protocol and not Xet: set HF_HUB_DISABLE_XET. Actions of a script, by kind of request (`create`, `branch`,
`validate`, `preupload`, `batch`, `put`, `commit`): None answers, a status refuses, "close" ends the connection without an
answer in the middle of the request. The last one of a list stays.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


USER = "user"
TOKEN = "hf_good"
READ_TOKEN = "hf_read"
REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = (
    ("create", "POST", r"/api/repos/create"),
    ("validate", "POST", r"/api/validate-yaml"),
    ("preupload", "POST", rf"/api/models/{REPO}/preupload/(?P<revision>.+)"),
    ("branch", "POST", rf"/api/models/{REPO}/branch/(?P<revision>.+)"),
    ("commit", "POST", rf"/api/models/{REPO}/commit/(?P<revision>.+)"),
    ("batch", "POST", rf"/{REPO}\.git/info/lfs/objects/batch"),
    ("put", "PUT", r"/lfs/(?P<oid>[0-9a-f]{64})"),
    ("info", "GET", rf"/api/models/{REPO}(/revision/(?P<revision>.+))?"),
)


class HubStandin:
    """See the module.

    Attributes:
        files (`dict[str, dict[str, dict[str, bytes]]]`):
            Repository -> revision -> path -> content.
        commits (`list[tuple[str, str, str]]`):
            Repository, revision and message of each, in order.
        private (`dict[str, bool]`):
            Repository -> whether it was made private.
        requests (`list[str]`):
            Kind of every request.
        script (`dict[str, list]`):
            What fails.
        on_commit (`Callable[[], None]`, *optional*):
            Called before a commit is answered.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, dict[str, bytes]]] = {}
        self.commits: list[tuple[str, str, str]] = []
        self.private: dict[str, bool] = {}
        self.requests: list[str] = []
        self.script: dict[str, list[Any]] = {}
        self.on_commit: Any = None
        self.blobs: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubStandin:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def action(self, kind: str) -> Any:
        self.requests.append(kind)
        actions = self.script.get(kind, [None])
        return actions.pop(0) if len(actions) > 1 else actions[0]

    # What the routes do: a status and what is answered

    def create(self, body: Any) -> tuple[int, Any]:
        repo = f"{body.get('organization') or USER}/{body['name']}"
        is_new = repo not in self.files
        if is_new:
            self.files[repo] = {"main": {}}
            self.private[repo] = body.get("visibility") == "private"
        return 200 if is_new else 409, {"url": f"{self.url}/{repo}"}

    def branch(self, body: Any, repo: str, revision: str) -> tuple[int, Any]:
        self.files[repo].setdefault(revision, dict(self.files[repo]["main"]))
        return 200, {}

    def validate(self, body: Any) -> tuple[int, Any]:
        metadata = yaml.safe_load(body["content"].split("---")[1])
        base = metadata.get("base_model")
        is_valid = base is None or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base)
        errors = [] if is_valid else [{"message": f'"base_model" with value "{base}" is not valid.'}]
        return 400 if errors else 200, {"errors": errors, "warnings": []}

    def preupload(self, body: Any, repo: str, revision: str) -> tuple[int, Any]:
        if revision not in self.files.get(repo, {}):
            return 404, {"error": "Invalid rev id"}
        is_lfs = re.compile(r"\.(safetensors|bin|pt|png)$")
        modes = {
            file["path"]: "lfs" if is_lfs.search(file["path"]) or file["size"] > 2**20 else "regular"
            for file in body["files"]
        }
        return 200, {
            "files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        }

    def batch(self, body: Any, repo: str) -> tuple[int, Any]:
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in body["objects"]]
        for wanted in objects:
            if wanted["oid"] not in self.blobs:
                wanted["actions"] = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}
        return 200, {"transfer": "basic", "objects": objects}

    def put(self, body: bytes, oid: str) -> tuple[int, Any]:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "not what was announced"}
        self.blobs[oid] = body
        return 200, {}

    def commit(self, body: list[Any], repo: str, revision: str) -> tuple[int, Any]:
        if self.on_commit is not None:
            self.on_commit()
        tree = self.files[repo][revision]
        message = ""
        for line in body:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.blobs[value["oid"]]
        self.commits.append((repo, revision, message))
        oid = f"{len(self.commits):040x}"
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid, "hookOutput": ""}

    def info(self, body: Any, repo: str, revision: str | None) -> tuple[int, Any]:
        if repo not in self.files:
            return 404, {"error": "Repository not found"}
        return 200, {"id": repo, "sha": "0" * 40, "siblings": []}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubStandin

    def do_GET(self) -> None:
        self.respond()

    def do_POST(self) -> None:
        self.respond()

    def do_PUT(self) -> None:
        self.respond()

    def respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        found = [
            (kind, match.groupdict())
            for kind, method, pattern in ROUTES
            if method == self.command and (match := re.fullmatch(pattern, path))
        ]
        if not found:
            self.answer(404, {"error": f"the stand-in has no {self.command} {path}"})
            return
        kind, names = found[0]
        action = self.hub.action(kind)
        if action == "close":
            self.rfile.read(16)
            self.close_connection = True
            self.connection.close()
            return
        body = self.read_body(kind)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if kind not in ("put", "info") and token not in (TOKEN, READ_TOKEN):
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
        elif kind == "create" and token == READ_TOKEN:
            self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        elif isinstance(action, int):
            self.answer(action, {"error": f"scripted {action}"})
        else:
            self.answer(*getattr(self.hub, kind)(body, **names))

    def read_body(self, kind: str) -> Any:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if kind == "put":
            return body
        lines = [json.loads(line) for line in body.splitlines() if line]
        return lines if kind == "commit" else lines[0] if lines else None

    def answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if "error" in content:
            self.send_header("X-Error-Message", content["error"])
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""
