"""The architectures of published models, as configurations of tiny models, and the gap of an engine on them."""

from typing import Any

import torch

from gear_lightning.generation.engine import GenerationEngine, Sampling, TurnRequest
from gear_lightning.learning.token_stats import token_stats

WINDOW = 16  # tokens, far below the lengths that are tried
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
HEAD = {"head_dim": 16}
MIXED = {**HEAD, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    **HEAD, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1}
MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 24, **ROUTED, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2}
NEMOTRON = {**HEAD, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1}
PER_LAYER = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 200}
SHARED_KV = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
MAMBA2 = {"state_size": 16, "num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1}
GRANITE = {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "attention_multiplier": 0.25}

# name of the family, configuration class of transformers without "Config", options
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 3": ("Llama", {}),
    "Llama 4": ("Llama4Text", {**HEAD, "intermediate_size_mlp": 128, "num_local_experts": 2, "num_experts_per_tok": 1,
                               "attention_chunk_size": WINDOW, "no_rope_layers": [1, 0],
                               "layer_types": ["chunked_attention", "full_attention"]}),
    "Qwen2.5": ("Qwen2", {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}),
    "Qwen3": ("Qwen3", HEAD),
    "Qwen3-MoE": ("Qwen3Moe", {**HEAD, **EXPERTS}),
    "Qwen3-Next": ("Qwen3Next", {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32}),
    "Qwen3.5": ("Qwen3_5Text", LINEAR),
    "Qwen3.5-MoE": ("Qwen3_5MoeText", {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32}),
    "Gemma 2": ("Gemma2", MIXED),
    "Gemma 3": ("Gemma3Text", MIXED),
    "Gemma 3n": ("Gemma3nText", {**MIXED, **PER_LAYER, **SHARED_KV, "laurel_rank": 8,
                                 "activation_sparsity_pattern": None}),
    "Gemma 4": ("Gemma4Text", {**MIXED, **PER_LAYER, **SHARED_KV, "global_head_dim": 32}),
    "Mistral 7B v0.1": ("Mistral", {**HEAD, "sliding_window": WINDOW}),
    "Mistral 7B v0.3": ("Mistral", {**HEAD, "sliding_window": None}),
    "Ministral": ("Ministral", MIXED),
    "Ministral 3": ("Ministral3", {**HEAD, "max_position_embeddings": 16384}),
    "Mixtral": ("Mixtral", {**LOCAL_EXPERTS, "sliding_window": None}),
    "Phi-3-mini": ("Phi3", {"sliding_window": WINDOW}),
    "Phi-4-mini": ("Phi3", {"sliding_window": 262144, "partial_rotary_factor": 0.75}),
    "Phi-4": ("Phi3", {"sliding_window": None}),
    "Phi-3.5-MoE": ("Phimoe", {**LOCAL_EXPERTS, "sliding_window": WINDOW}),
    "GPT-OSS": ("GptOss", {**MIXED, **LOCAL_EXPERTS, "max_position_embeddings": 131072}),
    "OLMo 2": ("Olmo2", {}),
    "OLMo 3": ("Olmo3", MIXED),
    "OLMo Hybrid": ("OlmoHybrid", LINEAR),
    "SmolLM3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "Granite 3": ("Granite", GRANITE),
    "Granite 4 hybrid": ("GraniteMoeHybrid", {**MAMBA, **LOCAL_EXPERTS, **GRANITE, "shared_intermediate_size": 32,
                                              "layer_types": ["mamba", "attention"]}),
    "Falcon-H1": ("FalconH1", {**MAMBA, **HEAD, "mamba_d_ssm": 128, "lm_head_multiplier": 0.5}),
    "Bamba": ("Bamba", {**MAMBA, "attn_layer_indices": [1]}),
    "Jamba": ("Jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                        "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8}),
    "Mamba": ("Mamba", {"state_size": 8}),
    "Mamba 2": ("Mamba2", MAMBA2),
    "Nemotron-H": ("NemotronH", {**NEMOTRON, "layers_block_type": ["mamba", "attention"]}),
    "Nemotron 3": ("NemotronH", {**NEMOTRON, **ROUTED, "num_hidden_layers": 3,
                                 "layers_block_type": ["mamba", "attention", "moe"]}),
    "LFM2": ("Lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_ff_dim": 128}),
    "LFM2-MoE": ("Lfm2Moe", {**EXPERTS, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3,
                             "num_dense_layers": 1}),
    "DeepSeek V3": ("DeepseekV3", MLA),
    "DeepSeek V3.2": ("DeepseekV32", {**MLA, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 256}),
    "GLM-4": ("Glm4", {**HEAD, "attention_bias": True}),
    "GLM-4.5": ("Glm4Moe", {**HEAD, **ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "Command R": ("Cohere", {"logit_scale": 0.0625}),
    "Command R7B": ("Cohere2", {**MIXED, "logit_scale": 0.25}),
    "MiniMax M1": ("MiniMax", {**HEAD, **LOCAL_EXPERTS, "block_size": 8,
                               "layer_types": ["linear_attention", "full_attention"]}),
    "MiniMax M2": ("MiniMaxM2", {**HEAD, **LOCAL_EXPERTS, "rotary_dim": 8}),
    "MiMo-V2-Flash": ("MiMoV2Flash", MIXED),
    "Seed-OSS": ("SeedOss", HEAD),
    "EXAONE 4": ("Exaone4", MIXED),
    "HunYuan": ("HunYuanDenseV1", HEAD),
    "ERNIE 4.5": ("Ernie4_5", HEAD),
    "Apertus": ("Apertus", {"max_position_embeddings": 65536}),
    "StableLM": ("StableLm", {}),
    "StarCoder2": ("Starcoder2", {"sliding_window": WINDOW}),
    "Pythia": ("GPTNeoX", {}),
    "GPT-2": ("GPT2", {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 256}),
    "BitNet": ("BitNet", {}),
    "NanoChat": ("NanoChat", {}),
    "RecurrentGemma": ("RecurrentGemma", {**HEAD, "num_hidden_layers": 3, "attention_window_size": WINDOW,
                                          "lru_width": 64}),
    "Bloom": ("Bloom", {"n_layer": 2, "n_head": 4}),
    "MPT": ("Mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}),
    "xLSTM": ("xLSTM", {"num_heads": 4, "num_blocks": 2}),
}  # fmt: skip


def engine_gap(model: Any, engine: GenerationEngine, sampling: Sampling = Sampling(), highest: int = 60) -> float:
    """Return the largest difference between an engine's log-probs and the trainer's, nats.

    Four conversations of up to three turns: contexts shorter and longer than `WINDOW`, two that share a prompt,
    observations of different lengths, and a conversation that ends early.

    Args:
        model: the policy.
        engine: samples from it.
        sampling: how.
        highest: the contexts have ids from 6 to this one.
    """
    random = torch.Generator().manual_seed(0)

    def text(length: int) -> list[int]:
        return torch.randint(6, highest, (length,), generator=random).tolist()

    shared = text(12)
    rows = [text(3), text(40), shared, list(shared)]
    reported: list[list[float | None]] = [[None] * len(row) for row in rows]
    turns = [0] * len(rows)
    engine.begin(model, sampling, set())

    def ask(key: int) -> None:
        engine.submit(TurnRequest(key, list(rows[key]), 6 + key, (key, turns[key])))
        turns[key] += 1

    for key in range(len(rows)):
        ask(key)
    while finished := engine.poll():
        for turn in finished:
            key, seen = turn.key, text(1 + 2 * turn.key)
            if turns[key] == (2 if key == 2 else 3):
                seen = []
                engine.release(key)
            rows[key] += turn.ids + seen
            reported[key] += [*turn.logprobs, *[None] * len(seen)]
            if seen:
                ask(key)
    engine.end()
    worst = 0.0
    for row, told in zip(rows, reported, strict=True):
        wanted = torch.tensor([[x is not None for x in told]])
        with torch.no_grad():
            stats = token_stats(
                model, torch.tensor([row]), torch.ones_like(wanted), wanted, temperature=sampling.scoring_temperature
            )
        theirs = torch.tensor([x for x in told if x is not None])
        worst = max(worst, float((stats.logprobs[wanted] - theirs).abs().max()))
    return worst
