"""The broadcast of weights: what arrives, and that a side that fails ends the other in time."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from checkout import ROOT
from deadlines import seconds

from gear_lightning.serving import gear_broadcast
from gear_lightning.serving.gear_broadcast import BroadcastError, Sender, manifest, receiving

CPU = torch.device("cpu")
TENSORS = {
    "matrix": torch.randn(5, 7),
    "turned": torch.randn(4, 6).T,
    "half": torch.randn(9).bfloat16(),
    "number": torch.tensor(2),
    "nothing": torch.empty(0, 3),
}
LARGE = {f"layer {i}": torch.zeros(1 << 20) for i in range(20)}  # more than connections hold


class Worker(threading.Thread):
    """A worker that fails after ``most`` tensors."""

    def __init__(self, invitation, worker=0, workers=1, tensors=TENSORS, most=100):
        super().__init__(daemon=True)
        self.given = {**invitation, "tensors": manifest(tensors), "worker": worker, "workers": workers, "device": CPU}
        self.most, self.found, self.error = most, {}, None
        self.start()

    def run(self):
        try:
            with receiving(**self.given) as tensors:
                for name, tensor in tensors:
                    self.found[name] = tensor
                    if len(self.found) == self.most:
                        raise LookupError(name)
        except Exception as error:
            self.error = error


def never() -> bool:
    return False


def test_all_workers_get_all_tensors():
    sender = Sender("127.0.0.1", seconds(20))
    workers = [Worker(sender.invitation(), i, 3) for i in range(3)]
    assert sender.meet(CPU, never)
    assert sender.backend == "gloo"
    sender.send(TENSORS.values())
    sender.close()
    for worker in workers:
        worker.join(seconds(20))
        assert worker.error is None
        assert worker.found.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert worker.found[name].dtype == tensor.dtype
            torch.testing.assert_close(worker.found[name], tensor, atol=0, rtol=0)


def test_a_worker_that_fails_ends_the_sender():
    sender = Sender("127.0.0.1", seconds(60))
    worker = Worker(sender.invitation(), tensors=LARGE, most=1)
    assert sender.meet(CPU, never)
    with pytest.raises(BroadcastError):
        sender.send(LARGE.values())
    worker.join(seconds(20))
    assert isinstance(worker.error, LookupError)


def test_a_sender_that_is_killed_ends_the_worker():
    code = """
import sys, torch
from gear_lightning.serving.gear_broadcast import Sender
sender = Sender("127.0.0.1", float(sys.argv[1]))
print(sender.invitation()["port"], flush=True)
assert sender.meet(torch.device("cpu"), lambda: False)
sender.send([torch.zeros(5, 7)])
print("half", flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(seconds(60))],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    port = int(process.stdout.readline())
    worker = Worker({"host": "127.0.0.1", "port": port, "seconds": seconds(60)})
    assert process.stdout.readline() == "half\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait(seconds(20))
    worker.join(seconds(30))
    assert isinstance(worker.error, BroadcastError)
    assert "\n" not in str(worker.error)


def test_workers_that_do_not_come_are_waited_for_until_the_limit_only():
    sender = Sender("127.0.0.1", 0.2)
    with pytest.raises(BroadcastError, match=r"workers have not come within 0\.2 s"):
        sender.meet(CPU, never)
    sender = Sender("127.0.0.1", seconds(60))
    assert not sender.meet(CPU, lambda: True), "the server has refused"


def test_a_trainer_that_is_not_there_ends_the_worker():
    sender = Sender("127.0.0.1", seconds(1))
    invitation = sender.invitation()
    worker = Worker(invitation)
    worker.join(seconds(30))
    assert isinstance(worker.error, BroadcastError), "the meeting was not completed in time"
    sender.close()
    worker = Worker(invitation)
    worker.join(seconds(30))
    assert isinstance(worker.error, BroadcastError), "no process listens"


def test_tensors_that_are_not_read_are_an_error():
    sender = Sender("127.0.0.1", seconds(20))
    failed = []

    def read_none():
        try:
            with receiving(**sender.invitation(), tensors=manifest(TENSORS), worker=0, workers=1, device=CPU):
                pass
        except ValueError as error:
            failed.append(str(error))

    thread = threading.Thread(target=read_none, daemon=True)
    thread.start()
    assert sender.meet(CPU, never)
    thread.join(seconds(20))
    assert failed == [f"{len(TENSORS)} of {len(TENSORS)} tensors were not read"]


def test_the_own_address_is_the_one_towards_the_host():
    assert gear_broadcast.address_towards("127.0.0.1") == "127.0.0.1"
    with pytest.raises(BroadcastError, match=r"no\.such\.host\.invalid"):
        Sender("no.such.host.invalid", seconds(1))
