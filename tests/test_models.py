"""Policies made from nothing."""

import torch

from gear_lightning.models import FromScratch

WORDS = "gear_lightning.environments.lookup_chain.WORDS"


def test_random_weights_depend_on_the_seed_alone():
    before = torch.get_rng_state()
    first = FromScratch(WORDS, layers=1).model().state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    with torch.device("meta"):  # as Lightning does with the GPU
        elsewhere = FromScratch(WORDS, layers=1).model().state_dict()
    other = FromScratch(WORDS, layers=1, seed=1).model().state_dict()
    assert all(torch.equal(value, elsewhere[name]) for name, value in first.items())
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
