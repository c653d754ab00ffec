"""A small Hugging Face Hub on loopback: what `huggingface_hub` needs to push and load, with faults on demand."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_OnlyKnownToTheHubOnLoopback"
USER = "me"


@dataclass
class Request:
    """One request as it came in; of a connection that was cut, `body` is the first half."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Commit:
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """A history of immutable commits by sha, and names ("main", "refs/pr/1") for some of them."""

    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, message: str, files: dict[str, bytes], ref: str = "main") -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha] = Commit(message, files)
        self.refs[ref] = sha
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs.get(revision, revision)].files


@dataclass
class Fault:
    pattern: str
    after: int
    times: float
    status: int | None
    code: str


class HubError(Exception):
    """An answer other than 2xx; `code` is what the client tells a missing repository, revision and file apart by."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status = status
        self.code = code


def output(process: subprocess.CompletedProcess) -> str:
    """What a process printed, given that it ended well."""
    assert process.returncode == 0, process.stderr
    return process.stdout


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_lfs(content: bytes) -> bool:
    """Whether the Hub keeps a file outside git: as git tells binary from text, by a zero byte near the beginning."""
    return b"\0" in content[:512]


def oid(content: bytes) -> str:
    """What names a file's content: SHA-256 outside git, git's own hash of a blob inside."""
    if is_lfs(content):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def describe(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": oid(content)}
    if is_lfs(content):
        entry["lfs"] = {"oid": oid(content), "sha256": oid(content), "size": len(content), "pointerSize": 130}
    return entry


def tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
    """The files and folders below `folder`, all of them or its direct children only."""
    entries = {}
    for path, content in files.items():
        parents = [str(parent) for parent in Path(path).parents][:-1]
        for parent in parents:
            entries[parent] = {"type": "directory", "path": parent, "size": 0, "oid": oid(parent.encode())}
        entries[path] = describe(path, content)
    inside = [entry for path, entry in entries.items() if not folder or path.startswith(f"{folder}/")]
    if not inside and folder:
        raise HubError(404, f"no folder {folder}", "EntryNotFound")
    return [e for e in inside if recursive or "/" not in e["path"].removeprefix(f"{folder}/" if folder else "")]


@dataclass
class Route:
    methods: list[str]
    pattern: re.Pattern
    writes: bool
    function: Callable


ROUTES: list[Route] = []


def route(methods: str, pattern: str, writes: bool = False):
    """Register an endpoint. `{repo}` and `{revision}` in `pattern` match those; what `writes` asks for the token."""
    pattern = pattern.replace("{repo}", r"(?P<kind>models|datasets)/(?P<repo_id>[^/]+/[^/]+)")
    pattern = pattern.replace("{revision}", r"(?P<revision>[^/]+)")

    def register(function):
        ROUTES.append(Route(methods.split(), re.compile(pattern), writes, function))
        return function

    return register


class HubServer:
    """The Hub, served while the `with` block runs.

    `repos["models" | "datasets"][repo_id]` holds what was pushed, `requests` every request in order.

    Args:
        folder (`Path`): Where `run` keeps a fresh `HF_HOME` for each process.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.repos: dict[str, dict[str, Repo]] = {"models": {}, "datasets": {}}
        self.requests: list[Request] = []
        self._objects: dict[str, bytes] = {}  # what lies outside git, by SHA-256
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._runs = 0

    def __enter__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()

    def run(self, command: str | list[str], **environment: str) -> subprocess.CompletedProcess:
        """Run Python code, or a command line, in a fresh process whose Hub this is and whose caches are empty.

        Args:
            command (`str` or `list[str]`): Python code, or an `argv`.
            environment: Variables to set besides, for instance `HF_TOKEN="wrong"`.
        """
        self._runs += 1
        ours = re.compile("HF_.*|TRANSFORMERS_.*|.*_proxy", re.IGNORECASE)
        inherited = {name: value for name, value in os.environ.items() if not ours.fullmatch(name)}
        client = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.folder / f"home-{self._runs}"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        argv = [sys.executable, "-c", command] if isinstance(command, str) else command
        return subprocess.run(argv, env=inherited | client | environment, capture_output=True, text=True)

    def add(self, kind: str, repo_id: str, files: dict[str, bytes]) -> str:
        """Put a repository there without a client's push; returns the sha of its one commit."""
        self.repos[kind][repo_id] = Repo()
        self._objects |= {oid(content): content for content in files.values() if is_lfs(content)}
        return self.repos[kind][repo_id].commit("initial commit", files)

    def fail(
        self, pattern: str, after: int = 0, times: float = float("inf"), status: int | None = None, code: str = ""
    ):
        """Make requests fail from now on.

        Args:
            pattern (`str`): Which ones: a regular expression, searched for in "METHOD /path".
            after (`int`): How many of these still pass.
            times (`float`): How many fail before all pass again.
            status (`int`, *optional*):
                What they are answered; by default the connection is cut half way through the body.
            code (`str`): What tells the client more than the status does: "GatedRepo".
        """
        self._faults.append(Fault(pattern, after, times, status, code))

    def next_fault(self, request: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if not re.search(fault.pattern, request) or not fault.times:
                    continue
                if not fault.after:
                    fault.times -= 1
                    return fault
                fault.after -= 1
        return None

    def answer(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a request."""
        url = urlsplit(request.path)
        fitting = [entry for entry in ROUTES if request.method in entry.methods and entry.pattern.fullmatch(url.path)]
        if not fitting:
            raise HubError(501, f"This Hub does not know {request.method} {request.path}")
        entry = fitting[0]
        if entry.writes and request.headers.get("authorization") != f"Bearer {TOKEN}":
            raise HubError(401, "Invalid credentials in Authorization header")
        groups = entry.pattern.fullmatch(url.path).groupdict()
        arguments = {name: value and unquote(value) for name, value in groups.items()}
        with self._lock:
            result = entry.function(self, request, **arguments)
        if isinstance(result, tuple):
            return result
        return 200, {"Content-Type": "application/json"}, json.dumps(result).encode()

    def find(self, kind: str, repo_id: str, revision: str = "main") -> tuple[Repo, str]:
        """A repository and the sha that `revision` stands for."""
        repo = self.repos[kind].get(repo_id)
        if repo is None:
            raise HubError(404, f"no repository {repo_id}", "RepoNotFound")
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            raise HubError(404, f"no revision {revision}", "RevisionNotFound")
        return repo, sha

    # Accounts and repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self, request):
        return {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}}

    @route("POST", "/api/repos/create", writes=True)
    def create(self, request):
        asked = json.loads(request.body)
        kind = f"{asked.get('type', 'model')}s"
        repo_id = f"{asked['organization'] or USER}/{asked['name']}"
        url = f"{self.endpoint}/{'' if kind == 'models' else f'{kind}/'}{repo_id}"
        if repo_id in self.repos[kind]:
            return 409, {"Content-Type": "application/json"}, json.dumps({"url": url}).encode()
        self.add(kind, repo_id, {})
        self.repos[kind][repo_id].private = asked.get("private") or asked.get("visibility") == "private"
        return {"url": url}

    @route("GET", "/api/{repo}(/revision/{revision})?")
    def info(self, request, kind, repo_id, revision):
        repo, sha = self.find(kind, repo_id, revision or "main")
        files = [describe(path, content) for path, content in repo.files(sha).items()]
        siblings = [entry | {"rfilename": entry["path"], "blobId": entry["oid"]} for entry in files]
        return {"id": repo_id, "sha": sha, "private": repo.private, "gated": False, "tags": [], "siblings": siblings}

    @route("GET", "/api/{repo}/auth-check/write", writes=True)
    def auth_check(self, request, kind, repo_id):
        self.find(kind, repo_id)
        return {}

    # Pushing

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request):
        return {"errors": [], "warnings": []}

    @route("POST", "/api/{repo}/preupload/{revision}", writes=True)
    def preupload(self, request, kind, repo_id, revision):
        repo, sha = self.find(kind, repo_id, revision)
        files = []
        for file in json.loads(request.body)["files"]:
            mode = "lfs" if is_lfs(base64.b64decode(file["sample"])) else "regular"
            there = repo.files(sha).get(file["path"])
            known = None if there is None else oid(there)
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known})
        return {"files": files}

    @route("POST", r"/(datasets/)?[^/]+/[^/]+\.git/info/lfs/objects/batch", writes=True)
    def batch(self, request):
        objects = []
        for file in json.loads(request.body)["objects"]:
            upload = {"href": f"{self.endpoint}/lfs/{file['oid']}"}
            verify = {"href": f"{self.endpoint}/lfs/{file['oid']}/verify"}
            actions = {} if file["oid"] in self._objects else {"actions": {"upload": upload, "verify": verify}}
            objects.append(file | actions)
        return {"transfer": "basic", "objects": objects}

    # As on the Hub, the address that `batch` hands out is the permission: this request carries no token.
    @route("PUT", "/lfs/(?P<sha256>[0-9a-f]{64})")
    def put_object(self, request, sha256):
        if hashlib.sha256(request.body).hexdigest() != sha256:
            raise HubError(400, "the content does not have this SHA-256")
        self._objects[sha256] = request.body
        return {}

    @route("POST", "/lfs/(?P<sha256>[0-9a-f]{64})/verify", writes=True)
    def verify(self, request, sha256):
        if len(self._objects.get(sha256, b"")) != json.loads(request.body)["size"]:
            raise HubError(404, "no such object")
        return {}

    @route("POST", "/api/{repo}/commit/{revision}", writes=True)
    def commit(self, request, kind, repo_id, revision):
        repo, parent = self.find(kind, repo_id, revision)
        files, message = dict(repo.files(parent)), ""
        for line in request.body.splitlines():
            key, value = json.loads(line).values()
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit", parent) != parent:
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self._objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise HubError(501, f"This Hub does not know the commit operation {key}")
        is_pr = "create_pr=1" in urlsplit(request.path).query
        ref = f"refs/pr/{len(repo.refs)}" if is_pr else revision
        sha = repo.commit(message, files, ref)
        url = f"{self.endpoint}/{repo_id}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}"}
        return answer | ({"pullRequestUrl": f"{url}/discussions/{ref.removeprefix('refs/pr/')}"} if is_pr else {})

    # Loading

    @route("GET", "/api/{repo}/refs")
    def list_refs(self, request, kind, repo_id):
        repo, _ = self.find(kind, repo_id)
        refs = [{"name": name, "ref": name, "targetCommit": sha} for name, sha in repo.refs.items()]
        return {"branches": refs[:1], "converts": [], "tags": [], "pullRequests": refs[1:]}

    @route("GET", "/api/{repo}/tree/{revision}(/(?P<folder>.+))?")
    def list_tree(self, request, kind, repo_id, revision, folder):
        repo, sha = self.find(kind, repo_id, revision)
        recursive = parse_qs(urlsplit(request.path).query).get("recursive", [""])[0].lower() == "true"
        return tree(repo.files(sha), folder or "", recursive)

    @route("POST", "/api/{repo}/paths-info/{revision}")
    def paths_info(self, request, kind, repo_id, revision):
        repo, sha = self.find(kind, repo_id, revision)
        paths = parse_qs(request.body.decode())["paths"]
        return [entry for entry in tree(repo.files(sha), "", recursive=True) if entry["path"] in paths]

    @route("GET HEAD", "/(?P<prefix>datasets/)?(?P<repo_id>[^/]+/[^/]+)/resolve/{revision}/(?P<path>.+)")
    def resolve(self, request, prefix, repo_id, revision, path):
        repo, sha = self.find("datasets" if prefix else "models", repo_id, revision)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        content = repo.files(sha).get(path)
        if content is None:
            raise HubError(404, f"no file {path}", "EntryNotFound")
        headers["ETag"] = f'"{oid(content)}"'
        if is_lfs(content):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if not span:
            return 200, headers, content
        first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return 206, headers, content[first : last + 1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are two packets; held back, the second would wait 40 ms for the first's receipt.
    disable_nagle_algorithm = True

    def handle_request(self):
        hub = self.server.hub
        fault = hub.next_fault(f"{self.command} {self.path}")
        cut = fault is not None and fault.status is None
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size // 2 if cut else size)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, body)
        hub.requests.append(request)
        if cut:
            self.close_connection = True
            if self.command != "GET":
                return
        try:
            if fault and fault.status:
                raise HubError(fault.status, "a fault on demand", fault.code)
            status, headers, content = hub.answer(request)
        except HubError as error:
            headers = {"X-Error-Message": str(error), "X-Error-Code": error.code}
            status, content = error.status, json.dumps({"error": str(error)}).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815 (the names that http.server calls)

    def log_message(self, *args):
        """Quiet: the tests read `requests`."""
