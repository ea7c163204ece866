"""The memory table of docs/scaling.md: estimates of ``gear-lightning doctor`` for models of four sizes.

    python benchmarks/scaling_table.py           # prints the table
    python benchmarks/scaling_table.py --write   # writes it to docs/scaling.md

The models have the shapes of Qwen2.5-0.5B and -1.5B, Llama-3-8B and Qwen3-32B; no memory is allocated.
"""

import argparse
import json
import os
import re
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "scaling.md"
GPUS, ROOM = 8, 80.0  # number of GPUs, and GiB of each
SIZES = {  # hidden, intermediate, layers, heads, key-value heads, head width, vocabulary, tied embeddings
    "0.5B": ("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True),
    "1.5B": ("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True),
    "8B": ("llama", 4096, 14336, 32, 32, 8, 128, 128256, False),
    "32B": ("qwen3", 5120, 25600, 64, 64, 8, 128, 151936, False),
}
RECIPE = [
    f"--config={ROOT}/configs/quickstart.yaml", "--warm_start=null",
    f"--config={ROOT}/configs/strategy/ddp.yaml", f"--config={ROOT}/configs/optimizer/fused_adamw.yaml",
    "--trainer.accelerator=gpu", "--model.activation_checkpointing=true",
    "--data.tasks_per_iteration=8", "--data.group_size=8", "--data.micro_batch_size=1", "--data.val_tasks=null",
    "--generation.budgets.context=4096", "--generation.budgets.tokens=2048",
]  # fmt: skip
WAYS = {
    "full, bf16-mixed": ["--trainer.precision=bf16-mixed"],
    "full, bf16-true": ["--trainer.precision=bf16-true"],
    "LoRA, bf16-true": ["--trainer.precision=bf16-true", f"--config={ROOT}/configs/model/lora.yaml"],
}


def _directory(size: str, where: Path) -> Path:
    """Write a model directory without weights, and return its path."""
    kind, hidden, inner, layers, heads, keys, width, vocabulary, tied = SIZES[size]
    folder = where / size
    folder.mkdir(parents=True)
    config = {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": width, "vocab_size": vocabulary,
        "tie_word_embeddings": tied, "max_position_embeddings": 32768,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def table() -> str:
    """Return the table as Markdown: GiB of the larger phase on each GPU."""
    from gear_lightning.commands.doctor import columns, configured_strategy, load_of, read_recipe, setup_of, skeleton_of
    from gear_lightning.recipes.memory import STRATEGIES
    from gear_lightning.recipes.model_shape import model_shape

    rows = ["| model | training | " + " | ".join(STRATEGIES) + " | checkpoint |", "|---|---|" + "--:|" * 7]
    with tempfile.TemporaryDirectory() as where:
        for size in SIZES:
            path = _directory(size, Path(where))
            source = ["--model.policy=gear_lightning.models.Pretrained", f"--model.policy.path={path}"]
            for way, options in WAYS.items():
                recipe = read_recipe([*RECIPE, *source, *options])
                shape = model_shape(skeleton_of(recipe))
                setup = setup_of(recipe, shape.trainable, configured_strategy(recipe.trainer)[1], True)
                found = columns(shape, GPUS, load_of(recipe, GPUS), setup, "ddp", ROOM)
                cells = []
                for numbers in found.values():
                    gib = numbers["total"] / 2**30
                    cells.append(f"{gib:.0f}" if gib <= 0.9 * ROOM else f"({gib:.0f})")
                saved = found["ddp"]["saving"] / 2**30
                rows.append(f"| {size} | {way} | " + " | ".join(cells) + f" | {saved:.{0 if saved >= 1 else 1}f} |")
    return "\n".join(rows)


def main() -> None:
    """Print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    made = table()
    print(made)
    if options.write:
        text = PAGE.read_text()
        PAGE.write_text(re.sub(r"\| model \| training \|.*?\n\n", lambda _: made + "\n\n", text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
