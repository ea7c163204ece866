"""Lookup chain: a built-in tool-use task that the policy can neither guess nor memorize.

Each episode hides a random table from (relation, entity) to entity. The question is a start entity and k query words.
Each query word stands for one relation, the same in every episode; the policy must learn these meanings. It follows the
chain with ``look relation entity`` and ends with ``submit entity``. The reward is 1 for the right entity, else 0.

A policy may write a thought before each call: the query word, the relation it chose, and meaningless filler phrases.
Its turns are then long, and only a few of their tokens are decisions. The environment reports which decisions were
right.
"""

import random
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import UserError
from .base import (
    Demonstration,
    Demonstrations,
    Environment,
    Message,
    Step,
    Task,
    TaskSource,
    tool_call,
    tool_calls,
    tool_result,
)

RELATIONS = [f"r{i}" for i in range(16)]
ENTITIES = [f"e{i}" for i in range(32)]
QUERIES = [f"w{i}" for i in range(64)]
WORDS = [*RELATIONS, *ENTITIES, *QUERIES, "look", "submit", "error", "<ref>"]
PHRASES = [[f"t{4 * i + j}" for j in range(4)] for i in range(8)]  # the first word determines the other three
THINKING_WORDS = [*WORDS, *(word for phrase in PHRASES for word in phrase)]

