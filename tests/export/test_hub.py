"""``export --push``: a one-line error for each missing requirement, no partial results, else one commit."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants as constants
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import data, generation, module, trainer

from gear_lightning.commands.export import export_command
from gear_lightning.errors import UserError


class Hub:
    """A fake hub: configurable responses, and a record of the requests."""

    def __init__(self) -> None:
        self.answers: dict[str, int] = {}  # part of a path -> status instead of 200
        self.role = "write"
        self.there: list[str] = []  # files in the repository
        self.asked: list[str] = []
        self.made: dict = {}
        self.commit: list[dict] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def answer(self) -> None:
                sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path = self.path.partition("?")[0]
                hub.asked.append(path)
                status = next((s for part, s in hub.answers.items() if part in path), 200)
                body = json.dumps({"error": "no"} if status != 200 else hub.reply(path, sent)).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = answer

        return Handler

    def reply(self, path: str, sent: bytes) -> object:
        if path.endswith("whoami-v2"):
            return {"name": "me", "auth": {"accessToken": {"role": self.role}}}
        if path.endswith("repos/create"):
            self.made = json.loads(sent)
            return {"url": f"{self.url}/me/model"}
        if "/preupload/" in path:
            files = json.loads(sent)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if "/tree/" in path:
            return [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in self.there]
        if "/commit/" in path:
            self.commit = [json.loads(line) for line in sent.splitlines()]
            return {"success": True, "commitUrl": f"{self.url}/me/model/commit/abc", "commitOid": "abc"}
        return {"id": "me/model", "siblings": [{"rfilename": name} for name in self.there], "sha": "0" * 40}


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    """A reachable fake hub, and a token with write access."""
    hub = Hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    keeper = ModelCheckpoint(folder, save_last=True)
    loop = trainer(folder, generation(), keeper, enable_checkpointing=True, max_epochs=1)
    loop.fit(module(), datamodule=data())
    return folder / "last.ckpt"


def refused(checkpoint: Path, folder: Path, *more: str, repository: str = "me/model") -> str:
    with pytest.raises(UserError) as error:
        export_command([str(checkpoint), str(folder), "--push", repository, *more])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("lacks", "message"),
    [
        ("offline", "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) disables the hub"),
        ("token", "no token for the hub; log in with `hf auth login`, or set HF_TOKEN"),
        ("network", "the hub cannot be reached (ConnectError"),
        ("known token", "the hub rejects the token (401)"),
        ("writing token", "the token of me is read-only; use one with write access"),
        ("hub", "the hub returned status 503"),
    ],
)
def test_a_missing_requirement_is_reported_before_any_change(hub, checkpoint, tmp_path, monkeypatch, lacks, message):
    if lacks == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif lacks == "token":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "nothing"))
    elif lacks == "network":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    elif lacks == "writing token":
        hub.role = "read"
    else:
        hub.answers["whoami"] = 401 if lacks == "known token" else 503
    assert message in refused(checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir()), "something was left behind"
    assert not hub.made


@pytest.mark.parametrize("repository", ["model", "a/b/c", "me/ model", "../x", "me/model.git", ""])
def test_an_invalid_repository_name_is_rejected(hub, checkpoint, tmp_path, repository):
    assert f"--push {repository}: " in refused(checkpoint, tmp_path / "out", repository=repository)
    assert not list(tmp_path.iterdir())
    assert not hub.asked


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"repos/create": 403, "models/me/model": 404}, "the token has no write access there (403)"),
        ({"commit": 403}, "the token has no write access there (403)"),
        ({"preupload": 413}, "the hub returned status 413"),
    ],
)
def test_if_the_repository_cannot_be_written_the_export_is_complete(hub, checkpoint, tmp_path, answers, message):
    hub.answers = answers
    error = refused(checkpoint, tmp_path / "out")
    assert message in error
    assert f"complete in {tmp_path / 'out'}; after fixing the problem, upload it with `hf upload me/model" in error
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= written
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not hub.commit


def test_an_invalid_checkpoint_creates_no_repository(hub, tmp_path):
    (tmp_path / "bad.ckpt").write_text("no")
    assert "bad.ckpt: not a checkpoint" in refused(tmp_path / "bad.ckpt", tmp_path / "out")
    assert not any("create" in path for path in hub.asked)


def test_a_push_is_one_commit_of_the_whole_directory(hub, checkpoint, tmp_path, capsys):
    hub.there = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.txt", "config.json"]
    assert export_command([str(checkpoint), str(tmp_path / "out"), "--push", "me/model", "--private"]) == 0
    assert f"pushed to {hub.url}/me/model" in capsys.readouterr().out
    assert (hub.made["organization"], hub.made["name"]) == ("me", "model")
    assert hub.made["visibility"] == "private"
    sent = {line["value"]["path"]: line["value"] for line in hub.commit if line["key"] == "file"}
    for path in (tmp_path / "out").iterdir():
        assert base64.b64decode(sent[path.name]["content"]) == path.read_bytes()
    gone = {line["value"]["path"] for line in hub.commit if line["key"].startswith("deleted")}
    assert gone == {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}, "old shards must be deleted"


def test_private_without_push_is_rejected(tmp_path):
    with pytest.raises(UserError, match="--private does nothing without --push"):
        export_command([str(tmp_path / "a.ckpt"), str(tmp_path / "out"), "--private"])
