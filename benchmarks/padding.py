"""Padding of micro-batches of GSM8K rollouts, for several ways to form them.

    python benchmarks/padding.py                          # from the committed lengths; writes results/padding.json
    python benchmarks/padding.py --run RUN --tasks FILE   # reads the lengths from a run's records first

The committed lengths are those of all 384 rollouts of a run of `configs/smollm2_gsm8k.yaml` over 12 iterations, with
the whole training file of GSM8K (the run of docs/log.md): SmolLM2-135M-Instruct after its warm start, 4 tasks x 8
rollouts per iteration. ``policy`` is a rollout's number of tokens in the policy's view, ``teacher`` in the teacher's
view, which also contains the worked solution.
"""

import argparse
import csv
import datetime
import itertools
import json
from collections.abc import Callable
from pathlib import Path

from gear_lightning.generation.packing import balanced_split

RESULTS = Path(__file__).parent / "results"
LENGTHS = RESULTS / "gsm8k_lengths.csv"
Row = tuple[int, int]
Parts = list[list[Row]]


def in_slices(rows: list[Row], parts: int) -> Parts:
    """Split into parts with equal numbers of rows."""
    size = -(-len(rows) // parts)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def balanced(rows: list[Row], parts: int) -> Parts:
    """Split as the data module does."""
    rows = sorted(rows, key=lambda row: (sum(row), row))
    return [[rows[i] for i in part] for part in balanced_split(rows, parts)]


WAYS: dict[str, Callable[[list[Row], int], Parts]] = {
    "as they come": in_slices,
    "sorted, equal rows": lambda rows, parts: in_slices(sorted(rows), parts),
    "balanced": balanced,
}


def size(part: list[Row]) -> int:
    """Return the number of padded tokens of both views."""
    return len(part) * sum(map(max, zip(*part, strict=True))) if part else 0


def read_lengths() -> list[list[Row]]:
    """Return the lengths of each iteration's rollouts."""
    with LENGTHS.open() as file:
        rows = list(csv.DictReader(file))
    by_iteration = itertools.groupby(rows, key=lambda row: row["iteration"])
    return [[(int(row["policy"]), int(row["teacher"])) for row in group] for _, group in by_iteration]


def take_lengths(run: Path, tasks: Path) -> None:
    """Write the lengths of a run's rollouts; ``tasks`` is the GSM8K file that the run used."""
    from transformers import AutoTokenizer

    from gear_lightning.environments.gsm8k import GSM8KTasks
    from gear_lightning.generation.chat import Chat, ChatOptions
    from gear_lightning.runs.records import read_records
    from gear_lightning.teacher import TeacherOptions, privileged_prompt

    chat = Chat(AutoTokenizer.from_pretrained(run / "tokenizer"), ChatOptions("json_list"))
    source = GSM8KTasks(str(tasks))
    known = {task.id: task for task in map(source.__getitem__, range(source.size))}
    with LENGTHS.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["iteration", "group", "policy", "teacher"])
        for record in read_records(run):
            lengths = record.tensors["valid"].sum(-1).tolist()
            for rollout in record.rollouts:
                if rollout["row"] is None:
                    continue
                task, length = known[rollout["task_id"]], lengths[rollout["row"]]
                prompt = chat.prompt(task.messages, task.tools)
                shown, _ = privileged_prompt(task, task.messages, chat, TeacherOptions())
                teacher = length - len(prompt) + len(shown)
                table.writerow([record.iteration, rollout["group_id"], length, teacher])


def main() -> None:
    """Compare the ways to form micro-batches and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="a run directory with GSM8K rollouts")
    parser.add_argument("--tasks", type=Path, help="the GSM8K file that it trained on")
    options = parser.parse_args()
    if options.run:
        take_lengths(options.run, options.tasks)
    iterations = read_lengths()
    tokens = sum(sum(map(sum, rows)) for rows in iterations)
    found = []
    for micro_batch_size in (2, 4, 8, 16):
        for name, way in WAYS.items():
            parts = [way(rows, -(-len(rows) // micro_batch_size)) for rows in iterations]
            sizes = [size(part) for split in parts for part in split]
            found.append(
                {
                    "micro_batch_size": micro_batch_size,
                    "way": name,
                    "padding_fraction": round(1 - tokens / sum(sizes), 4),
                    "largest_padded_tokens": max(sizes),
                }
            )
            print(json.dumps(found[-1]))
    result = {
        "date": datetime.date.today().isoformat(),
        "rollouts": sum(map(len, iterations)),
        "rollouts_per_iteration": len(iterations[0]),
        "tokens": tokens,
        "found": found,
    }
    (RESULTS / "padding.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
