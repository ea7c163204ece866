"""Starts vLLM's server such that SIGTERM, SIGUSR1 and SIGUSR2 do not end it or its processes; SIGINT does.

vLLM has an environment of its own, so this file imports nothing of gear_lightning. The signals are blocked, because
vLLM sets handlers of its own; its processes inherit that.
"""

import runpy
import signal
from multiprocessing import resource_tracker

if __name__ == "__main__":
    resource_tracker.ensure_running()  # first: when Python starts it, it unblocks SIGTERM
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background commands ignore it
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
