"""The table of model families in docs/reference/models.md, measured on tiny models with random weights.

``python tests/support/family_table.py`` measures all families and writes the data and the table.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from model_families import Family
from published_families import PUBLISHED, engine_gap
from rank_group import Group, connect

from gear_lightning.distributed.sharding import full
from gear_lightning.errors import UserError
from gear_lightning.generation.cached_engine import CachedEngine
from gear_lightning.generation.generate_engine import GenerateEngine
from gear_lightning.learning.lora import LoRA, adapter_parameters
from gear_lightning.learning.token_stats import check_head, token_stats
from gear_lightning.models import without_dropout

DOCS = Path(__file__).parents[2] / "docs" / "reference"
DATA, PAGE = DOCS / "models.json", DOCS / "models.md"
START, END = "<!-- table -->\n", "<!-- end of the table -->\n"
TOKENS = torch.randint(6, 60, (2, 40), generator=torch.Generator().manual_seed(0))
WANTED = torch.arange(40).expand(2, 40) > 0
EXACT = 1e-3  # nats: a larger difference is not rounding


def made(kind: str) -> Any:
    return without_dropout(Family(kind=kind).model()).eval()


def logprobs(model: Any) -> torch.Tensor:
    return token_stats(model, TOKENS, torch.ones_like(WANTED), WANTED).logprobs


def gap_of(model: Any) -> tuple[str, float]:
    """Return the engine that samples from a model, and its largest difference from the trainer, nats."""
    found = ("none", math.nan)
    for engine in (CachedEngine(), GenerateEngine()):
        try:
            found = (type(engine).__name__, engine_gap(model, engine))
        except UserError:
            continue
        if found[1] < EXACT:
            return found
    return found


def lora_gap(kind: str) -> float:
    """Return the gap of the engine with adapters, all of which have an effect and a gradient."""
    model = made(kind)
    LoRA(rank=2, alpha=4).adapt(model)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = logprobs(model)
        for p in adapter_parameters(model, "policy"):
            p.add_(0.1 * torch.randn(p.shape, generator=random))
        assert (logprobs(model) - before).abs().max() > 1e-3
    logprobs(model).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused, f"without effect: {unused}"
    return gap_of(model)[1]


def sharded_gap(kind: str) -> float | str:
    """Return by how much log-probs differ after sharding, nats. Also checks the gradient. Runs on each rank."""
    model, sharded = made(kind), made(kind)
    strategy = connect("fsdp")
    try:
        sharded = strategy.shard(sharded)
    except UserError as error:
        return str(error)
    ours, theirs = logprobs(model), logprobs(sharded)
    ours.sum().backward()
    theirs.sum().backward()
    for (name, p), q in zip(model.named_parameters(), sharded.parameters(), strict=True):
        if p.grad is not None and p.grad.abs().max() > 1e-6:
            error = (full(q.grad) - p.grad).abs().max() / p.grad.abs().max()
            assert error < 1e-2, f"{name}: the gradient is off by {float(error):.2g}"
    return float((ours - theirs).abs().max())


def sharded_gaps(kinds: list[str]) -> list[float | str]:
    found: list[float | str] = []
    for kind in kinds:
        try:
            found.append(sharded_gap(kind))
        except Exception as error:
            found.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    return found


def power(gap: float) -> str:
    """Return the smallest power of ten that a gap is below, at least 1e-6."""
    return "none" if math.isnan(gap) else f"1e{max(-6, math.floor(math.log10(max(gap, 1e-9))) + 1)}"


def measure(kinds: list[str], sharded: bool = True) -> list[dict[str, str]]:
    """Return the rows of the table. Without ``sharded``, FSDP2 is not tried, which needs two processes."""
    first: list[float | str] = [0.0] * len(kinds)
    second = first
    if sharded:
        group = Group(2)
        try:
            first, second = group.run(sharded_gaps, kinds)
        finally:
            group.stop()
    rows = []
    for kind, shard, other in zip(kinds, first, second, strict=True):
        model = made(kind)
        row = {"family": kind, "class": type(model).__name__}
        try:
            check_head(model)
        except UserError as error:
            rows.append({**row, "engine": "none", "gap": "none", "lora": "no", "fsdp2": "no", "why": str(error)})
            continue
        engine, gap = gap_of(model)
        try:
            lora = lora_gap(kind)
        except Exception as error:
            lora = f"{type(error).__name__}: {error}"
        differs = [x for x in (shard, other) if isinstance(x, str) or x > EXACT]
        row |= {"engine": engine, "gap": power(gap)}
        row |= {
            "lora": "yes" if isinstance(lora, float) and lora < EXACT else "no",
            "fsdp2": "no" if differs else "yes",
        }
        why = [x for x in (lora, *differs[:1]) if isinstance(x, str)]
        rows.append({**row, "why": "; ".join(why)})
    return rows


def table(rows: list[dict[str, str]]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| family | class of transformers | engine | sampler gap below, nats | LoRA | FSDP2 |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["family"], f"`{row['class']}`", f"`{row['engine']}`", row["gap"], row["lora"], row["fsdp2"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = measure(list(PUBLISHED))
    DATA.write_text(json.dumps(rows, indent=1) + "\n")
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(before + START + table(rows) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
