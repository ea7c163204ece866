"""Tiny vision-language models with the word tokenizer, as model directories."""

from pathlib import Path
from typing import Any

import torch
from tiny_runs import source

TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 16,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip
TOWER = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
          "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}  # fmt: skip
# configuration class without "Config", options of the language model, of the image encoder
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Qwen2.5-VL": ("Qwen2_5_VL", MROPE, TOWER),
    "Qwen3-VL": ("Qwen3VL", MROPE, {**TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}),
    "Gemma 3": ("Gemma3", {"sliding_window": 16}, VISION),
    "Mistral 3": ("Mistral3", {"model_type": "mistral"}, {**VISION, "model_type": "pixtral", "head_dim": 16}),
    "Llama 4": ("Llama4", {"intermediate_size_mlp": 64, "num_local_experts": 2, "num_experts_per_tok": 1,
                           "no_rope_layers": [1, 0]},
                {**VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}),
    "Qwen3.5": ("Qwen3_5", LINEAR, {**TOWER, "num_position_embeddings": 16}),
}  # fmt: skip


def write(kind: str, folder: Path) -> Path:
    """Write a tiny model of a kind, with random weights, and return its directory."""
    import transformers

    name, text, vision = KINDS[kind]
    tokenizer = source().tokenizer()
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    text = {**TEXT, **ids, "vocab_size": len(tokenizer), **text}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.dim() > 1 else 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
