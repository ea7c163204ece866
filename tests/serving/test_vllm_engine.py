"""`VLLMEngine` with a server that speaks vLLM's protocol: what it sends and checks, and every fault that it names."""

import copy
from pathlib import Path

import lightning as L
import pytest
import stand_in_server as stand_in
import torch
from deadlines import seconds
from failed_updates import check_failed_update
from tiny_runs import data, generation, module, source, trainer

from gear_lightning.errors import UserError
from gear_lightning.generation import CachedEngine, Sampling, VLLMEngine
from gear_lightning.generation.engine import TurnRequest
from gear_lightning.generation.vllm_engine import logprobs_mode, seed_of
from gear_lightning.learning.lora import LoRA
from gear_lightning.serving.client import ServerError
from gear_lightning.serving.weights import served_weights


@pytest.fixture
def policy():
    torch.manual_seed(3)
    return source().model().eval()


def turns(engine, jobs):
    for key, ids, seed in jobs:
        engine.submit(TurnRequest(key, ids, 12, (0, seed)))
    found = {}
    while done := engine.poll():
        found |= {turn.key: turn for turn in done}
    return found


JOBS = [(key, [7, 8, 9, 10 + key % 2], key) for key in range(6)]


def test_turns_have_the_policys_log_probs_and_depend_on_their_seed_alone(served, policy):
    _, engine = served
    engine.begin(policy, Sampling(), {5})
    found, again = turns(engine, JOBS), turns(engine, JOBS[::-1])
    assert found == again
    assert len({tuple(turn.ids) for turn in found.values()}) > 2
    for key, ids, _ in JOBS:
        turn = found[key]
        row = torch.tensor([ids + turn.ids])
        wanted = policy(input_ids=row, use_cache=False).logits[0].detach().log_softmax(-1)
        mine = [float(wanted[len(ids) - 1 + i, token]) for i, token in enumerate(turn.ids)]
        torch.testing.assert_close(torch.tensor(turn.logprobs), torch.tensor(mine), atol=1e-5, rtol=0)
        assert turn.stopped == (turn.ids[-1] == 5)
        assert len(turn.ids) == 12 or turn.stopped
    engine.end()
    assert engine.metrics() == [("perf/prefix_hit_rate", 0.5, 48)]
    assert engine.metrics() == [("perf/prefix_hit_rate", 0.0, 1)]


def test_weights_are_sent_when_they_have_changed_and_requests_carry_their_version(served, policy):
    made, engine = served
    for changed in (True, False, True):
        before = len([path for path, _ in made.seen if path == "/update_weights"])
        if changed:
            with torch.no_grad():
                policy.get_output_embeddings().weight.mul_(1.1)
        engine.begin(policy, Sampling(), {5})
        turns(engine, JOBS[:1])
        assert engine.fingerprint(None) == made.version
        engine.end()
        updates = [path for path, _ in made.seen if path == "/update_weights"]
        assert len(updates) - before == changed
    salts = [body["cache_salt"] for path, body in made.seen if path == "/v1/completions" and "seed" in body]
    assert salts[0] == salts[1] != salts[2] == made.version
    paths = [path for path, _ in made.seen]
    at = paths.index("/update_weights")
    assert paths[at - 2 : at + 4] == [
        "/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache", "/resume"
    ]  # fmt: skip
    assert not list(Path("/dev/shm").glob("gear-weights-*")), "files are removed"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (stand_in.STALE_HEAD, r"does not compute what the policy computes: .* differ by 0\.\d+ nats"),
        (stand_in.OTHER_VERSION, "has weights of version another after"),
        (stand_in.REFUSE, "refuses /pause: 500: out of memory"),
        (stand_in.FAILED_UPDATE, "refuses /update_weights: 500: layers do not match"),
    ],
)
def test_an_update_that_fails_is_reported_and_never_counts_as_done(served, policy, fault, message):
    check_failed_update(*served, policy, fault, message)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (stand_in.CUT, "gave a turn up: 'abort'"),
        (stand_in.REFUSE, "refuses /v1/completions: 500: out of memory"),
    ],
)
def test_a_turn_that_fails_is_reported(served, policy, fault, message):
    made, engine = served
    engine.begin(policy, Sampling(), {5})
    made.fault = fault
    with pytest.raises(ServerError, match=message):
        turns(engine, JOBS[:1])


def test_a_server_that_hangs_or_is_not_there_is_reported(served, policy):
    made, engine = served
    engine.begin(policy, Sampling(), {5})
    made.fault = stand_in.HANG
    hasty = VLLMEngine(engine.servers, seconds=seconds(0.2))
    with pytest.raises(ServerError, match=r"has not answered /pause within [\d.]+ s"):
        hasty.begin(policy, Sampling(), {5})
    gone = VLLMEngine(["http://127.0.0.1:9"])
    with pytest.raises(ServerError, match=r"127\.0\.0\.1:9 cannot be reached .*start it with `gear-lightning serve"):
        gone.begin(policy, Sampling(), {5})


