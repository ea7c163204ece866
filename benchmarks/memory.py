"""Peak memory of scoring tokens, over vocabulary x tokens: in chunks, as here, compared with all logits at once.

    python benchmarks/memory.py                                      # all cases; writes benchmarks/results/memory.json
    python benchmarks/memory.py --case pieces --vocabulary 32768 --tokens 1024   # one case, in this process

Sides: ``pieces`` (`gear_lightning.learning.token_stats`) and ``whole`` (below) score every token of the policy, with
entropy and top-k, and run backward; ``teacher`` is ``pieces`` without gradients. The model has one small layer, so that
the logits dominate; float32, temperature 0.7, 4 rows. Every case runs in its own process.

The peak is that of live tensor bytes above the model's weights, including gradients of the weights. With CUDA it is the
allocator's peak. On a CPU every tensor that an operator creates is counted until it is freed: this is exact, unlike the
process's resident memory, which also contains memory that the C library has not returned.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
import weakref
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hardware import cpu_name
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

RESULTS = Path(__file__).parent / "results"
VOCABULARIES = (8192, 32768, 131072)
TOKENS = (256, 1024, 4096)  # of a micro-batch
ROWS, WIDTH, TOP_K, TEMPERATURE = 4, 64, 20, 0.7
MOST_LOGITS = 1 << 28  # limit of the plain version, which takes over 4 GiB above it


class LiveBytes(TorchDispatchMode):
    """Bytes of all live tensors created inside the context, and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def _note(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return
        self._known.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, address, size)

    def _freed(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:  # a view takes no new memory
                self._note(x)
        return out


def whole(model: Any, tokens: Tensor) -> Tensor:
    """Return log-probs of all tokens except the first, in a simple implementation without chunks."""
    logits = model(input_ids=tokens).logits[:, :-1].float() / TEMPERATURE
    logprobs = logits.log_softmax(-1)
    with torch.no_grad():
        (logprobs.exp() * logprobs).sum(-1)
        logprobs.topk(TOP_K)
    return logprobs.gather(-1, tokens[:, 1:, None]).squeeze(-1)


def pieces(model: Any, tokens: Tensor) -> Tensor:
    """Return the same with this package."""
    from gear_lightning.learning.token_stats import token_stats

    wanted = torch.ones_like(tokens, dtype=torch.bool)
    wanted[:, 0] = False
    found = token_stats(model, tokens, torch.ones_like(wanted), wanted, temperature=TEMPERATURE, top_k=TOP_K)
    return found.logprobs


def one_case(side: str, vocabulary: int, tokens: int) -> dict[str, float]:
    """Return peak bytes and seconds of one side."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=max(TOKENS), tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to("cuda" if cuda else "cpu")
    ids = torch.randint(0, vocabulary, (ROWS, tokens // ROWS)).to(model.device)
    score = whole if side == "whole" else pieces

    def run() -> None:
        if side == "teacher":
            with torch.no_grad():
                score(model, ids)
        else:
            score(model, ids).sum().backward()

    start = time.perf_counter()
    if cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with LiveBytes() as live:
            run()
        peak = live.peak
    return {"peak_bytes": peak, "seconds": time.perf_counter() - start}


def main() -> None:
    """Run all cases and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=("pieces", "whole", "teacher"))
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--tokens", type=int)
    options = parser.parse_args()
    if options.case:
        print("RESULT " + json.dumps(one_case(options.case, options.vocabulary, options.tokens)))
        return
    found = []
    for vocabulary in VOCABULARIES:
        for tokens in TOKENS:
            for side in ("pieces", "teacher", "whole"):
                if side == "whole" and vocabulary * tokens > MOST_LOGITS:
                    continue
                command = [sys.executable, __file__, "--case", side, "--vocabulary", vocabulary, "--tokens", tokens]
                environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
                done = subprocess.run(
                    list(map(str, command)), env=environment, capture_output=True, text=True, check=False
                )
                line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
                if line is None:
                    sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
                case = {"side": side, "vocabulary": vocabulary, "tokens": tokens}
                found.append({**case, **json.loads(line.removeprefix("RESULT "))})
                print(json.dumps(found[-1]), flush=True)
    from gear_lightning.learning.token_stats import LOGITS

    cuda = torch.cuda.is_available()
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": {
            "device": torch.cuda.get_device_name() if cuda else cpu_name(),
            "measured": "torch.cuda.max_memory_allocated" if cuda else "live bytes of tensors",
            "threads": 1,
        },
        "versions": {p: version(p) for p in ("torch", "transformers")},
        "setting": {
            "rows": ROWS, "hidden_size": WIDTH, "layers": 1, "top_k": TOP_K, "temperature": TEMPERATURE,
            "dtype": "fp32", "logits_in_a_piece": LOGITS,
        },
        "found": found,
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