# word -> its relation, and the wrong relation that noisy demonstrations use for it
_facts = random.Random(20260512)
MEANING = {word: _facts.choice(RELATIONS) for word in QUERIES}
CONFUSED = {word: _facts.choice([r for r in RELATIONS if r != MEANING[word]]) for word in QUERIES}
HARD = set(_facts.sample(QUERIES, len(QUERIES) // 2))


def _tool(name: str, description: str, arguments: dict[str, str]) -> dict:
    properties = {key: {"type": "string", "description": text} for key, text in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = (
    _tool(
        "look",
        "Follow a relation from an entity.",
        {"relation": "the relation, r0 to r15", "entity": "the entity, e0 to e31"},
    ),
    _tool("submit", "Give the final entity.", {"entity": "the entity, e0 to e31"}),
)


def look(table_seed: int, relation: str, entity: str) -> str:
    """Return an entry of the hidden table of an episode."""
    # an entry depends only on its key, so no 512-entry table has to be built per episode
    return random.Random(f"{table_seed}/{relation}/{entity}").choice(ENTITIES)


def solution(task: Task, meaning: dict[str, str] = MEANING) -> list[tuple[str, str, str]]:
    """Return the chain as (relation, entity, result) steps: the right one, or the one for another ``meaning``."""
    entity, steps = task.meta["start"], []
    for word in task.meta["query"]:
        result = look(task.meta["table"], meaning[word], entity)
        steps.append((meaning[word], entity, result))
        entity = result
    return steps


def _written(steps: list[tuple[str, str, str]]) -> str:
    """Return the calls of a chain as text."""
    return " ".join([*(f"look {relation} {entity}" for relation, entity, _ in steps), f"submit {steps[-1][2]}"])


@dataclass(frozen=True)
class LookupChainTasks(TaskSource):
    """Endless lookup-chain tasks.

    Args:
        hops: query words in a question.
        split: ``train`` or ``val``; they never share an episode.
        seed: seed of the episodes.
        reference: the ``calls`` that solve the task, only the ``answer``, or the calls of ``another`` task, which give
            the teacher no information (a control).
    """

    hops: int = 4
    split: Literal["train", "val"] = "train"
    seed: int = 0
    reference: Literal["calls", "answer", "another"] = "calls"

    def __post_init__(self):
        if not 1 <= self.hops <= 16:
            raise UserError(f"hops={self.hops}: must be between 1 and 16")

    @property
    def size(self) -> None:
        return None

    def __getitem__(self, index: int) -> Task:
        name = f"lookup-{self.split}-{self.seed}-{index}"
        rng = random.Random(name)
        meta = {
            "table": rng.getrandbits(32),
            "start": rng.choice(ENTITIES),
            "query": [rng.choice(QUERIES) for _ in range(self.hops)],
        }
        question = " ".join([meta["start"], *meta["query"]])
        task = Task(name, [{"role": "user", "content": question}], TOOLS, meta=meta)
        if self.reference == "another":
            return replace(task, reference=replace(self, reference="calls", seed=~self.seed)[index].reference)
        steps = solution(task)
        return replace(task, reference=_written(steps) if self.reference == "calls" else f"submit {steps[-1][2]}")


class LookupChain(Environment):
    """Runs one lookup-chain episode.

    Args:
        slack: number of calls allowed beyond the shortest solution.
    """

    reports_decisions = True

    def __init__(self, slack: int = 1):
        self.slack = slack

    def reset(self, task: Task, *, seed: int) -> list[Message]:
        super().reset(task, seed=seed)
        self.calls_left = len(task.meta["query"]) + 1 + self.slack
        self.steps = solution(task)
        self.walked = 0  # completed steps of the solution
        return []

    def step(self, message: Message) -> Step:
        made = tool_calls(message)
        if len(made) != 1:
            return Step(done=True, info={"success": False})
        name, arguments, call_id = made[0]
        decisions = self._decisions(message.get("content") or "", name, arguments)
        self.calls_left -= 1
        if name == "submit":
            right = arguments.get("entity") == self.steps[-1][2]
            return Step(done=True, reward=float(right), info={"success": right, "decisions": decisions})
        relation, entity = arguments.get("relation"), arguments.get("entity")
        known = name == "look" and relation in RELATIONS and entity in ENTITIES
        answer = look(self.task.meta["table"], str(relation), str(entity)) if known else "error"
        if known and self.walked < len(self.steps) and (relation, entity) == self.steps[self.walked][:2]:
            self.walked += 1
        over = self.calls_left <= 0
        return Step([tool_result(name, answer, call_id)], done=over, truncated=over, info={"decisions": decisions})

    def _decisions(self, thought: str, name: str, arguments: dict[str, str]) -> list[dict]:
        """Return the decisions of a turn: the first relation in the thought, the tool, and its arguments.

        A decision is right if it continues from the last right step. After a wrong step, going back is right.
        """
        over = self.walked == len(self.steps)
        relation, entity = (None, self.steps[-1][2]) if over else self.steps[self.walked][:2]
        found = []
        if considered := next((word for word in thought.split() if word in RELATIONS), None):
            found.append({"text": considered, "right": considered == relation, "occurrence": 0})
        found.append({"text": name, "right": name == ("submit" if over else "look")})
        for key, wanted in (("relation", relation), ("entity", entity)):
            if isinstance(value := arguments.get(key), str) and value:
                found.append({"text": value, "right": value == wanted})
        return found


@dataclass(frozen=True)
class LookupChainDemonstrations(Demonstrations):
    """Noisy demonstrations for the policy's view, and error-free ones for the teacher's view.

    Without the reference in the prompt, half of the query words use the right relation with probability
    ``hard_accuracy`` (otherwise one fixed wrong relation), and the other half with probability ``easy_accuracy``. With
    the reference in the prompt, the calls are those of the reference; some demonstrations contain a staged error and
    then go back.

    Args:
        hops: query words in a question.
        thought: number of four-word filler phrases before each call, after the query word and its relation. 0: no
            thoughts. Above 0, the policy's vocabulary must be `THINKING_WORDS`.
        privileged_fraction: fraction of demonstrations with the reference in the prompt.
        recovery_fraction: fraction of those that contain an error and recover from it.
        hard_accuracy: fraction of right calls for the hard half of the words.
        easy_accuracy: fraction of right calls for the others.
        reference: the reference that privileged demonstrations show and follow: the ``right`` calls, or ``made_up``
            ones, in which the words mean other relations each time. The right calls also teach the meanings of the
            words, which a prompt with any reference then elicits; made-up calls teach only to read the reference.
        seed: seed of all randomness in this class.
    """

    hops: int = 4
    thought: int = 0
    privileged_fraction: float = 0.5
    recovery_fraction: float = 0.25
    hard_accuracy: float = 0.4
    easy_accuracy: float = 0.95
    reference: Literal["right", "made_up"] = "right"
    seed: int = 0

    def __getitem__(self, index: int) -> Demonstration:
        rng = random.Random(f"demonstration-{self.seed}-{index}")
        task = LookupChainTasks(self.hops, "train", seed=-1 - self.seed)[index]
        privileged = rng.random() < self.privileged_fraction
        slip_at = rng.randrange(self.hops) if privileged and rng.random() < self.recovery_fraction else None
        meaning = MEANING
        if privileged and self.reference == "made_up":
            meaning = {word: rng.choice(RELATIONS) for word in task.meta["query"]}
            task = replace(task, reference=_written(solution(task, meaning)))
        messages: list[Message] = []
        unlearned = set()
        table, entity = task.meta["table"], task.meta["start"]

        def think(*decided: str) -> str:
            chatter = [word for _ in range(self.thought) for word in rng.choice(PHRASES)]
            return " ".join([*decided, *chatter]) if self.thought else ""

        def call(word: str, relation: str) -> str:
            answer = look(table, relation, entity)
            messages.append(tool_call("look", {"relation": relation, "entity": entity}, think(word, relation)))
            messages.append(tool_result("look", answer))
            return answer

        for place, word in enumerate(task.meta["query"]):
            relation = meaning[word]
            if not privileged:
                accuracy = self.hard_accuracy if word in HARD else self.easy_accuracy
                relation = relation if rng.random() < accuracy else CONFUSED[word]
            elif place == slip_at:
                unlearned.add(len(messages))
                call(word, rng.choice([r for r in RELATIONS if r != relation]))
            entity = call(word, relation)
        messages.append(tool_call("submit", {"entity": entity}, think()))
        return Demonstration(task, messages, privileged, frozenset(unlearned))
