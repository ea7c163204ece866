"""Lookup chain: an embedded tool-use task that cannot be guessed or memorised.

Each episode hides a random table from (relation, entity) to entity. The question is a start entity and k query words;
each word stands for one relation, the same in every episode, and that the policy must learn. It walks the chain with
``look relation entity`` and ends with ``submit entity``. Reward 1 for the right entity, else 0.

A policy may think before it calls: name the word, decide on its relation, and chatter in phrases that mean nothing. Its
turns are then long, and only few of their tokens are decisions. The environment tells which of those were right.
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
    calls,
    tool_call,
    tool_result,
)

RELATIONS = [f"r{i}" for i in range(16)]
ENTITIES = [f"e{i}" for i in range(32)]
QUERIES = [f"w{i}" for i in range(64)]
WORDS = [*RELATIONS, *ENTITIES, *QUERIES, "look", "submit", "error", "<ref>"]
PHRASES = [[f"t{4 * i + j}" for j in range(4)] for i in range(8)]  # the first word is free, the others follow from it
THINKING_WORDS = [*WORDS, *(word for phrase in PHRASES for word in phrase)]

# word -> relation, and the relation that a careless demonstrator confuses it with
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
    """What the hidden table of an episode says."""
    # a table entry depends on its key alone, so that no 512-entry table is built per episode
    return random.Random(f"{table_seed}/{relation}/{entity}").choice(ENTITIES)


def solution(task: Task, meaning: dict[str, str] = MEANING) -> list[tuple[str, str, str]]:
    """The right chain as (relation, entity, result) steps; with other meanings of the words, what they give."""
    entity, steps = task.meta["start"], []
    for word in task.meta["query"]:
        result = look(task.meta["table"], meaning[word], entity)
        steps.append((meaning[word], entity, result))
        entity = result
    return steps


def _written(steps: list[tuple[str, str, str]]) -> str:
    """The calls of a chain."""
    return " ".join([*(f"look {relation} {entity}" for relation, entity, _ in steps), f"submit {steps[-1][2]}"])


@dataclass(frozen=True)
class LookupChainTasks(TaskSource):
    """Endless lookup-chain tasks.

    Args:
        hops: query words in a question.
        split: ``train`` and ``val`` never share an episode.
        seed: of the episodes.
        reference: the ``calls`` that solve the task, the ``answer`` alone, or the calls of ``another`` task: a control
            that tells the teacher nothing.
    """

    hops: int = 4
    split: Literal["train", "val"] = "train"
    seed: int = 0
    reference: Literal["calls", "answer", "another"] = "calls"

    def __post_init__(self):
        if not 1 <= self.hops <= 16:
            raise UserError(f"hops={self.hops} must lie between 1 and 16")

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
    """Plays one lookup-chain episode.

    Args:
        slack: calls allowed beyond the shortest solution.
    """

    tells_decisions = True

    def __init__(self, slack: int = 1):
        self.slack = slack

    def reset(self, task: Task, *, seed: int) -> list[Message]:
        super().reset(task, seed=seed)
        self.calls_left = len(task.meta["query"]) + 1 + self.slack
        self.steps = solution(task)
        self.walked = 0  # steps of the solution that have been taken
        return []

    def step(self, message: Message) -> Step:
        made = calls(message)
        if len(made) != 1:
            return Step(done=True, info={"success": False})
        name, arguments = made[0]
        told = self._decisions(message.get("content") or "", name, arguments)
        self.calls_left -= 1
        if name == "submit":
            right = arguments.get("entity") == self.steps[-1][2]
            return Step(done=True, reward=float(right), info={"success": right, "decisions": told})
        relation, entity = arguments.get("relation"), arguments.get("entity")
        known = name == "look" and relation in RELATIONS and entity in ENTITIES
        answer = look(self.task.meta["table"], str(relation), str(entity)) if known else "error"
        if known and self.walked < len(self.steps) and (relation, entity) == self.steps[self.walked][:2]:
            self.walked += 1
        over = self.calls_left <= 0
        return Step([tool_result(name, answer)], done=over, truncated=over, info={"decisions": told})

    def _decisions(self, thought: str, name: str, arguments: dict[str, str]) -> list[dict]:
        """What was decided: the first relation of the thought, the tool, and its arguments.

        Right is what goes on from the last right step: after a wrong one, that is to go back.
        """
        over = self.walked == len(self.steps)
        relation, entity = (None, self.steps[-1][2]) if over else self.steps[self.walked][:2]
        told = []
        if considered := next((word for word in thought.split() if word in RELATIONS), None):
            told.append({"text": considered, "right": considered == relation, "occurrence": 0})
        told.append({"text": name, "right": name == ("submit" if over else "look")})
        for key, wanted in (("relation", relation), ("entity", entity)):
            if isinstance(value := arguments.get(key), str) and value:
                told.append({"text": value, "right": value == wanted})
        return told


@dataclass(frozen=True)
class LookupChainDemonstrations(Demonstrations):
    """Noisy demonstrations for the policy, clean ones for the teacher's view.

    Without the reference, half of the query words are demonstrated rightly only ``hard_accuracy`` of the time (else one
    fixed wrong relation), the others ``easy_accuracy``. With the reference in the prompt the calls are the reference's,
    and some begin with a staged error that is then walked back from.

    Args:
        hops: query words in a question.
        thought: phrases of four words that are thought before each call, after the query word and its relation. 0: no
            thoughts. The policy then needs the words `THINKING_WORDS`.
        privileged_fraction: share of demonstrations that see the reference.
        recovery_fraction: share of those that begin with an error and recover.
        hard_accuracy: share of right calls for the hard half of the words.
        easy_accuracy: share of right calls for the others.
        reference: what the privileged ones see and follow: the ``right`` calls, or ``made_up`` ones, in which the words
            mean other relations each time. The right ones also teach what the words mean, and a prompt with any
            reference in it then brings that out; made-up ones teach to read the reference, and nothing else.
        seed: of everything random here.
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
