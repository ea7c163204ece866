"""Checks that a tokenizer fits a model: each id of a context has a row in the embedding, and sampled ids are tokens."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from ..environments.base import TaskSource
from ..errors import UserError
from ..logits import tokenizer_ids
from .engine import GenerationEngine

ENDLESS = 1000  # tasks that are read of a source without a size


def check_vocabulary(chat: Any, rows: int, model: str, sources: Iterable[TaskSource | None]) -> None:
    """Check a tokenizer that may have more ids than the model.

    Special tokens beyond the model's ids are allowed if the chat template and the tasks use none, because messages
    never contain special tokens: Gemma 3 1B has one for images, and no row for it.

    Args:
        chat: the `Chat` of the policy.
        rows: number of ids of the model's input embedding.
        model: name of the model.
        sources: tasks whose prompts are searched for such an id; read only if the tokenizer has more ids.

    Raises:
        UserError: an id that can occur in a context has no row; names the token, and the first task with one.
    """
    tokenizer = chat.tokenizer
    if tokenizer_ids(tokenizer) <= rows:
        return
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= rows}
    special = {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    searched = chain(_prompts(chat, sources), _template(chat))
    where, token = next(((name, i) for name, ids in searched for i in ids if i >= rows), ("", None))
    if token is None:
        if beyond.keys() <= special:
            return
        token = min(beyond.keys() - special)
    raise UserError(
        f"the tokenizer does not fit the model: {where or 'it'} has token {beyond.get(token, '')!r} (id {token}), but "
        f"the input embedding of {model} has {rows} rows; use the model's own tokenizer, or add rows to the model "
        "(resize_token_embeddings of transformers)"
    )


def _prompts(chat: Any, sources: Iterable[TaskSource | None]) -> Iterator[tuple[str, list[int]]]:
    for source in sources:
        for i in range(0 if source is None else ENDLESS if source.size is None else source.size):
            task = source[i]  # pyright: ignore[reportOptionalSubscript]
            if task.messages:  # else the environment writes the prompt
                place = source.place_of(i)  # pyright: ignore[reportOptionalMemberAccess]
                yield (
                    f"the prompt of task {task.id}{'' if place is None else f' ({place})'}",
                    chat.prompt(task.messages, task.tools),
                )


def _template(chat: Any) -> Iterator[tuple[str, list[int]]]:
    name, user = "the chat template", {"role": "user", "content": "Hello"}
    yield name, chat.prompt([user])
    for message in (user, {"role": "tool", "name": "probe", "content": "ok"}):
        try:
            yield name, chat.continuation([message])
        except UserError:  # it has no such role, which matters only to tasks that need it
            continue


def check_sampled(engine: GenerationEngine, rollouts: Iterable[Any], ids: int) -> None:
    """Check that an engine has sampled only ids of the tokenizer, which alone have log-probs in training.

    Raises:
        UserError: it has sampled another id; names the task.
    """
    for rollout in rollouts:
        if rollout.tokens and (highest := max(rollout.tokens)) >= ids:
            raise UserError(
                f"task {rollout.task.id}: {type(engine).__name__} sampled id {highest}, but the tokenizer has {ids} "
                "ids; an engine must sample from gear_lightning.logits.output_logits"
            )