def test_a_server_that_was_restarted_or_is_shared_is_noticed(served, policy):
    made, engine = served
    engine.begin(policy, Sampling(), {5})
    turns(engine, JOBS[:1])
    made.version = "of another run"
    with pytest.raises(ServerError, match="got other weights while it sampled"):
        engine.end()
    with pytest.raises(ServerError, match="it was restarted, or another run uses it"):
        engine.begin(policy, Sampling(), {5})


def test_log_probs_that_are_not_finite_end_the_run(served, tmp_path):
    made, engine = served

    class Later(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            made.fault = stand_in.NAN

    with pytest.raises(UserError, match="log-probs are not finite"):
        fit(engine, tmp_path, Later())


def fit(engine, folder, *callbacks, **options):
    runs = trainer(folder, generation(engine=engine), *callbacks, max_epochs=2)
    runs.fit(module(**options), datamodule=data())
    return runs


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["all weights", "LoRA"])
def test_training_samples_with_the_newest_weights(served, tmp_path, lora):
    made, engine = served
    runs = fit(engine, tmp_path, lora=lora)
    assert runs.global_step == 2
    assert len([path for path, _ in made.seen if path == "/update_weights"]) >= 2
    assert runs.callback_metrics["train/sampler_gap_max"] < 1e-3
    assert 0 < runs.callback_metrics["perf/prefix_hit_rate"] < 1


def test_adapters_are_merged_into_what_a_checkpoint_holds(policy):
    plain = copy.deepcopy(policy)
    LoRA(rank=2).adapt(policy)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    found = served_weights(policy)
    assert found.keys() == {name for name, _ in plain.named_parameters()}
    plain.load_state_dict(found, strict=False)
    ids = torch.tensor([[7, 8, 9, 10]])
    torch.testing.assert_close(plain(input_ids=ids).logits, policy(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_a_context_that_the_server_does_not_take_is_refused(served, policy):
    _, engine = served
    with pytest.raises(UserError, match=r"takes 128 tokens, and generation\.budgets\.context=129"):
        engine.check_context(129)
    engine.begin(policy, Sampling(), {5})
    with pytest.raises(UserError, match="takes 128 tokens, and a turn needs 120 \\+ 12"):
        engine.submit(TurnRequest(0, [7] * 120, 12, (0,)))


def test_sampling_must_fit_to_the_log_probs_that_the_server_gives(served, policy):
    _, engine = served
    with pytest.raises(UserError, match=r"logprobs-mode raw_logprobs, and temperature 0\.7 needs processed_logprobs"):
        engine.begin(policy, Sampling(temperature=0.7), {5})
    assert logprobs_mode(Sampling(temperature=1.0, top_p=0.9)) == "raw_logprobs"
    assert logprobs_mode(Sampling(temperature=0.0)) is None
    with pytest.raises(UserError, match=r"temperature=0\.7 together with top_p=0\.9"):
        logprobs_mode(Sampling(temperature=0.7, top_p=0.9))


def test_turns_have_the_version_of_the_weights_that_sampled_them(served, policy):
    _, engine = served
    first, second = engine.fork(), engine.fork()
    first.version = 3
    first.begin(policy, Sampling(), {5})
    assert {turn.version for turn in turns(first, JOBS).values()} == {3}
    with torch.no_grad():
        policy.get_output_embeddings().weight.mul_(1.1)
    second.version = 4
    second.begin(policy, Sampling(), {5})  # the phase of the first one stays open
    for phase in (first, second):
        assert {turn.version for turn in turns(phase, JOBS).values()} == {4}
        phase.end()


def test_an_interrupted_phase_aborts_its_requests(served, policy):
    made, engine = served
    engine.begin(policy, Sampling(), set())
    with made.lock:
        for key, ids, seed in JOBS:
            engine.submit(TurnRequest(key, ids, 100, (0, seed)))
        engine.interrupted = lambda: True
        assert engine.poll() == []
        engine.end()
    (names,) = [body["request_ids"] for path, body in made.seen if path == "/abort_requests"]
    assert len(set(names)) == len(JOBS)


def test_seeds_are_numbers_of_63_bits():
    assert 0 <= seed_of((0, 1)) < 2**63
    assert len({seed_of((0, i)) for i in range(1000)}) == 1000


def test_options_out_of_range_are_refused():
    with pytest.raises(UserError, match="at least one address"):
        VLLMEngine([])
    with pytest.raises(UserError, match=r"seconds=-[\d.]+: must be above 0"):
        VLLMEngine(["http://127.0.0.1:9"], seconds=-seconds(1))
    with pytest.raises(UserError, match=r"requests=0: must be at least 1"):
        VLLMEngine(requests=0)


def test_another_engine_gives_the_same_distribution(served, policy):
    """Greedy turns are those of the engine in the process."""
    _, engine = served
    own = CachedEngine()
    for one in (engine, own):
        one.begin(policy, Sampling(temperature=0.0), {5})
    theirs, ours = turns(engine, JOBS), turns(own, JOBS)
    assert {k: t.ids for k, t in theirs.items()} == {k: t.ids for k, t in ours.items()}
    engine.end()
    own.end()
