"""A Hub on loopback, as much of it as huggingface_hub's read calls need."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "c0ffee" + "0" * 34


@contextmanager
def serving(repos: dict[str, Path]):
    """Serve folders under repo ids; gives (endpoint, [(method, path, bytes sent)])."""
    log: list[tuple[str, str, int]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.handle_any(body=False)

        def do_GET(self):
            self.handle_any(body=True)

        def handle_any(self, body):
            path = urlsplit(self.path).path
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+)/?)?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            repo = (api or file) and (api or file).group(1)
            if repo not in repos:
                return self.answer(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
            if api:
                tree = api.group(2) == "tree"
                value = self.tree(repos[repo]) if tree else self.info(repo, repos[repo])
                return self.answer(200, json.dumps(value).encode(), body)
            return self.send_file(repos[repo] / file.group(3), body)

        def info(self, repo, folder):
            siblings = [self.sibling(path) for path in sorted(folder.iterdir())]
            return {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": []}

        def sibling(self, path):
            size, sha = path.stat().st_size, sha256(path)
            entry = {"rfilename": path.name, "size": size, "blobId": sha[:40]}
            if path.suffix == ".safetensors":
                entry["lfs"] = {"sha256": sha, "size": size, "pointerSize": 135}
            return entry

        def tree(self, folder):
            return [
                {
                    "type": "file",
                    "path": path.name,
                    "size": path.stat().st_size,
                    "oid": sha256(path)[:40],
                    **(
                        {
                            "lfs": {
                                "oid": sha256(path),
                                "size": path.stat().st_size,
                                "pointerSize": 1,
                            }
                        }
                        if path.suffix == ".safetensors"
                        else {}
                    ),
                }
                for path in sorted(folder.iterdir())
            ]

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


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
