"""Writes the model card of an export: base model, method, data, results, and code version.

The information comes from the checkpoint and from the run directory around it, if that still exists. The card may be
published, but the config can contain private values. Therefore only sections that describe the training are shown,
values under secret-like names and credentials in URLs are masked, and only the last component of paths is shown.
"""

import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..runs.metrics_file import read_columns

SECTIONS = ("seed_everything", "model", "data", "generation", "warm_start")
OF_TRAINER = (  # keys of the trainer section that are shown; it also contains loggers and plugins
    "max_epochs", "max_steps", "precision", "gradient_clip_val", "gradient_clip_algorithm", "strategy", "devices",
    "num_nodes", "check_val_every_n_epoch",
)  # fmt: skip
METRICS = ("val/", "train/reward", "train/success", "train/response_tokens", "perf/rollouts", "perf/sampled_tokens")
UNKNOWN = "The run's `config.yaml` was missing or not readable: the recipe and the data are unknown."
LARGEST = 20_000  # maximum number of values in a config that is shown
_SECRET = re.compile(r"(^|[_-])(key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+@|(?<=[?&])(?:\w*(?:key|token|secret|signature))=[^&\s]+", re.IGNORECASE)


class _Dumper(yaml.SafeDumper):
    """YAML dumper that writes multi-line text in one line, with escapes."""


def _one_line(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


_Dumper.add_representer(str, _one_line)


def model_card(
    checkpoint: Path,
    state: dict[str, Any],
    *,
    name: str,
    adapter: bool,
    license: str | None,
    loader: str = "AutoModelForCausalLM",
) -> str:
    """Return the text of a README.md with the hub's YAML front matter.

    Args:
        checkpoint: the checkpoint file; the run directory is the parent of its folder, or its folder.
        state: contents of the checkpoint.
        name: name of the model.
        adapter: whether only adapters are exported.
        license: license to name. None: no license is named.
        loader: class of transformers that loads the model.
    """
    from huggingface_hub import ModelCardData

    run, made_by, step = _run_of(checkpoint), state.get("made_by"), state.get("global_step")
    recipe = {} if run is None else _recipe(run / "config.yaml")
    base = _name(_at(made_by, "base_model"))
    step = step if isinstance(step, int) else 0
    front = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text" if "Image" in loader else "text-generation",
        base_model=base,
        license=license,
        tags=["gear_lightning", "reinforcement-learning"],
    )
    about = _about(recipe, base, _name(_at(made_by, "version")), _name(_at(made_by, "commit")), step)
    body = [about, _use(base or "base", adapter, loader), _data(recipe), _results(run, step), _whole(recipe) or UNKNOWN]
    return "\n\n".join([f"---\n{front.to_yaml()}\n---", f"# {_text(name)}", *filter(None, body)]) + "\n"


def _about(recipe: dict[str, Any], base: str | None, version: str | None, commit: str | None, step: int) -> str:
    model = _at(recipe, "model")
    policy = _at(model, "policy")
    named = _cell(_at(policy, "init_args", "path") or _class(policy) or "A model")
    begun = f"[{base}](https://huggingface.co/{base})" if base else f"`{named}`"
    classes = {part: _class(_at(model, part)) for part in ("credit", "objective", "distillation")}
    method = [f"{part} `{_cell(kind)}`" for part, kind in classes.items() if kind]
    method += ["low-rank adapters"] if _at(model, "lora") else []
    code = f"gear_lightning {version or '(version unknown)'}" + (f", commit `{commit}`" if commit else "")
    steps = f"{step} optimizer step{'s' * (step != 1)}"
    return f"{begun} after reinforcement learning with {code}: {', '.join([*method, steps])}."


def _run_of(checkpoint: Path) -> Path | None:
    """Return the run directory that contains a checkpoint; None if the checkpoint was moved out of it."""
    for folder in (
        checkpoint.absolute().parent.parent,
        checkpoint.absolute().parent,
        checkpoint.resolve().parent.parent,
    ):
        if (folder / "config.yaml").is_file():
            return folder
    return None


