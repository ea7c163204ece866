"""Tiny policies of many transformers model families."""

from dataclasses import dataclass
from typing import Any

import torch
from published_families import PUBLISHED, SIZES
from tiny_runs import WORDS

from gear_lightning.models import FromScratch

LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}
BART = {"d_model": 32, "max_position_embeddings": 256}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
BERT = {**LLAMA, "is_decoder": True}
# random in training: dropout as a module, as a number of a layer or of the config; layerdrop; routers
RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {**GPT, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}),
    "gpt2 attention": ("GPT2", {**GPT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.3}),
    "gpt_bigcode": ("GPTBigCode", {**GPT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.3}),
    "gptj": ("GPTJ", {**GPT, "rotary_dim": 4, "attn_pdrop": 0.3}),
    "codegen": ("CodeGen", {**GPT, "n_head": 4, "rotary_dim": 4, "resid_pdrop": 0.1}),
    "gpt_neo": ("GPTNeo", {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]],
                           "max_position_embeddings": 256, "attention_dropout": 0.3}),
    "gpt_neox": ("GPTNeoX", {**LLAMA, "hidden_dropout": 0.1}),
    "opt dropout": ("OPT", {**LLAMA, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.1}),
    "opt layerdrop": ("OPT", {**LLAMA, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0, "layerdrop": 0.5}),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 2, "hidden_dropout": 0.1}),
    "falcon": ("Falcon", {**LLAMA, "hidden_dropout": 0.1}),
    "persimmon": ("Persimmon", {**LLAMA, "attention_dropout": 0.3}),
    "phi": ("Phi", {**LLAMA, "embd_pdrop": 0.1}),
    "biogpt": ("BioGpt", {**LLAMA, "hidden_dropout_prob": 0.0, "layerdrop": 0.5}),
    "xglm": ("XGLM", {**BART, "ffn_dim": 64, "num_layers": 2, "attention_heads": 2, "activation_dropout": 0.1}),
    "bart": ("Bart", {**BART, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 64,
                      "is_decoder": True, "is_encoder_decoder": False, "dropout": 0.0, "decoder_layerdrop": 0.5}),
    "stablelm": ("StableLm", {**LLAMA, "hidden_dropout": 0.1}),
    "starcoder2": ("Starcoder2", {**LLAMA, "residual_dropout": 0.1}),
    "seed_oss": ("SeedOss", {**LLAMA, "head_dim": 16, "residual_dropout": 0.1}),
    "nemotron": ("Nemotron", {**LLAMA, "attention_dropout": 0.3}),
    "doge": ("Doge", {**LLAMA, "hidden_dropout": 0.1}),
    "mixtral": ("Mixtral", {**LLAMA, **MOE, "sliding_window": None, "router_jitter_noise": 0.3}),
    "minimax_m2": ("MiniMaxM2", {**LLAMA, **MOE, "head_dim": 16, "rotary_dim": 8, "router_jitter_noise": 0.3}),
    "phimoe": ("Phimoe", {**LLAMA, **MOE, "router_jitter_noise": 0.1, "input_jitter_noise": 0.0}),
    "llama": ("Llama", {**LLAMA, "attention_dropout": 0.3}),
}  # fmt: skip
MIXED = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 16}),
    "qwen3_moe": ("Qwen3Moe", {**LLAMA, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                               "moe_intermediate_size": 32}),
    "deepseek_v3": ("DeepseekV3", {**LLAMA, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 16,
                                   "qk_nope_head_dim": 16, "v_head_dim": 24, "n_routed_experts": 8, "n_group": 2,
                                   "num_experts_per_tok": 2, "topk_group": 1, "moe_intermediate_size": 32,
                                   "first_k_dense_replace": 1, "n_shared_experts": 1}),
    "phi3": ("Phi3", {**LLAMA, "sliding_window": None}),
    "mpt": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 256}),
    "olmo2": ("Olmo2", LLAMA),
    "smollm3": ("SmolLM3", {**LLAMA, "no_rope_layers": [1, 0]}),
    "gemma3": ("Gemma3Text", {**LLAMA, **MIXED}),
    "lfm2": ("Lfm2", {**LLAMA, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
    "mamba": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
}  # fmt: skip
FAMILIES = {**RANDOM, **PLAIN}


@dataclass(frozen=True)
class Family(FromScratch):
    """A tiny model of a family of `FAMILIES` or `PUBLISHED`, or of a configuration class with its options, over whole
    words.

    Its weights are large, so that attention and routers matter.
    """

    words: str = WORDS
    kind: str = "llama"
    options: tuple[tuple[str, Any], ...] = ()

    def config(self) -> Any:
        import transformers

        name, options = FAMILIES.get(self.kind, (self.kind, {}))
        if self.kind in PUBLISHED:
            name, options = PUBLISHED[self.kind][0], {**SIZES, **PUBLISHED[self.kind][1]}
        tokenizer = self.tokenizer()
        ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
        options = {"vocab_size": len(tokenizer), **ids, **options, **dict(self.options)}
        return getattr(transformers, f"{name}Config")(**options)

    def model(self) -> Any:
        from transformers import AutoModelForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = AutoModelForCausalLM.from_config(self.config())
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(3 if p.dim() > 1 else 1)
        return model

    def skeleton(self) -> Any:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config())
