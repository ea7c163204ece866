"""Runs `DatasetTasks` against a server with the data set ``acme/math``, whose files are in a directory.

``python hub_server.py FOLDER`` prints what happened with and without access, as JSON.
"""

import hashlib
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """Answers the requests that `datasets` and `huggingface_hub` send for one data set."""

    files: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, body: bytes, status: int = 200, **headers: str):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def entry(self, path: str) -> dict:
        if path in self.files:
            content = self.files[path]
            return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        return {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        parts = urlparse(self.path).path.strip("/").split("/")
        if parts[:4] == ["api", "datasets", "acme", "math"]:
            kind, below = (parts[4:5] or ["revision"])[0], "/".join(parts[6:])
            if kind == "revision":
                siblings = [{"rfilename": file} for file in self.files]
                self.answer(json.dumps({"_id": "1", "id": "acme/math", "sha": COMMIT, "siblings": siblings}).encode())
            elif kind == "tree":
                paths = set(self.files) | {str(Path(file).parent) for file in self.files} - {"."}
                found = [self.entry(path) for path in sorted(paths) if str(Path(path).parent) == (below or ".")]
                self.answer(json.dumps(found).encode())
            else:
                self.answer(json.dumps([self.entry(path) for path in parse_qs(body)["paths"]]).encode())
        elif parts[:4] == ["datasets", "acme", "math", "resolve"] and "/".join(parts[5:]) in self.files:
            content = self.files["/".join(parts[5:])]
            self.answer(content, X_Repo_Commit=COMMIT, ETag=f'"{hashlib.sha1(content).hexdigest()}"')
        else:
            code = "EntryNotFound" if "math" in parts else "RepoNotFound"
            self.answer(b"{}", 404, X_Error_Code=code, X_Error_Message="not found")

    do_HEAD = do_POST = do_GET


def main(folder: Path):
    Hub.files = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_address[1]}"

    from huggingface_hub import constants

    from gear_lightning.environments.dataset_stream import StreamedTasks
    from gear_lightning.environments.dataset_tasks import DatasetTasks
    from gear_lightning.errors import UserError

    def ids(count: int, kind=DatasetTasks, path="acme/math", **options) -> "list[str] | str":
        try:
            source = kind(path, name="main", columns={"prompt": "question", "answer": "answer"}, **options)
            return [source[i].id for i in range(count)]
        except UserError as error:
            return str(error).split(" (")[0]

    found = {
        "train": ids(3),
        "stream": ids(4, StreamedTasks, buffer=1),
        "no split": ids(1, split="val"),
        "no name": ids(1, path="acme/other").replace("acme/other", "acme/math"),
    }
    server.shutdown()
    server.server_close()
    constants.HF_HUB_OFFLINE = True
    print(json.dumps(found | {"offline": ids(3)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