def _recipe(path: Path) -> dict[str, Any]:
    """Return the sections of a config that are shown, with private values masked."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            return {}
        shown = {key: found[key] for key in SECTIONS if key in found}
        trainer = found.get("trainer")
        if isinstance(trainer, dict):
            shown["trainer"] = {key: trainer[key] for key in OF_TRAINER if trainer.get(key) is not None}
        return _masked(shown, count(1))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}


def _masked(value: Any, seen: Iterator[int], name: str = "") -> Any:
    if next(seen) > LARGEST:  # aliases can make a few lines of YAML expand endlessly
        raise ValueError("the recipe is too large")
    if value is not None and _SECRET.search(name):
        return "(left out)"
    if isinstance(value, dict):
        return {key: _masked(item, seen, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_masked(item, seen) for item in value]
    if isinstance(value, str):
        if re.fullmatch(r"(/|~/)[^\n]*", value):
            return f".../{value.rstrip('/').rpartition('/')[2]}"
        return _IN_ADDRESS.sub("(left out)", value)
    return value


def _name(value: Any) -> str | None:
    """Return a hub id, a version or a commit from a checkpoint; None for any other value."""
    return value if isinstance(value, str) and re.fullmatch(r"[\w.+-]+(/[\w.+-]+)?", value, re.ASCII) else None


def _at(found: Any, *keys: str) -> Any:
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _class(part: Any) -> str | None:
    """Return the class name of a ``class_path`` entry in a config, without its module; None if there is none."""
    path = _at(part, "class_path")
    return path.rpartition(".")[2] if isinstance(path, str) else None


def _use(base: str, adapter: bool, loader: str) -> str:
    lines = [f"from transformers import {loader}, AutoTokenizer, GenerationConfig", ""]
    if adapter:
        lines[:1] = ["from peft import PeftModel", lines[0]]
        lines += [
            f"model = PeftModel.from_pretrained({loader}.from_pretrained({base!r}), DIRECTORY)",
            "model.generation_config = GenerationConfig.from_pretrained(DIRECTORY)  # the stop tokens of training",
        ]
    else:
        lines[0] = f"from transformers import {loader}, AutoTokenizer"
        lines.append(f"model = {loader}.from_pretrained(DIRECTORY)")
    lines.append("tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)  # with the chat template of training")
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```"


def _data(recipe: dict[str, Any]) -> str:
    rows = []
    for key, use in (("train_tasks", "training"), ("val_tasks", "evaluation")):
        source = _at(recipe, "data", key)
        if isinstance(source, dict):
            given = _at(source, "init_args") or {}
            options = ", ".join(f"{k}={v!r}" for k, v in given.items() if v is not None)
            rows.append(f"| {use} | `{_cell(_at(source, 'class_path'))}` | {_cell(options)} |")
    warm = _at(recipe, "warm_start", "demonstrations")
    if isinstance(warm, dict):
        rows.append(f"| warm start | `{_cell(_at(warm, 'class_path'))}` | {_cell(_at(warm, 'init_args') or '')} |")
    return "\n".join(["## Data", "", "| | tasks | options |", "|---|---|---|", *rows]) if rows else ""


def _results(run: Path | None, step: int) -> str:
    """Return a table with the first value of each metric, and the newest value up to the checkpoint's step."""
    try:
        columns = {} if run is None else read_columns(run / "metrics.csv")
    except UserError:
        return ""
    rows = list(_rows(columns, step))
    head = ["## Results", "", "| metric | at the start | newest | after step |", "|---|---|---|---|"]
    return "\n".join([*head, *rows]) if rows else ""


def _rows(columns: dict[str, Any], step: int) -> Iterator[str]:
    for name, (steps, values) in sorted(columns.items(), key=lambda item: (not item[0].startswith("val/"), item[0])):
        known = steps <= step
        if name.startswith(METRICS) and known.any():
            at, value = int(steps[known][-1]), values[known][-1]
            yield f"| {_cell(name)} | {values[known][0]:.4g} | {value:.4g} | {at} |"


def _whole(recipe: dict[str, Any]) -> str:
    if not recipe:
        return ""
    text = yaml.dump(recipe, Dumper=_Dumper, sort_keys=False, width=100)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    head = "## Recipe\n\n<details><summary>The options of the run</summary>\n\n"
    return f"{head}{fence}yaml\n{text}{fence}\n\n</details>"


def _text(value: Any) -> str:
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(value).split()))


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")[:300]
