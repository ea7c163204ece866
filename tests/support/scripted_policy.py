"""An engine with scripted turns, and rollouts of one task with it."""

from collections.abc import Callable

import torch
from chat_templates import CHATML, byte_tokenizer
from deadlines import seconds

from gear_lightning.environments.base import Environment, Task
from gear_lightning.generation.agent_loop import AgentLoop
from gear_lightning.generation.budgets import Budgets
from gear_lightning.generation.chat import Chat, ChatOptions
from gear_lightning.generation.engine import GenerationEngine, SampledTurn, Sampling
from gear_lightning.rollout import Rollout

CHAT = Chat(byte_tokenizer(CHATML), ChatOptions("json_list"))


class Scripted(GenerationEngine):
    """Returns scripted turns, tokenized in an unusual way, so that re-encoding the text gives other ids."""

    def __init__(self, *turns: str, stop: bool = True):
        self.turns, self.stop = turns, stop

    def begin(self, model, sampling, stop_ids):
        self.requests = []
        self.waiting = []

    def submit(self, request):
        self.requests.append(request)
        self.waiting.append(request)

    def poll(self):
        waiting, self.waiting = self.waiting, []
        return [self.say(request) for request in waiting]

    def say(self, request):
        text = self.turns[min(request.seed[-1], len(self.turns) - 1)]
        ids = [i for char in text for i in CHAT.encode(char)] + [CHAT.turn.end] * self.stop
        ids = ids[: request.max_tokens]
        return SampledTurn(request.key, ids, [-0.5] * len(ids), self.stop and ids[-1:] == [CHAT.turn.end])

    def release(self, key):
        pass

    def end(self):
        pass


def answered(
    task: Task,
    environment: Callable[[], Environment],
    *turns: str,
    budgets: Budgets = Budgets(tokens=8000, context=16000, step_seconds=seconds(30)),
) -> Rollout:
    """Return the rollout of a task with these turns of the policy; the last one is repeated."""
    loop = AgentLoop(CHAT, Scripted(*turns), environment, budgets, Sampling())
    (rollout,), _ = loop.run(torch.nn.Linear(1, 1), [(task, (0, 0, 0, 0))], policy_version=0)
    return rollout
