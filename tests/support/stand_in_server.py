"""A server that speaks the part of vLLM's protocol that the project uses, and computes with transformers.

Faults can be switched on while it runs, see `StandIn.fault`.
"""

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from gear_lightning.serving import gear_broadcast

STALE_HEAD, STALE_CACHE, OTHER_VERSION, NAN, HANG, DIE, REFUSE, CUT, FAILED_UPDATE = (
    "stale head", "stale cache", "other version", "nan", "hang", "die", "refuse", "cut", "failed update"
)  # fmt: skip
HALF_UPDATE, HANGING_UPDATE, DEADLY_UPDATE = "half update", "hanging update", "deadly update"  # of a broadcast


class StandIn:
    """The model behind the server.

    Args:
        folder: directory with the model's configuration.
        context: longest context, tokens.
        mode: vLLM's ``logprobs_mode``.
        transfer: how weights come, see `gear_lightning.serving.transfer`.

    Attributes:
        fault: what goes wrong; empty: nothing.
        seen: paths and bodies of all requests.
    """

    def __init__(self, folder: Path, context: int = 128, mode: str = "raw_logprobs", transfer: str = "file"):
        torch.manual_seed(1)
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
        self.context, self.mode, self.transfer = context, mode, transfer
        self.version, self.fault, self.updating = "default", "", False
        self.seen: list[tuple[str, Any]] = []
        self.lock = threading.Lock()
        self.running: set[str] = set()

    def get(self, path: str) -> Any:
        if path == "/health":
            return {}
        if path == "/v1/models":
            return {"data": [{"id": "policy", "max_model_len": self.context}]}
        if path == "/server_info":
            model = {"logprobs_mode": self.mode, "max_model_len": self.context, "dtype": "torch.float32"}
            return {"vllm_config": {"model_config": model, "weight_transfer_config": {"backend": self.transfer}}}
        if path == "/weight_info":
            return {"weight_version": "another" if self.fault == OTHER_VERSION else self.version}
        raise LookupError(path)

    def post(self, path: str, body: Any) -> Any:
        self.seen.append((path, body))
        if self.fault == HANG:
            time.sleep(1000)
        if self.fault == DIE and path == "/v1/completions":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == REFUSE:
            raise ValueError("out of memory")
        if path == "/v1/completions":
            return self.complete(body)
        if path == "/update_weights":
            self.update(**body["update_info"])
        if path == "/finish_weight_update":
            self.version = body["weight_version"]
        return {"success": True} if path == "/reset_prefix_cache" else {}

    def update(self, **info: Any) -> None:
        if self.fault == FAILED_UPDATE:
            raise ValueError("layers do not match")
        if self.transfer == "broadcast":
            with gear_broadcast.receiving(**info, worker=0, workers=1, device=torch.device("cpu")) as tensors:
                weights = {}
                for name, tensor in tensors:
                    weights[name] = tensor
                    if self.fault == HALF_UPDATE:
                        raise ValueError(f"{name} does not fit")
                    if self.fault == HANGING_UPDATE:
                        time.sleep(1000)
                    if self.fault == DEADLY_UPDATE:
                        os.kill(os.getpid(), signal.SIGKILL)
        else:
            weights = load_file(info["path"])
            assert len(weights) == info["tensors"]
        if self.fault == STALE_HEAD:
            weights = {n: w for n, w in weights.items() if "lm_head" not in n and "embed" not in n}
        unknown = set(weights) - set(self.model.state_dict())
        assert not unknown, unknown
        with self.lock:
            self.model.load_state_dict(weights, strict=False)

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, room = list(body["prompt"]), body["max_tokens"]
        assert len(ids) + 1 <= self.context
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        sampled, logprobs, reason = [], [], "length"
        with self.lock:
            prompt = self._logprobs(ids, body)
            while len(sampled) < room:
                last = self._logprobs(ids + sampled, body)[-1]
                greedy = body["temperature"] == 0
                token = int(last.argmax() if greedy else torch.multinomial(last.exp(), 1, generator=generator))
                sampled.append(token)
                logprobs.append(float("nan") if self.fault == NAN else float(last[token]))
                if token in body.get("stop_token_ids", ()):
                    reason = "stop"
                    break
        choice: dict[str, Any] = {
            "token_ids": sampled, "finish_reason": "abort" if self.fault == CUT else reason,
            "logprobs": {"token_logprobs": logprobs},
        }  # fmt: skip
        if body.get("prompt_logprobs") is not None:
            pairs = zip(ids[1:], prompt[:-1], strict=True)
            choice["prompt_logprobs"] = [None, *({str(t): {"logprob": float(p[t])}} for t, p in pairs)]
        usage = {"prompt_tokens": len(ids), "prompt_tokens_details": {"cached_tokens": len(ids) // 2}}
        return {"choices": [choice], "usage": usage}

    def _logprobs(self, ids: list[int], body: dict[str, Any]) -> torch.Tensor:
        logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        temperature = body["temperature"] if self.mode == "processed_logprobs" and body["temperature"] else 1.0
        return (logits / temperature).log_softmax(-1)


def serve(stand_in: StandIn, port: int = 0, host: str = "127.0.0.1") -> ThreadingHTTPServer:
    """Return a server that answers on threads until it is shut down."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, function: Any, *given: Any) -> None:
            try:
                status, found = 200, function(urlsplit(self.path).path, *given)
            except LookupError:
                status, found = 404, {"error": {"message": f"no {self.path}"}}
            except Exception as error:
                status, found = 500, {"error": {"message": f"{error}"}}
            data = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.answer(stand_in.get)

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.answer(stand_in.post, json.loads(data) if data else None)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256  # all turns of a phase may connect at once

        def handle_error(self, *_: Any) -> None:  # a client has gone
            pass

    server = Server((host, port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


if __name__ == "__main__":  # FOLDER PORT [FAULT [TRANSFER]]
    torch.set_num_threads(1)
    made = StandIn(Path(sys.argv[1]), transfer=(sys.argv[4:] or ["file"])[0])
    made.fault = (sys.argv[3:] or [""])[0]
    serve(made, int(sys.argv[2]))
    print("ready", flush=True)
    threading.Event().wait()
