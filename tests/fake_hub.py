"""A stand-in for the Hugging Face Hub on this machine, which its real client speaks to."""

import base64
import hashlib
import json
import re
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub import constants


class FakeHub(ThreadingHTTPServer):
    """Repositories in memory, behind those endpoints of the Hub that the client asks."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories = {}
        self.asked = []
        self.status = None

    def handle_error(self, request, client_address):
        """A client that hangs up is none of the tests' business."""

    def put(self, repo_id, files, **settings):
        repo = self.repositories.setdefault(repo_id, {"commits": [], "files": {}, "pulls": [], **settings})
        repo["files"] |= {name: Path(file).read_bytes() for name, file in files.items()}
        return self.commit(repo, "put")

    def commit(self, repo, summary):
        sha = hashlib.sha1(repr((summary, sorted(repo["files"].items()))).encode()).hexdigest()
        repo["commits"].append((sha, summary, dict(repo["files"])))
        return sha

    def files(self, repo_id):
        return self.repositories[repo_id]["files"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer("HEAD")

    def do_GET(self):
        self.answer("GET")

    def do_POST(self):
        self.answer("POST")

    def answer(self, verb):
        hub, url = self.server, urlsplit(self.path)
        path = unquote(url.path)
        hub.asked.append(f"{verb} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self.chunks()
        self.user = {"Bearer hf_writer": "write", "Bearer hf_reader": "read"}.get(self.headers.get("authorization"))
        if hub.status:
            return self.refuse(hub.status, "Out of order")
        if path == "/api/whoami-v2":
            role = {"auth": {"accessToken": {"role": self.user}}}
            return self.json({"name": "ada", **role}) if self.user else self.refuse(401)
        if path == "/api/validate-yaml":
            header = json.loads(self.body)["content"].split("---")[1]
            wrong = yaml.safe_load(header).get("license") == "nonsense"
            return self.json(
                {"errors": [{"message": "no such license"}]} if wrong else {"errors": []}, 400 * wrong or 200
            )
        if path == "/api/repos/create":
            return self.create(json.loads(self.body))
        found = re.fullmatch(r"/(api/models/)?([\w.-]+/[\w.-]+)(?:/(\w+)(?:/([^/]+)(?:/(.+))?)?)?", path)
        repo = hub.repositories.get(found[2])
        if repo is None or (repo.get("private") and not self.user):
            return self.refuse(404 if self.user else 401, code="RepoNotFound")
        self.repository(repo, *found.groups(), parse_qs(url.query))

    def repository(self, repo, api, repo_id, what, revision, name, query):
        if what in ("preupload", "commit") and self.user != "write":
            return self.refuse(403, "no write access")
        if what == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in self.posted()["files"]
            ]
            return self.json({"files": files})
        if what == "commit":
            return self.take(repo, repo_id, "create_pr" in query)
        commits = [commit for commit in repo["commits"] if revision in (None, "main", commit[0])]
        if not commits:
            return self.refuse(404, code="RevisionNotFound")
        sha, _, files = commits[-1]
        if what == "tree":
            rows = [{"type": "file", "path": n, "size": len(b), "oid": self.oid(b)} for n, b in files.items()]
            return self.json(rows)
        if api:
            return self.json({"id": repo_id, "sha": sha, "siblings": [{"rfilename": file} for file in files]})
        if repo.get("gated") and not self.user:
            return self.refuse(403, code="GatedRepo")
        if name not in files:
            return self.refuse(404, code="EntryNotFound", sha=sha)
        self.send(200, files[name], {"ETag": f'"{self.oid(files[name])}"', "X-Repo-Commit": sha})

    def create(self, asked):
        owner = asked["organization"] or "ada"
        repo_id = f"{owner}/{asked['name']}"
        if self.user != "write" or owner != "ada":
            return self.refuse(403 if self.user else 401, "no write access to this namespace")
        if repo_id in self.server.repositories:
            return self.json({"url": f"{self.server.url}/{repo_id}"}, 409)
        repo = {"commits": [], "files": {}, "pulls": [], "private": asked.get("visibility") == "private"}
        self.server.repositories[repo_id] = repo
        self.server.commit(repo, "initial commit")
        self.json({"url": f"{self.server.url}/{repo_id}"})

    def take(self, repo, repo_id, pull):
        lines = [json.loads(line) for line in self.body.splitlines()]
        summary = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        at = f"{self.server.url}/{repo_id}"
        if pull:
            repo["pulls"].append(files)
            return self.json({"commitUrl": f"{at}/commit/0", "commitOid": "0", "pullRequestUrl": f"{at}/discussions/1"})
        repo["files"] |= files
        sha = self.server.commit(repo, summary)
        self.json({"commitUrl": f"{at}/commit/{sha}", "commitOid": sha})

    def posted(self):
        return json.loads(self.body)

    def chunks(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    @staticmethod
    def oid(content):
        return hashlib.sha1(content).hexdigest()

    def json(self, value, status=200):
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status, message="", code="", sha=""):
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": sha}
        self.send(status, b"{}", {key: value for key, value in headers.items() if value})

    def send(self, status, content, headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def point_client_at(monkeypatch, url):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@contextmanager
def running_hub(monkeypatch, cache):
    """The stand-in, with the client pointed at it, logged out and unable to look up any other host."""
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    point_client_at(monkeypatch, server.url)
    for name, value in {"HF_HUB_CACHE": "cache", "HF_TOKEN_PATH": "token", "HF_STORED_TOKENS_PATH": "tokens"}.items():
        monkeypatch.setattr(constants, name, str(cache / value))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    look_up = socket.getaddrinfo

    def only_here(host, *rest, **more):
        assert host in ("127.0.0.1", b"127.0.0.1"), f"asked for {host}"
        return look_up(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", only_here)
    yield server
    server.shutdown()
    server.server_close()


def card_of(readme):
    """The metadata and the text of a model card."""
    _, header, text = str(readme).split("---\n", 2)
    return yaml.safe_load(header), text
