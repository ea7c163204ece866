"""``gear-lightning serve --keep-serving``: signals that ask a job to save end neither the server nor its processes."""

import os
import signal
import subprocess
import sys

from deadlines import seconds, until

from gear_lightning.serving.launch import FOLDER

SERVER = """
import multiprocessing, os, signal, sys, threading
from multiprocessing import shared_memory


def work(note):
    signal.signal(signal.SIGTERM, lambda *_: os._exit(3))
    open(note, "w").write(str(os.getpid()))
    threading.Event().wait()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(3))
    memory = shared_memory.SharedMemory(create=True, size=8)  # starts Python's resource tracker
    child = multiprocessing.get_context("spawn").Process(target=work, args=(sys.argv[1],), daemon=True)
    child.start()
    try:
        child.join()
    except KeyboardInterrupt:
        memory.close()
        memory.unlink()
        child.kill()
"""


def test_only_sigint_ends_a_server_that_keeps_serving(tmp_path):
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(SERVER)
    note = tmp_path / "child"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    server = subprocess.Popen([sys.executable, str(FOLDER / "start_vllm.py"), str(note)], env=environment)
    try:
        child = int(until(lambda: note.exists() and note.read_text(), "the child"))
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            for process in (server.pid, child):
                os.kill(process, number)
        for process in (server.pid, child):
            with open(f"/proc/{process}/status") as status:
                pending = next(line for line in status if line.startswith("ShdPnd"))
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                assert int(pending.split()[1], 16) >> (number - 1) & 1, "it was delivered"
        assert server.poll() is None
        os.kill(server.pid, signal.SIGINT)
        assert server.wait(seconds(30)) == 0
    finally:
        server.kill()
        server.wait(seconds(30))
