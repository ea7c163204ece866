"""Policies with random weights."""

import torch

from gear_lightning.models import FromScratch

WORDS = "gear_lightning.environments.lookup_chain.WORDS"


def test_random_weights_depend_only_on_the_seed():
    before = torch.get_rng_state()
    first = FromScratch(WORDS, layers=1).model().state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    with torch.device("meta"):  # Lightning does the same with the GPU
        elsewhere = FromScratch(WORDS, layers=1).model().state_dict()
    other = FromScratch(WORDS, layers=1, seed=1).model().state_dict()
    assert all(torch.equal(value, elsewhere[name]) for name, value in first.items())
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
