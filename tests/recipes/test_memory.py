"""Memory estimates compared with hand-computed values, real models, and the bytes that autograd keeps."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from tiny_runs import source
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from gear_lightning.errors import UserError
from gear_lightning.learning.lora import LoRA
from gear_lightning.models import FromScratch, Pretrained
from gear_lightning.recipes.memory import (  # fmt: skip
    SHARDED,
    STRATEGIES,
    Load,
    Setup,
    element_bytes,
    estimate,
    layer_activations,
)
from gear_lightning.recipes.model_shape import ModelShape, model_shape

WORDS = "gear_lightning.environments.lookup_chain.WORDS"
GIB = 1 << 30
LLAMA_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False,
)  # fmt: skip
LOAD = Load(rows=2, length=1024, sampled=512, teacher_length=1024, micro_batches=4, rollouts=16, prefill=8192)
FULL = 8_030_261_248  # parameters of Llama-3-8B, from the safetensors metadata of its model card


@cache
def shape_8b() -> ModelShape:
    with torch.device("meta"):
        return model_shape(LlamaForCausalLM(LLAMA_8B))


def test_the_8b_shape_has_the_sizes_of_llama_3():
    shape = shape_8b()
    assert (shape.parameters, shape.trainable) == (FULL, FULL)
    assert shape.embedding == shape.head == 128256 * 4096
    # q and o, k and v, three MLP matrices, two norms
    assert shape.layer == 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert (shape.layers, shape.hidden, shape.kv_heads, shape.head_dim, shape.vocab) == (32, 4096, 8, 128, 128256)
    assert not shape.tied
    assert shape.gated
    assert not shape.qk_norm


def test_full_fine_tuning_of_8b_in_float32_matches_hand_computed_values():
    """20 bytes per parameter without sharding; one eighth of that on each of 8 GPUs with sharding."""
    setup = Setup(teacher_parameters=FULL)
    ddp = estimate(shape_8b(), "ddp", 8, LOAD, setup)
    kept = ("weights", "gradients", "optimizer", "teacher")
    assert {k: ddp[k] for k in kept} == {
        "weights": 4 * FULL, "gradients": 4 * FULL, "optimizer": 8 * FULL, "teacher": 4 * FULL,
    }  # fmt: skip
    assert ddp["buckets"] == 0
    assert estimate(shape_8b(), "ddp", 8, LOAD, replace(setup, bucket_view=False))["buckets"] == 4 * FULL
    fsdp = estimate(shape_8b(), "fsdp", 8, LOAD, setup)
    assert fsdp["buckets"] == 0
    assert {k: fsdp[k] for k in kept} == {k: ddp[k] // 8 for k in kept}
    zero1, zero2, zero3 = (estimate(shape_8b(), f"zero{n}", 8, LOAD, setup) for n in (1, 2, 3))
    assert [z["fp32_partition"] for z in (zero1, zero2, zero3)] == [FULL // 2] * 3
    assert zero3["gathered"] == 4 * 3 * 10**9, "10^9 parameters gathered, and the teacher's prefetched"
    assert [z["optimizer"] for z in (zero1, zero2, zero3)] == [FULL] * 3
    assert [z["gradients"] for z in (zero1, zero2, zero3)] == [4 * FULL, FULL // 2, FULL // 2]
    assert [z["weights"] for z in (zero1, zero2, zero3)] == [4 * FULL, 4 * FULL, FULL // 2]
    # a bucket holds 50 million float32 values; stages 1 and 2 use two, and only in the update
    assert [z["buckets"] for z in (zero1, zero2, zero3)] == [400_000_000, 400_000_000, 200_000_000]
    assert [z["teacher"] for z in (zero1, zero2, zero3)] == [4 * FULL, 4 * FULL, FULL // 2]


def test_strategy_independent_parts_of_8b_match_hand_computed_values():
    found = estimate(shape_8b(), "ddp", 1, LOAD, Setup(teacher_parameters=FULL))
    # 16 rows x 1024 columns x (8 heads x 128) x keys and values x 4 bytes, in 32 layers, once more for the unfinished
    # rows, and repeated for 32 heads
    assert found["kv_cache"] == 16 * 1024 * 1024 * 2 * 4 * (32 + 1 + 4)
    # a chunk is LOGITS // vocabulary = 130 of the 1024 scored tokens; four float32 copies
    assert found["logits"] == 130 * 128256 * 16
    assert found["new_gradient"] == 128256 * 4096 * 4
    # values that a layer keeps per token: 6 hidden, q and output, k and v, 4 MLP; 32 log-sum-exps, 2 rsqrt
    layer = 4 * (6 * 4096 + 2 * 4096 + 2 * 1024 + 4 * 14336 + 32 + 2)
    last = 2 * 1024 * 4096 * 12 + 2 * 512 * 4096 * 4
    passing = 2 * 1024 * 4 * (3 * 4096 + 3 * 14336)
    assert found["activations"] == 2 * 1024 * 32 * layer + last + passing
    checkpointed = estimate(shape_8b(), "ddp", 1, LOAD, Setup(teacher_parameters=FULL, activation_checkpointing=True))
    assert checkpointed["activations"] == 2 * 1024 * (32 * 4096 * 4 + layer) + last + passing
    assert found["buckets"] == 0, "one process has nothing to send"


def test_the_quickstart_model_matches_hand_computed_values():
    """0.8M parameters plus the vocabulary; one process, one micro-batch of 64 rows of 128 tokens."""
    shape = model_shape(FromScratch(WORDS).skeleton())
    vocab = shape.vocab
    layer = 4 * 128 * 128 + 3 * 128 * 512 + 2 * 128
    assert shape.layer == layer
    assert shape.parameters == 4 * layer + 128 + 2 * vocab * 128
    load = Load(rows=64, length=128, sampled=48, teacher_length=128, micro_batches=1, rollouts=64, prefill=5120)
    found = estimate(shape, "ddp", 1, load, Setup(teacher_parameters=shape.parameters, foreach=False))
    n = shape.parameters
    activations = 64 * 128 * 4 * 4 * (6 * 128 + 4 * 128 + 4 * 512 + 4 + 2)
    activations += 64 * 128 * 128 * 12 + 64 * 48 * 128 * 4 + 64 * 128 * 4 * (3 * 128 + 3 * 512)
    logits = 64 * 48 * vocab * 20  # one chunk: the policy's log-probs are kept in addition to the teacher's
    assert found["update"] == 16 * n + activations + logits, "there are no gradients in the only forward"
    cache = 64 * 128 * 128 * 2 * 4 * (4 + 1)
    assert found["rollout"] == 16 * n + cache + 5120 * 4 * (3 * 128 + 3 * 512)
    assert found["total"] == found["update"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bytes_of_each_precision(strategy):
    """bf16-mixed keeps everything in float32 plus a cast copy. bf16-true halves everything except averages, DeepSpeed's
    own state and the sums of gradients."""
    shape, setup = shape_8b(), Setup(teacher_parameters=FULL)
    full, mixed, low = (
        estimate(shape, strategy, 4, LOAD, replace(setup, precision=p, state_bytes=b))
        for p, b in (("32-true", 8.0), ("bf16-mixed", 8.0), ("bf16-true", 4.0))
    )
    for part in ("weights", "teacher"):
        assert mixed[part] == full[part]
        assert low[part] == full[part] // 2
    assert low["gradients"] == mixed["gradients"] == full["gradients"], "gradients are summed in float32"
    for part in ("fp32_partition", "optimizer"):
        assert mixed[part] == full[part]
    if strategy in ("ddp", "fsdp"):
        assert low["optimizer"] == full["optimizer"] // 2
        assert low["fp32_partition"] == 0
    else:  # DeepSpeed's optimizer works on float32 weights
        assert low["optimizer"] == full["optimizer"]
        assert low["fp32_partition"] == (0 if strategy == "zero3_offload" else FULL)
    assert full["autocast_copy"] == low["autocast_copy"] == 0
    # linear layers are cast, the embedding is not; FSDP2 gathers in bfloat16, ZeRO-3's layers keep no cast copy
    assert mixed["autocast_copy"] == (0 if strategy in SHARDED else 2 * (FULL - 128256 * 4096))
    share = 4 if strategy in SHARDED else 1
    assert (full["teacher_shadow"], low["teacher_shadow"]) == (
        0,
        0 if strategy == "zero3_offload" else 4 * FULL // share,
    )
    assert low["kv_cache"] == full["kv_cache"] // 2
    # rotated keys are float32 under autocast, values are not
    assert mixed["kv_cache"] == (low["kv_cache"] if strategy == "fsdp" else full["kv_cache"] * 3 // 4)


def test_fsdp_computes_only_in_bfloat16_under_bf16_mixed():
    shape, setup = shape_8b(), Setup(teacher_parameters=FULL)
    mixed, low = (estimate(shape, "fsdp", 8, LOAD, replace(setup, precision=p)) for p in ("bf16-mixed", "bf16-true"))
    for part in ("activations", "logits", "kv_cache", "sampling", "generation"):
        assert mixed[part] == low[part]
    assert mixed["gathered"] == low["gathered"], "includes a layer's gradients, which are reduced in float32"


def test_several_gradients_of_bfloat16_weights_are_summed_in_float32():
    low, once = Setup(precision="bf16-true"), replace(LOAD, micro_batches=1)
    for strategy, gpus, load, each in (
        ("ddp", 1, once, 2), ("ddp", 1, LOAD, 4), ("ddp", 2, once, 4), ("fsdp", 1, once, 2), ("fsdp", 1, LOAD, 4),
        ("zero1", 1, once, 4), ("zero2", 1, once, 4), ("zero3", 1, once, 4),
    ):  # fmt: skip
        assert estimate(shape_8b(), strategy, gpus, load, low)["gradients"] == each * FULL, (strategy, gpus)
    found = estimate(shape_8b(), "ddp", 2, LOAD, replace(low, bucket_view=False))
    assert found["buckets"] == 0, "DDP has no buckets here"
    assert found["rollout"] == sum(
        found[k] for k in ("weights", "optimizer", "teacher", "teacher_shadow", "kv_cache", "sampling")
    ), "no gradients in rollouts"
    assert [estimate(shape_8b(), z, 2, LOAD, low)["buckets"] for z in ("zero1", "zero2", "zero3")] == [
        400_000_000, 400_000_000, 200_000_000,
    ]  # fmt: skip


def test_gradients_are_in_memory_from_the_second_forward_on():
    setup = Setup(teacher_parameters=FULL, foreach=False)
    two, one = (estimate(shape_8b(), "fsdp", 8, replace(LOAD, micro_batches=n), setup) for n in (2, 1))
    assert two["gradients"] == one["gradients"] == FULL // 2
    late = two["activations"] - one["activations"], two["new_gradient"] - one["new_gradient"]
    assert two["update"] - one["update"] == FULL // 2 + sum(late)
    kept = sum(one[k] for k in ("weights", "optimizer", "teacher"))
    assert one["rollout"] == kept + one["generation"] + one["kv_cache"] + one["sampling"], "no gradients in rollouts"
    zero3 = estimate(shape_8b(), "zero3", 8, replace(LOAD, micro_batches=1), setup)
    assert (
        zero3["rollout"] - zero3["generation"] - zero3["kv_cache"] - zero3["sampling"]
        == kept + 2 * (FULL // 2) + 200_000_000
    )
    ddp = estimate(shape_8b(), "ddp", 8, replace(LOAD, micro_batches=1), setup)
    assert ddp["rollout"] - ddp["kv_cache"] - ddp["sampling"] == 20 * FULL, "DDP's gradients are in its buckets"


def test_hybrid_sharding_shards_over_the_gpus_of_one_replica():
    setup = Setup(teacher_parameters=FULL)
    four, hybrid = (
        estimate(shape_8b(), "fsdp", 4, LOAD, setup),
        estimate(shape_8b(), "fsdp", 16, LOAD, replace(setup, replicas=4)),
    )
    assert hybrid == four
    with pytest.raises(UserError, match="replicas=3 does not divide 8"):
        estimate(shape_8b(), "fsdp", 8, LOAD, replace(setup, replicas=3))


def test_a_parked_teacher_is_on_the_gpu_while_it_scores():
    here = estimate(shape_8b(), "fsdp", 8, LOAD, Setup(precision="bf16-true", teacher_parameters=FULL))
    there = estimate(shape_8b(), "fsdp", 8, LOAD, Setup(precision="bf16-true", teacher_parameters=FULL, parked=True))
    assert there["teacher"] == there["teacher_shadow"] == 0
    assert there["parked_teacher"] == here["teacher"] == FULL // 4
    assert there["host"] == FULL // 4 + FULL // 2
    assert here["update"] - there["update"] == FULL // 2, "only the float32 average is not on the GPU"
    assert here["rollout"] - there["rollout"] == FULL // 4 + FULL // 2


def test_cpu_memory_of_loading_and_saving():
    setup = Setup(teacher_parameters=FULL)
    for strategy in STRATEGIES:
        found = estimate(shape_8b(), strategy, 8, LOAD, setup)
        assert found["loading"] == 4 * FULL
        # weights, teacher and Adam's averages; gathered, and as the file's bytes
        assert found["saving"] == pytest.approx(16 * FULL, abs=1000)


def test_adapters_need_little_memory():
    """LoRA: gradients, optimizer state and teacher follow the trained parameters, the weights do not."""
    small = replace(shape_8b(), trainable=20_000_000)
    found = estimate(small, "ddp", 2, LOAD, Setup(teacher_parameters=20_000_000))
    assert found["weights"] == 4 * FULL
    parts = ("gradients", "optimizer", "teacher", "step_scratch")
    assert [found[k] for k in parts] == [80_000_000, 160_000_000, 80_000_000, 80_000_000]
    # adapters are float32 on bfloat16 weights too, so their average needs no float32 copy
    low = estimate(small, "ddp", 2, LOAD, Setup(precision="bf16-true", teacher_parameters=20_000_000))
    assert [low[k] for k in parts] == [found[k] for k in parts]
    assert low["weights"] == 2 * (FULL - 20_000_000) + 80_000_000
    assert low["teacher_shadow"] == 0
    # a checkpoint: adapters, the teacher's adapters, Adam's averages; and the frozen weights if needed
    assert low["saving"] == 2 * (FULL - 20_000_000) + 4 * 80_000_000
    alone = Setup(precision="bf16-true", teacher_parameters=20_000_000, saves_frozen=False)
    assert estimate(small, "ddp", 2, LOAD, alone)["saving"] == 4 * 80_000_000
    # a frozen weight is cast at each use, and the cast is kept for backward unless the layer is recomputed
    mixed = Setup(precision="bf16-mixed")
    casts = [
        estimate(small, "ddp", 2, LOAD, replace(mixed, activation_checkpointing=on))["autocast_copy"] for on in (0, 1)
    ]
    assert casts == [2 * (FULL - 128256 * 4096), 40_000_000]
    assert estimate(small, "ddp", 2, LOAD, mixed)["generation"] == 2 * small.largest
    assert estimate(shape_8b(), "ddp", 2, LOAD, mixed)["generation"] == 2 * (FULL - 128256 * 4096)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_activations_with_adapters_do_not_exceed_those_of_full_training(targets, precision):
    sizes = {
        "vocab_size": 50, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 64,
    }  # fmt: skip
    kept = []
    for layers in (1, 3):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes))
        shape = model_shape(model)
        LoRA(rank=2, targets=targets).adapt(model)
        kept.append(kept_by_autograd(model, precision))
    share = (kept[1] - kept[0]) / 2 / (2 * 24) / layer_activations(shape, precision)
    assert share < 1.02
    assert share > 0.85 or targets != "all-linear"


def test_adapters_have_the_same_sizes_on_the_meta_device_and_in_the_model():
    skeleton, real = source().skeleton(), source().model()
    for model in (skeleton, real):
        LoRA(rank=3).adapt(model)
    assert all(p.is_meta for p in skeleton.parameters())
    assert model_shape(skeleton) == model_shape(real)
    assert 0 < model_shape(real).trainable < model_shape(real).parameters / 2


def test_sampling_from_sharded_weights_gathers_a_copy_or_a_few_layers():
    shape = shape_8b()
    for strategy in STRATEGIES:
        whole, layers = (
            estimate(shape, strategy, 8, LOAD, Setup(generation=g))["generation"] for g in ("gather", "stream")
        )
        if strategy in SHARDED:
            assert (whole, layers) == (4 * FULL, 4 * (2 * 128256 * 4096 + 2 * shape.layer))
        else:
            assert (whole, layers) == (0, 0)
    mixed = Setup(precision="bf16-mixed")
    assert estimate(shape, "fsdp", 8, LOAD, mixed)["generation"] == 2 * FULL
    # ZeRO-3 keeps float32 and casts each weight when it is used
    assert estimate(shape, "zero3", 8, LOAD, mixed)["generation"] == 4 * FULL + 2 * shape.largest
    small = replace(mixed, generation_bytes=2)
    assert [estimate(shape, s, 8, LOAD, small)["generation"] for s in ("ddp", "zero3")] == [2 * FULL] * 2
    assert estimate(shape, "ddp", 8, LOAD, small)["kv_cache"] == estimate(shape, "fsdp", 8, LOAD, mixed)["kv_cache"]


def test_offload_moves_persistent_state_to_cpu_memory():
    setup = Setup(teacher_parameters=FULL)
    here, there = (estimate(shape_8b(), s, 8, LOAD, setup) for s in ("zero3", "zero3_offload"))
    moved = ("weights", "fp32_partition", "gradients", "optimizer", "teacher")
    assert [there[k] for k in moved] == [0] * 5
    assert there["host"] == sum(here[k] for k in moved) == 3 * FULL
    assert here["host"] == 0
    assert there["total"] < here["total"]
    state = estimate(shape_8b(), "zero3", 8, LOAD, replace(setup, offload_optimizer=True))
    assert (state["optimizer"], state["gradients"], state["weights"]) == (0, 0, here["weights"])
    assert state["host"] == here["optimizer"] + here["gradients"] + FULL // 2
    one = estimate(shape_8b(), "zero1", 8, LOAD, replace(setup, offload_optimizer=True))
    assert (one["optimizer"], one["gradients"]) == (0, 4 * FULL)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_phases_do_not_overlap(strategy, precision):
    setup = Setup(precision=precision, teacher_parameters=FULL)
    found = estimate(shape_8b(), strategy, 8, LOAD, setup)
    always = sum(found[k] for k in ("weights", "fp32_partition", "optimizer", "teacher", "teacher_shadow"))
    update = ("autocast_copy", "gathered", "activations", "logits", "new_gradient")
    trained = always + found["gradients"] + found["buckets"]
    # the step works on gradients in the precision of the weights
    rounded = found["gradients"] // 2 if precision == "bf16-true" and strategy in ("ddp", "fsdp") else 0
    assert found["update"] >= trained + max(sum(found[k] for k in update), found["step_scratch"] - rounded)
    rest = found["rollout"] - sum(found[k] for k in ("generation", "kv_cache", "sampling")) - always
    assert rest == {
        "ddp": 0 if precision == "bf16-true" else found["gradients"],
        "zero3": found["gradients"] + found["buckets"],
        "zero3_offload": found["buckets"],
    }.get(strategy, 0)
    assert found["total"] == max(found["update"], found["rollout"])


def kept_by_autograd(model, precision: str) -> int:
    """Return the bytes that the forward of a decoder saves for backward, without weights and their casts."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape[::-1]) for p in model.parameters()}
    seen, held = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tuple(tensor.shape) not in shapes:
            seen[storage.data_ptr()] = storage.nbytes()
            held.append(storage)  # keeps its address from being reused
        return tensor

    ids = torch.zeros(2, 24, dtype=torch.long)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled="mixed" in precision),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        model.get_decoder()(input_ids=ids, use_cache=False)
    return sum(seen.values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", [(LlamaConfig, LlamaForCausalLM), (Qwen3Config, Qwen3ForCausalLM)])
def test_layer_activations_equal_the_bytes_that_autograd_keeps(kind, precision):
    make, model = kind
    sizes = {
        "vocab_size": 50, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 64,
    }  # fmt: skip
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    one, three = (model(make(num_hidden_layers=n, **sizes)).to(dtype) for n in (1, 3))
    kept = (kept_by_autograd(three, precision) - kept_by_autograd(one, precision)) / 2
    assert layer_activations(model_shape(one), precision) == kept / (2 * 24)


@pytest.mark.parametrize("tied", [False, True])
def test_the_skeleton_of_a_directory_has_the_sizes_of_the_model(tied, tmp_path):
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    real = LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)  # without weights, which must not be read
    skeleton = Pretrained(str(tmp_path)).skeleton()
    assert all(p.is_meta for p in skeleton.parameters())
    assert model_shape(skeleton) == model_shape(real)
    assert model_shape(skeleton).parameters == sum(p.numel() for p in real.parameters())
    assert model_shape(skeleton).tied == tied


def test_the_skeleton_of_a_model_from_scratch_has_the_sizes_of_the_model():
    skeleton = source().skeleton()
    assert all(p.is_meta for p in skeleton.parameters())
    assert model_shape(skeleton) == model_shape(source().model())


def test_unknown_precisions_and_strategies_are_refused():
    with pytest.raises(UserError, match=r"trainer.precision=64-true.*bf16-true"):
        element_bytes("64-true")
    with pytest.raises(UserError, match=r"strategy=zero4: there are ddp, fsdp"):
        estimate(shape_8b(), "zero4", 1, LOAD)
    assert element_bytes(32) == element_bytes(None) == (4, 4)
    assert element_bytes("bf16") == (4, 2)
