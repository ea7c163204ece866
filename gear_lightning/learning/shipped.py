"""Files published with a model besides its weights: how they get into a checkpoint, and from there into an export.

Files are stored as bytes and JSON is stored as JSON. A configuration object of transformers would drop keys that it
does not know, refuse to save a contradictory generation configuration that it has loaded, and write a new one without
the stop tokens (https://github.com/huggingface/transformers/issues/29988).
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError

CONFIG, GENERATION = "config.json", "generation_config.json"
KEPT = (
    CONFIG, GENERATION, "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "special_tokens_map.json", "added_tokens.json",
    "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "NOTICE.md", "USE_POLICY.md",
)  # fmt: skip
LARGEST = 32 << 20  # maximum bytes of one file; no tokenizer is larger, and every checkpoint holds each file
# keys dropped from a shipped configuration: code that is not copied, quantization that no longer applies, and keys that
# transformers writes itself
_DROPPED = ("auto_map", "quantization_config", "_name_or_path", "transformers_version", "dtype", "torch_dtype")
_CHAT_TEMPLATES = r"(additional_chat_templates/)?[A-Za-z0-9_][A-Za-z0-9_.-]*\.jinja"
_PLAIN = r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.(json|txt|model)"
_TERMS = r"(LICENSE|NOTICE|USE_POLICY)(\.(txt|md))?"


OBJECTS = (  # files of a model directory that are one JSON object
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.json", "adapter_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json",
)  # fmt: skip


def check_object(file: Path) -> None:
    """Check a file of a model directory, if it exists.

    Raises:
        UserError: it is not a JSON object; names the file.
    """
    if not os.path.isfile(file):  # Path.is_file raises an error for some names
        return
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: no valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: found {json.dumps(found)[:40]}, expected a JSON object")


def shipped_files(where: str) -> dict[str, bytes]:
    """Return the files of `KEPT` that a model has.

    Args:
        where: a model directory, or a hub id. For a hub id, the two configurations are fetched (loading the model needs
            them), and the other files are read only if they are in the cache.

    Raises:
        UserError: a file cannot be read.
    """
    found = {}
    for name in KEPT:
        path = Path(where) / name if Path(where).is_dir() else _of_hub(where, name)
        try:
            if path is not None and path.is_file() and _inside(path) and 0 < path.stat().st_size <= LARGEST:
                found[name] = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return found


def _inside(path: Path) -> bool:
    """Return whether a file is in its folder, so that a link in a downloaded model cannot publish a local file.

    Links from the snapshots to the blobs of the hub's cache are allowed.
    """
    folder = path.parent.resolve()
    allowed = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else folder
    return path.resolve().is_relative_to(folder) or path.resolve().is_relative_to(allowed)


def _of_hub(model: str, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from transformers.utils.hub import cached_file

    try:
        fetch = name in (CONFIG, GENERATION)
        found = cached_file(model, name) if fetch else try_to_load_from_cache(model, name)
    except (OSError, ValueError):  # no such file, or no such model: loading the model reports that
        return None
    return Path(found) if isinstance(found, str) else None


def read_json(name: str, content: bytes) -> dict[str, Any]:
    """Return a file's JSON object.

    Args:
        name: of the file, for the error.
        content: of the file.

    Raises:
        UserError: the content is not a JSON object.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not JSON ({' '.join(str(error).split())})") from None
    if not isinstance(found, dict):
        raise UserError(f"{name} does not hold a JSON object")
    return found


def stop_ids(files: Mapping[str, bytes], where: str = "") -> list[int]:
    """Return the tokens at which ``generate`` of the published model stops.

    They come from the generation configuration, or from the configuration if there is none.

    Args:
        files: result of `shipped_files`.
        where: the model, for errors.

    Raises:
        UserError: the file is not JSON.
    """
    name = next((name for name in (GENERATION, CONFIG) if name in files), None)
    if name is None:
        return []
    config = read_json(f"{where}/{name}" if where else name, files[name])
    given = config.get("eos_token_id")
    if given is None and isinstance(config.get("text_config"), dict):
        given = config["text_config"].get("eos_token_id")
    return _ids(given)


def _ids(given: Any) -> list[int]:
    several = given if isinstance(given, list) else [given]
    return [i for i in several if isinstance(i, int) and not isinstance(i, bool)]


def generation_config(shipped: Mapping[str, Any], stops: Iterable[int]) -> dict[str, Any]:
    """Return a generation configuration with the stop tokens that sampling in training uses.

    Args:
        shipped: the model's own; everything except its stop tokens is kept.
        stops: `Chat.stop_ids`.
    """
    stops = set(stops)
    first = [i for i in dict.fromkeys(_ids(shipped.get("eos_token_id"))) if i in stops]
    ids = [*first, *sorted(stops - {*first})]
    kept = {key: value for key, value in shipped.items() if key != "_from_model_config"}
    return {**kept, "eos_token_id": ids[0] if len(ids) == 1 else ids}


def merged_config(shipped: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the saved configuration, completed with keys of the shipped one.

    Version 5 of transformers renames keys (``rope_theta`` became ``rope_parameters``); other engines and version 4 read
    the old names, and would silently use a default.

    Args:
        shipped: as published, or as returned by an earlier call.
        saved: as written by transformers.
    """
    if shipped.get("model_type") != saved.get("model_type"):  # the text part of a larger model
        shipped = {}
    merged = {**{k: v for k, v in shipped.items() if k not in _DROPPED}, **saved}
    merged.pop("auto_map", None)
    if "torch_dtype" in shipped and "dtype" in merged:  # also under its old name
        merged["torch_dtype"] = merged["dtype"]
    return merged


def as_json(value: Mapping[str, Any]) -> bytes:
    """Return a configuration file's content."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def policy_files(
    made: Mapping[str, bytes], shipped: Mapping[str, bytes], generation: Mapping[str, Any], stops: Iterable[int]
) -> dict[str, bytes]:
    """Return all files of a policy besides its weights.

    Args:
        made: files that transformers writes for it: configuration and tokenizer.
        shipped: result of `shipped_files`; ``made`` takes precedence.
        generation: of the policy, for a model that was published without a generation configuration.
        stops: `Chat.stop_ids`.

    Raises:
        UserError: a shipped file is not JSON.
    """
    config = read_json(CONFIG, made[CONFIG])
    if CONFIG in shipped:
        config = merged_config(read_json(CONFIG, shipped[CONFIG]), config)
    if GENERATION in shipped:
        generation = read_json(GENERATION, shipped[GENERATION])
    written = {CONFIG: as_json(config), GENERATION: as_json(generation_config(generation, stops))}
    return {**shipped, **made, **written}


def file_name(name: Any) -> str:
    """Check and return the name of a file that a checkpoint may hold.

    Allowed are configuration, tokenizer, chat template and terms of use, never code, weights or paths in other folders.

    Raises:
        ValueError: the name is not allowed.
    """
    plain = (
        isinstance(name, str)
        and len(name) < 200
        and any(re.fullmatch(p, name) for p in (_PLAIN, _CHAT_TEMPLATES, _TERMS))
    )
    if not plain or name.startswith("adapter_") or name.endswith(".index.json"):
        raise ValueError(f"it holds a file {name!r}, which is not part of a tokenizer or a configuration")
    return name
