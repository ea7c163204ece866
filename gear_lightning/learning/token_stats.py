"""Log-probs, entropy and top-k of tokens from a causal language model, computed from hidden states in chunks.

Only the requested tokens reach the output head, and only as many at a time as produce `LOGITS` logits: no
``[batch, seq, vocab]`` tensor exists. Only this module applies the next-token shift: the distribution of token t comes
from the hidden state at t - 1.
"""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..batch import TokenStats
from ..distributed.sharding import forward_of_model, is_zero3, most, shape
from ..errors import UserError
from ..logits import decoder, logit_transform, output_logits

LOGITS = 1 << 24  # tokens x vocabulary in one chunk: 67 MB in float32


def _chunk_stats(
    hidden: Tensor,
    model: nn.Module,
    targets: Tensor,
    temperature: float,
    top_k: int,
    top_ids: Tensor | None,
    top_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = output_logits(model, hidden).float()
    if temperature != 1.0:
        logits = logits / temperature
    logprobs = logits.log_softmax(-1)
    with torch.no_grad():
        flat = logprobs.detach()
        entropy = -(flat.exp() * flat).sum(-1)
        ids = flat.topk(min(top_k, flat.shape[-1])).indices if top_ids is None else top_ids
    if top_grad:  # one lookup for both: backward then fills one tensor with gradients, not two
        picked, top_logprobs = logprobs.gather(-1, torch.cat([targets[:, None], ids], -1)).split([1, ids.shape[-1]], -1)
    else:
        picked, top_logprobs = logprobs.gather(-1, targets[:, None]), flat.gather(-1, ids)
    return picked.squeeze(-1), entropy, top_logprobs, ids


def token_stats(
    model: nn.Module,
    tokens: Int[Tensor, "batch seq"],
    valid: Bool[Tensor, "batch seq"],
    wanted: Bool[Tensor, "batch seq"],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_ids: Int[Tensor, "batch seq top"] | None = None,
    top_grad: bool = False,
) -> TokenStats:
    """Return the statistics of the wanted tokens under ``model``.

    Args:
        model: a Hugging Face causal language model (`check_head` checks that it is supported).
        tokens: right-padded ids.
        valid: True except at padding.
        wanted: tokens to score; never column 0. Other entries of the result are 0.
        temperature: the distribution is softmax(logits / temperature), as in sampling.
        top_k: number of most likely tokens to return as well; 0 for none.
        top_ids: return the log-probs of these tokens instead.
        top_grad: the top-k log-probs also have a gradient. This keeps that many float32 numbers per token, and the
            results that a loss computes from them; the vocabulary is still processed in chunks, also in backward.

    Returns:
        Log-probs (with gradient if grad is enabled), entropy (without) and top-k (with ``top_grad``), in nats and
        float32.
    """
    some = top_k or top_ids is not None
    logprobs, entropy, ids, top = _scores(model, tokens, valid, wanted, temperature, top_k, top_ids, top_grad)
    return TokenStats(logprobs, entropy, ids if some else None, top if some else None)


@forward_of_model
def _scores(
    model: Any,
    tokens: Tensor,
    valid: Tensor,
    wanted: Tensor,
    temperature: float,
    top_k: int,
    top_ids: Tensor | None,
    top_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `token_stats` inside the model's forward: log-probs, entropy, top ids and their log-probs."""
    # padding is on the right: causal attention keeps it out of every real token, so no mask is needed and the fast
    # attention kernels can be used
    head = model.get_output_embeddings()
    hidden = decoder(model)(input_ids=tokens, use_cache=False).last_hidden_state
    row, column = (wanted[:, 1:] & valid[:, 1:]).nonzero(as_tuple=True)
    states, targets = hidden[row, column], tokens[row, column + 1]
    size = max(1, LOGITS // shape(head.weight)[0])
    chunks = max(1, -(-len(targets) // size))
    if is_zero3(head.weight):  # each pass through the head gathers it on all ranks: all need the same number of passes
        chunks = most(chunks, tokens.device)
    counts = [max(0, min(size, len(targets) - i * size)) for i in range(chunks)]
    # split instead of slices: in backward each slice would allocate a zero tensor as large as all states
    pieces, wants = states.split(counts), targets.split(counts)
    listed = [None] * chunks if top_ids is None else top_ids[row, column + 1].split(counts)
    parts = []
    for piece, want, ids in zip(pieces, wants, listed, strict=True):
        args = (piece, model, want, temperature, top_k, ids, top_grad)
        if chunks > 1 and torch.is_grad_enabled():  # recompute logits in backward instead of keeping them all
            parts.append(checkpoint(_chunk_stats, *args, use_reentrant=False))
        else:
            parts.append(_chunk_stats(*args))
    picked, entropy, top_logprobs, ids = (torch.cat(p) for p in zip(*parts, strict=True))
    where = (row, column + 1)

    def spread(values: Tensor) -> Tensor:
        empty = values.new_zeros(*tokens.shape, *values.shape[1:])
        return empty.index_put(where, values)

    return spread(picked), spread(entropy), spread(ids), spread(top_logprobs)


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Check that a model's logits are what `logits.output_logits` computes from the decoder's last hidden states.

    The check runs on two tokens. In the model's own forward, a hook replaces the head's output by numbers from -1e4 to
    1e4, most of them small, and the model must return what `logits.logit_transform` makes of them. This detects a
    soft-cap or a scale even if the model's logits are small, and changes no weight.

    Raises:
        UserError: the model transforms its logits in another way than its configuration says, has no decoder or head,
            returns random outputs, or writes to its weights in a forward pass.
    """
    name = type(model).__name__
    seen: list[Tensor] = []  # input of the head, and its replaced output, in the model's own forward

    def replace(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        steps = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
        marks = (1e4 * steps**5).to(output.dtype)
        seen[:] = [*args[:1], marks]
        return marks

    written = [p._version for p in model.parameters()]
    try:
        body, head = decoder(model), model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
        ids = torch.tensor([[0, 1]], device=head.weight.device)
        hidden, again = (body(input_ids=ids, use_cache=False).last_hidden_state for _ in range(2))
        handle = head.register_forward_hook(replace)
        try:
            logits = model(input_ids=ids, use_cache=False).logits
        finally:
            handle.remove()
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{name} is not a causal language model with a decoder and an output head ({error})") from None
    if [p._version for p in model.parameters()] != written:
        raise UserError(f"{name} changes its weights in a forward pass; such models are not supported")
    small = 1e-3 * hidden.abs().max()
    if (hidden - again).abs().max() > small:
        raise UserError(f"{name} is random: its hidden states differ between calls; such models are not supported")
    if len(seen) < 2 or (hidden - seen[0]).abs().max() > small:
        raise UserError(
            f"{name} does not apply its output head to the last hidden states of its decoder; such models are not "
            "supported"
        )
    transform = logit_transform(model.config)
    expected, close = transform(seen[1]).float(), max(1e-4, 8 * torch.finfo(logits.dtype).eps)
    if logits.shape != expected.shape or not torch.allclose(logits.float(), expected, atol=close, rtol=close):
        raise UserError(
            f"{name} transforms its logits in another way than its configuration says ({transform}); such models are "
            "not supported"
        )
