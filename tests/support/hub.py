"""A Hub on loopback, as much of it as huggingface_hub's calls need to read and to upload.

It stores what is uploaded, large files in parts, as the Hub does where Xet is off.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "c0ffee" + "0" * 34
TOKEN, READER = "hf_of_user", "hf_that_reads"


@contextmanager
def serving(
    repos: dict[str, Path],
    new: Path | None = None,
    drops: Callable[[str], bool] = lambda _: False,
    part: int = 100_000,
):
    """Serve folders under repo ids; gives (endpoint, [(method, path, bytes sent)]). Commits and new
    repos are in the log, too, as ("COMMIT", branch and message, 0), ("NEW", name and visibility, 0).

    `new` is where the repos that `user` creates are put. Large files come in parts of `part` bytes;
    an upload to a path that `drops` is cut in the middle.
    """
    log: list[tuple[str, str, int]] = []
    stored: dict[str, bytes] = {}
    parts: dict[tuple[str, int], bytes] = {}
    private: set[str] = set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.handle_any(body=False)

        def do_GET(self):
            self.handle_any(body=True)

        def do_PUT(self):
            path = urlsplit(self.path).path
            size = int(self.headers["Content-Length"])
            if drops(path):
                self.rfile.read(size // 2)
                log.append(("DROPPED", path, 0))
                self.close_connection = True
                return self.connection.close()
            _, _, oid, number = path.split("/")
            parts[oid, int(number)] = self.rfile.read(size)
            return self.answer(200, b"", True, {"ETag": f'"{number}"'})

        def do_POST(self):
            path = urlsplit(self.path).path
            sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}" and "/lfs/" not in path:
                return self.answer(401, b'{"error": "Invalid credentials"}', True)
            for pattern, act in (
                ("/api/repos/create", self.create),
                ("/api/validate-yaml", lambda _: self.reply({"errors": [], "warnings": []})),
                (r"/api/models/(.+?)/branch/.+", lambda _, repo: self.reply({})),
                (r"/api/models/(.+?)/preupload/.+", self.preupload),
                (r"/api/models/(.+?)/commit/(.+)", self.commit),
                (r"/(.+?)\.git/info/lfs/objects/batch", self.batch),
                (r"/lfs/([0-9a-f]+)/complete", self.complete),
            ):
                if found := re.fullmatch(pattern, path):
                    return act(sent, *found.groups())
            return self.answer(404, b"{}", True)

        def reply(self, value, status=200, headers=None):
            return self.answer(status, json.dumps(value).encode(), True, headers)

        def create(self, sent):
            asked = json.loads(sent)
            repo = f"{asked.get('organization') or 'user'}/{asked['name']}"
            if not repo.startswith("user/"):
                return self.reply({"error": "You don't have the rights"}, 403)
            url = f"http://{self.headers['Host']}/{repo}"
            if repo in repos:
                return self.reply({"error": "You already created this model repo", "url": url}, 409)
            repos[repo] = new / asked["name"]
            repos[repo].mkdir()
            if asked.get("private") or asked.get("visibility") == "private":
                private.add(repo)
            log.append(("NEW", f"{repo} {'private' if repo in private else 'public'}", 0))
            return self.reply({"url": url})

        def preupload(self, sent, repo):
            if not repo.startswith("user/"):
                return self.reply({"error": "Forbidden"}, 403)
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(sent)["files"]
            ]
            return self.reply({"files": modes})

        def batch(self, sent, repo):
            base = f"http://{self.headers['Host']}/lfs"
            objects = []
            for asked in json.loads(sent)["objects"]:
                entry = dict(asked)
                if (oid := asked["oid"]) not in stored:
                    count = -(-asked["size"] // part)
                    urls = {f"{i + 1:05}": f"{base}/{oid}/{i}" for i in range(count)}
                    header = {"chunk_size": str(part), **urls}
                    upload = {"href": f"{base}/{oid}/complete", "header": header}
                    entry["actions"] = {"upload": upload}
                objects.append(entry)
            return self.reply({"transfer": "multipart", "objects": objects})

        def complete(self, sent, oid):
            count = len(json.loads(sent)["parts"])
            data = b"".join(parts[oid, i] for i in range(count))
            if hashlib.sha256(data).hexdigest() != oid:
                return self.reply({"error": "wrong hash"}, 400)
            stored[oid] = data
            return self.reply({})

        def commit(self, sent, repo, branch):
            lines = [json.loads(line) for line in sent.splitlines()]
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    log.append(("COMMIT", f"{branch}: {value['summary']}", 0))
                elif line["key"] == "file":
                    (repos[repo] / value["path"]).write_bytes(base64.b64decode(value["content"]))
                elif line["key"] == "lfsFile":
                    (repos[repo] / value["path"]).write_bytes(stored[value["oid"]])
                elif line["key"] == "deletedFile":
                    (repos[repo] / value["path"]).unlink()
            url = f"http://{self.headers['Host']}/{repo}/commit/{COMMIT}"
            return self.reply({"success": True, "commitOid": COMMIT, "commitUrl": url})

        def handle_any(self, body):
            path = urlsplit(self.path).path
            if path == "/api/whoami-v2":
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                if token not in (TOKEN, READER):
                    return self.answer(401, b'{"error": "Invalid credentials"}', body)
                role = "write" if token == TOKEN else "read"
                auth = {"type": "access_token", "accessToken": {"role": role}}
                me = {"type": "user", "name": "user", "orgs": [{"name": "org"}], "auth": auth}
                return self.answer(200, json.dumps(me).encode(), body)
            api = re.fullmatch(
                r"/api/(?:models|datasets)/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+)/?(.*))?", path
            )
            file = re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            repo = (api or file) and (api or file).group(1)
            if repo not in repos:
                return self.answer(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
            if api:
                tree = api.group(2) == "tree"
                value = self.tree(repos[repo]) if tree else self.info(repo, repos[repo])
                return self.answer(200, json.dumps(value).encode(), body)
            return self.send_file(repos[repo] / file.group(3), body)

        def info(self, repo, folder):
            siblings = [self.sibling(path) for path in sorted(folder.iterdir()) if path.is_file()]
            about = {"sha": COMMIT, "siblings": siblings, "tags": [], "private": repo in private}
            return {"id": repo, "modelId": repo, **about}

        def sibling(self, path):
            size, sha = path.stat().st_size, sha256(path)
            entry = {"rfilename": path.name, "size": size, "blobId": sha[:40]}
            if path.suffix == ".safetensors":
                entry["lfs"] = {"sha256": sha, "size": size, "pointerSize": 135}
            return entry

        def tree(self, folder):
            entries = []
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    size, sha = path.stat().st_size, sha256(path)
                    name = path.relative_to(folder).as_posix()
                    entry = {"type": "file", "path": name, "size": size, "oid": sha[:40]}
                    if path.suffix == ".safetensors":
                        entry["lfs"] = {"oid": sha, "size": size, "pointerSize": 1}
                    entries.append(entry)
            return entries

        def send_file(self, path, body):
            if not path.is_file():
                return self.answer(404, b"", body, {"X-Error-Code": "EntryNotFound"})
            data = path.read_bytes()
            headers = {
                "X-Repo-Commit": COMMIT,
                "ETag": f'"{sha256(path)}"',
                "Accept-Ranges": "bytes",
            }
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if wanted is None:
                return self.answer(200, data, body, headers)
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self.answer(206, data[first : last + 1], body, headers)

        def answer(self, status, data, body, headers=None):
            log.append((self.command, self.path, len(data) if body else 0))
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def hub_environment(endpoint: str, folder: Path) -> dict[str, str]:
    """The variables by which a process reads from `endpoint`, with a cache in `folder`."""
    return {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
