"""Draws the committed results: `python benchmarks/plot.py` (extra: bench)."""

import csv
import json
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
COLOURS = {"trl": "#8a8d94", "grpo": "#1f66b3", "gear": "#d97706"}


def draw_step() -> None:
    """Draw the seconds of one optimizer step, by side."""
    result = json.loads((HERE / "results" / "step.json").read_text())
    median = result["median_seconds"]
    names = {"trl": f"TRL {result['versions']['trl']} GRPO", "grpo": "GRPO here", "gear": "GEAR here"}
    figure, axes = plt.subplots(figsize=(7, 2.4), layout="constrained")
    for place, side in enumerate(names):
        left = 0.0
        for part, alpha in (("rollout", 0.55), ("teacher", 0.8), ("update", 1.0)):
            if seconds := median[side].get(part, 0.0):
                axes.barh(place, seconds, left=left, color=COLOURS[side], alpha=alpha)
                axes.text(left + seconds / 2, place, part, ha="center", va="center", color="white", fontsize=9)
                left += seconds
        ratio = "" if side == "trl" else f"   {result['ratio_to_trl'][side]:.2f} x"
        axes.text(left, place, ratio, va="center", fontsize=9)
    axes.set_yticks(range(len(names)), list(names.values()))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(m["step"] for m in median.values()))
    axes.set_xlabel("seconds per optimizer step (0.8M Llama, 32 x 64 tokens, float32, one thread)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "step.png", dpi=130)


def draw_memory() -> None:
    """Draw the peak memory of scoring over vocabulary x tokens, in chunks and with all logits at once."""
    result = json.loads((HERE / "results" / "memory.json").read_text())
    sides = {
        "whole": ("all logits at once, forward and backward", "#8a8d94", "s"),
        "pieces": ("policy here, forward and backward", "#d97706", "o"),
        "teacher": ("teacher here", "#1f66b3", "x"),
    }
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    for side, (name, colour, marker) in sides.items():
        cases = [c for c in result["found"] if c["side"] == side]
        points = sorted((c["vocabulary"] * c["tokens"], c["peak_bytes"] / 2**20) for c in cases)
        axes.plot(*zip(*points, strict=True), marker, color=colour, label=name, markersize=5, fillstyle="none")
    axes.axvline(result["setting"]["logits_in_a_piece"], color="#c9ccd1", linewidth=1, linestyle="--")
    axes.text(result["setting"]["logits_in_a_piece"], 2500, " one chunk", fontsize=8, color="#8a8d94")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("vocabulary x tokens of a micro-batch (float32)")
    axes.set_ylabel("peak, MiB")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(DOCS / "memory.png", dpi=130)


def draw_rollout() -> None:
    """Draw the tokens per second of rollouts, by side, and steps per second with rollouts ahead."""
    result = json.loads((HERE / "results" / "rollout.json").read_text())
    if missing := {"rollout", "ahead"} - result.keys():
        print(f"rollout.png is left out: results/rollout.json lacks {', '.join(missing)}")
        return
    rollout, ahead = result["rollout"], result["ahead"]
    versions = rollout["versions"]
    names = {
        "trl": (f"TRL {versions['trl']}, transformers", "#8a8d94"),
        "cached": ("CachedEngine", "#1f66b3"),
        "vllm": (f"VLLMEngine, vLLM {versions.get('vllm', '')}", "#d97706"),
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.2), layout="constrained", width_ratios=(3, 2))
    shown = [side for side in names if side in rollout["tokens_per_s"]]
    for place, side in enumerate(shown):
        speed = rollout["tokens_per_s"][side]["median"]
        left.barh(place, speed, color=names[side][1])
        ratio = rollout["ratios"].get(f"{side} / trl")
        left.text(
            speed, place, f"  {speed:.0f}" + (f"   {ratio['median']:.2f} x" if ratio else ""), va="center", fontsize=9
        )
    left.set_yticks(range(len(shown)), [names[side][0] for side in shown])
    left.set_xlim(0, 1.3 * max(rollout["tokens_per_s"][side]["median"] for side in shown))
    left.set_xlabel("sampled tokens per second (SmolLM2-135M, float32, 4 turns with a tool)", fontsize=9)
    for place, (value, speed) in enumerate(ahead["steps_per_s"].items()):
        right.barh(place, speed, color="#d97706", alpha=1.0 if place else 0.5)
        ratio = next((r for name, r in ahead["ratios"].items() if name.startswith(f"{value} /")), None)
        right.text(
            speed, place, f"  {speed:.2g}" + (f"   {ratio['median']:.2f} x" if ratio else ""), va="center", fontsize=9
        )
    right.set_yticks(range(len(ahead["steps_per_s"])), [f"ahead: {value}" for value in ahead["steps_per_s"]])
    right.set_xlim(0, 1.4 * max(ahead["steps_per_s"].values()))
    right.set_xlabel("optimizer steps per second, two cores", fontsize=9)
    for axes in (left, right):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "rollout.png", dpi=130)


def draw_curves() -> None:
    """Draw the success over iterations of the runs in docs/runs."""
    files = sorted((DOCS / "runs").glob("*.csv"))
    figure, axes = plt.subplots(1, len(files), figsize=(3.4 * len(files), 2.8), layout="constrained", squeeze=False)
    for ax, path in zip(axes[0], files, strict=True):
        with path.open() as file:
            rows = list(csv.DictReader(file))
        for name, colour, style in (("train/success", "#8a8d94", "-"), ("val/success", "#d97706", "o-")):
            points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
            ax.plot(*zip(*points, strict=True), style, color=colour, label=name, linewidth=1.5, markersize=4)
        ax.set_title(path.stem, fontsize=10)
        ax.set_xlabel("optimizer steps")
        ax.set_ylim(bottom=0)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(DOCS / "runs.png", dpi=130)


if __name__ == "__main__":
    draw_step()
    draw_memory()
    draw_rollout()
    draw_curves()
