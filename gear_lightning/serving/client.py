"""Talks to a vLLM server that `gear-lightning serve` has started: token ids in and out, and new weights."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError

MODEL = "policy"  # the name under which a server offers the policy
SHORT = 10.0  # seconds for a connection, and for the end of requests when a run stops
START = "gear-lightning serve --config RECIPE"


class ServerError(UserError):
    """The server does not do what the run needs."""


class Server:
    """A vLLM server.

    Args:
        url: its address, such as ``http://127.0.0.1:8765``.
        seconds: how long an answer may take.
        advice: what to do if it does not answer.

    Raises:
        ServerError: by all methods, if the server does not answer, or refuses.
    """

    def __init__(self, url: str, seconds: float, advice: str = f"start it with `{START}`, and resume"):
        import httpx

        self.url, self.advice = url.rstrip("/"), advice
        everything = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(seconds, connect=SHORT, pool=None)
        self._client = httpx.Client(base_url=self.url, timeout=timeout, limits=everything)
        self._seconds = seconds

    def _ask(self, method: str, path: str, **options: Any) -> Any:
        import httpx

        try:
            answer = self._client.request(method, path, **options)
        except httpx.TimeoutException:
            raise ServerError(
                f"the vLLM server {self.url} has not answered {path} within {self._seconds:g} s; end it, {self.advice}"
            ) from None
        except (httpx.HTTPError, OSError) as error:
            raise ServerError(
                f"the vLLM server {self.url} cannot be reached ({error or type(error).__name__}); {self.advice}"
            ) from None
        if answer.status_code != 200:
            raise ServerError(f"the vLLM server {self.url} refuses {path}: {refusal(answer.status_code, answer.text)}")
        return answer.json() if answer.content else None

    def answers(self) -> bool:
        """Return whether the server answers."""
        import httpx

        try:
            return self._client.get("/health", timeout=SHORT).status_code == 200
        except (httpx.HTTPError, OSError):
            return False

    def info(self) -> dict[str, Any]:
        """Return the description of the served model."""
        return self._ask("GET", "/v1/models")["data"][0]

    def options(self) -> dict[str, Any]:
        """Return the options that the server was started with."""
        return self._ask("GET", "/server_info", params={"config_format": "json"})["vllm_config"]

    def version(self) -> str | None:
        """Return the version of the server's weights."""
        return self._ask("GET", "/weight_info").get("weight_version")

    def complete(self, **body: Any) -> dict[str, Any]:
        """Return the answer to a request of a completion."""
        return self._ask("POST", "/v1/completions", json={"model": MODEL, **body})

    def abort(self, requests: list[str]) -> None:
        """End requests, given by their ``request_id``."""
        names = [f"cmpl-{name}-0" for name in requests]  # vLLM's own names of them
        self._ask("POST", "/abort_requests", json={"request_ids": names}, timeout=SHORT)

    def update(self, info: dict[str, Any]) -> None:
        """Let the server take new weights from where ``info`` says; within `load`."""
        self._ask("POST", "/update_weights", json={"update_info": info})

    def load(self, update: Callable[[], None], version: str) -> None:
        """Give the server new weights, and let it drop the keys and values of the old ones.

        Args:
            update: calls `Server.update`.
            version: their version.

        Raises:
            ServerError: an update failed; the server must then be started again.
        """
        self._ask("POST", "/pause", params={"mode": "abort", "clear_cache": "true"})
        self._ask("POST", "/start_weight_update", json={})
        update()
        self._ask("POST", "/finish_weight_update", json={"weight_version": version})
        found = self._ask("POST", "/reset_prefix_cache")
        if found and found.get("success") is False:
            raise ServerError(f"the vLLM server {self.url} keeps the keys and values of older weights")
        self._ask("POST", "/resume")


def refusal(status: int, text: str) -> str:
    """Return the reason that a server gives for an error, in one line."""
    import json

    with contextlib.suppress(ValueError, AttributeError, TypeError, KeyError):
        found = json.loads(text)
        text = found.get("message") or found["error"]["message"]
    return f"{status}: {' '.join(text.split())[:300]}"


@contextlib.contextmanager
def weights_file(weights: dict[str, Tensor], folder: str) -> Iterator[Path]:
    """Write weights to a file that is removed at the end of the context.

    Args:
        weights: name -> tensor.
        folder: where; on the server's machine, too.

    Raises:
        ServerError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    name = ""
    try:
        handle, name = tempfile.mkstemp(dir=folder, prefix="gear-weights-", suffix=".safetensors")
        os.close(handle)
        save_file({key: value.detach().to("cpu").contiguous() for key, value in weights.items()}, name)
        yield Path(name)
    except (OSError, SafetensorError) as error:
        raise ServerError(f"the weights cannot be written to {folder} ({error})") from None
    finally:
        if name:
            Path(name).unlink(missing_ok=True)
