"""A Hugging Face Hub on this machine, with as much of its protocol as its own client needs to make, fill and fetch a model.

POST /api/repos/create                      {"name", "organization", "visibility"}
POST /api/validate-yaml                     a card's front matter
POST /api/models/ID/preupload/main          which files go by LFS: the safetensors
POST /ID.git/info/lfs/objects/batch         where to put them
PUT  /lfs/OID
POST /api/models/ID/commit/main             lines of JSON: header, files in base64, LFS files by their hash, deletions
GET  /api/models/ID/revision/main, /api/models/ID/tree/SHA, /ID/resolve/SHA/FILE; main for SHA, too
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import yaml

TOKEN, USER, SHA = "hf_of_the_tests", "me", "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Attributes: models: files by path, by a model's id; private: the ids that were made so."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.models: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments) -> None:
        """Silence."""

    def reply(self, status: int, body: dict | list | bytes = b"", **headers: str) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub, path = self.server, self.path.split("?")[0]
        if path == "/api/validate-yaml":
            front = json.loads(body)["content"].split("---")[1]
            valid = yaml.safe_load(front)["library_name"] == "metalm"
            return self.reply(200 if valid else 400, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            asked = json.loads(body)
            if (asked.get("organization") or USER) != USER:
                return self.reply(403, {"error": "You don't have the rights to create a model under this namespace"})
            name = f"{USER}/{asked['name']}"
            there = name in hub.models
            hub.models.setdefault(name, {})
            hub.private |= {name} if asked.get("visibility") == "private" else set()
            return self.reply(409 if there else 200, {"url": f"{hub.url}/{name}", "id": name, "name": name})
        if path.endswith("/info/lfs/objects/batch"):
            actions = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.reply(200, {"transfer": "basic", "objects": actions})
        name, _, verb = path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        if verb == "preupload":
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]
            return self.reply(200, {"files": [mode | {"shouldIgnore": False} for mode in modes]})
        if verb == "commit":
            for row in map(json.loads, body.splitlines()):
                value = row["value"]
                if row["key"] == "file":
                    hub.models[name][value["path"]] = base64.b64decode(value["content"])
                if row["key"] == "lfsFile":
                    hub.models[name][value["path"]] = hub.objects[value["oid"]]
                if row["key"] == "deletedFile":
                    del hub.models[name][value["path"]]
            url = f"{hub.url}/{name}/commit/{SHA}"
            return self.reply(200, {"success": True, "commitUrl": url, "commitOid": SHA, "hookOutput": ""})
        return self.reply(404)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.removeprefix("/lfs/")
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self.reply(200)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        for name, files in self.server.models.items():
            blobs = {p: hashlib.sha1(content).hexdigest() for p, content in files.items()}
            if path == f"/api/models/{name}/revision/main":
                siblings = [{"rfilename": p} for p in files]
                return self.reply(200, {"_id": "1", "id": name, "sha": SHA, "siblings": siblings, "tags": [], "private": False})
            if path in (f"/api/models/{name}/tree/{SHA}", f"/api/models/{name}/tree/main"):
                tree = [{"type": "file", "path": p, "size": len(content), "oid": blobs[p]} for p, content in files.items()]
                return self.reply(200, tree)
            file = path.replace("/resolve/main/", f"/resolve/{SHA}/").removeprefix(f"/{name}/resolve/{SHA}/")
            if file in files:
                return self.reply(200, files[file], ETag=f'"{blobs[file]}"', X_Repo_Commit=SHA)
        return self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
