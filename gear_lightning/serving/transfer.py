"""How new weights get from the policy's process to its servers: as a file, or by broadcast."""

from concurrent.futures import ThreadPoolExecutor
from typing import Literal
from urllib.parse import urlsplit

from torch import Tensor

from . import gear_broadcast
from .client import Server, ServerError, weights_file

Transfer = Literal["file", "broadcast"]


def deliver(
    servers: list[Server], weights: dict[str, Tensor], version: str, transfer: Transfer, folder: str, seconds: float
) -> None:
    """Give weights to servers.

    Args:
        servers: the servers.
        weights: name -> tensor.
        version: their version.
        transfer: the way; that with which the servers were started.
        folder: directory for the file.
        seconds: limit of an update.

    Raises:
        ServerError: a server did not take them; it must then be started again.
    """
    if transfer == "broadcast":
        for server in servers:
            server.load(lambda server=server: broadcast(server, weights, seconds), version)
        return
    with weights_file(weights, folder) as path:
        given = {"path": str(path), "tensors": len(weights)}
        for server in servers:
            server.load(lambda server=server: server.update(given), version)


def broadcast(server: Server, weights: dict[str, Tensor], seconds: float) -> None:
    """Send weights to the workers of a server that has opened an update.

    Raises:
        ServerError: a worker failed or did not answer in time. The reason that the server gives comes first.
    """
    failure = None
    sender = gear_broadcast.Sender(str(urlsplit(server.url).hostname), seconds)
    given = {**sender.invitation(), "tensors": gear_broadcast.manifest(weights)}
    with ThreadPoolExecutor(1, thread_name_prefix="weights") as thread:
        answer = thread.submit(server.update, given)
        try:
            if sender.meet(next(iter(weights.values())).device, answer.done):
                sender.send(weights.values())
                answer.result()
        except gear_broadcast.BroadcastError as error:
            failure = error
        finally:
            sender.close()  # so that a server which still waits answers
        answer.result()
    if failure is not None:
        raise ServerError(
            f"the vLLM server {server.url} has not taken the weights ({failure}); end it, {server.advice}"
        )
