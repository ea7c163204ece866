"""Fabricated rollouts, and the data of their credit page."""

import json
import re
import struct
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest
import torch

from gear_lightning.runs.records import FORMAT, TENSOR_KEYS, write_record

# One letter per token: p prompt, A and B sampled in turns 0 and 1, o observation. Tokens 4 and 5 are one segment.
LAYOUT = "ppAAAAooBBB"


WORDS = ["task:", "look", "please", "open", "red", "door", "it", "is", "locked", "I", "quit"]


ATTACK = "</script><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"


def fake_tensors(layout: str = LAYOUT, padding: int = 2) -> dict[str, torch.Tensor]:
    """Return a row of T = len(layout) + padding tokens, ids 10, 11, ...; segment weight 1.75, neighbor weight 0.5."""
    pad = "-" * padding
    shape = (1, len(layout + pad))
    action = torch.tensor([[c in "AB" for c in layout + pad]])
    position = torch.arange(shape[1])[None]
    weights, anchor = torch.ones(shape), torch.full(shape, -1)
    if layout == LAYOUT:
        weights[0, 3], weights[0, 4:6], anchor[0, 4:6] = 0.5, 1.75, 4
    logprobs = torch.where(action, -0.125 * position, 0.0)
    return {
        "tokens": torch.where(position < len(layout), position + 10, 0),
        "valid": position < len(layout),
        "action_mask": action,
        "turn_ids": torch.tensor([["AB".find(c) for c in layout + pad]]),
        "stop_mask": torch.zeros(shape, dtype=torch.bool),
        "sampler_logprobs": logprobs,
        "policy_logprobs": logprobs.clone(),
        "teacher_logprobs": 2 * logprobs,
        "entropy": torch.where(action, 0.25, 0.0),
        "teacher_entropy": torch.where(action, 0.125, 0.0),
        "divergence": torch.where(action, 0.0625 * position, 0.0),
        "weights": weights,
        "base_advantages": torch.where(action, -0.5, 0.0),
        "decisions": torch.zeros(shape, dtype=torch.long),
        "parts": torch.zeros(shape, dtype=torch.long),
        "token_advantages": torch.where(action, -0.5 * weights, 0.0),
        "anchor": anchor,
        "rewards": torch.zeros(1),
        "advantages": torch.tensor([-0.5]),
        "privileged": torch.ones(1, dtype=torch.bool),
        "solved": torch.zeros(1, dtype=torch.long),
        "group_ids": torch.zeros(1, dtype=torch.long),
        "policy_version": torch.zeros(1, dtype=torch.long),
    }


def fake_rollout(**changes: Any) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "iteration": 0,
        "rank": 0,
        "row": 0,
        "task_id": "doors/1",
        "group_id": 0,
        "rollout": 0,
        "messages": [{"role": "user", "content": "task: look please"}],
        "reward": 0.0,
        "reward_parts": {"answer": 0.0},
        "success": False,
        "status": "done",
        "error": None,
        "turns": 2,
        "turn_rewards": [0.0, 0.0],
        "states": ["", "it is locked"],
        "feedback": None,
        "policy_version": 0,
        **changes,
    }


def add(run: Path, *rollouts: dict[str, Any], iteration: int = 0, rank: int = 0, **tensors: torch.Tensor) -> None:
    """Write one record; all rollouts that have a row share row 0."""
    rollouts = tuple({**r, "iteration": iteration, "rank": rank} for r in rollouts)
    learned = any(r.get("row") is not None for r in rollouts)
    found = {**fake_tensors(), **tensors} if learned else {name: torch.zeros(0) for name in TENSOR_KEYS}
    write_record(run / "rollouts", iteration, rank, list(rollouts), found)


def decode(token: int) -> str:
    return " " + WORDS[token - 10] if token < 21 else ATTACK


def page_data(page: str) -> dict[str, Any]:
    """Return the content of the page's data element."""
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def unpack(packed: str | int, length: int) -> list[int | None]:
    """Unpack a column like the page's script: one number for all, or a letter and base64 of little-endian integers."""
    if isinstance(packed, int):
        return [packed] * length
    code = {"s": "h", "l": "i"}[packed[0]]
    numbers = [x for (x,) in struct.iter_unpack(f"<{code}", b64decode(packed[1:]))]
    missing = -(2 ** (15 if code == "h" else 31))
    return [None if x == missing else x for x in numbers]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run directory without records, with a tokenizer whose ids 10 to 20 are WORDS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*(f"<{n}>" for n in range(10)), *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<0>").save_pretrained(tmp_path / "tokenizer")
    return tmp_path
