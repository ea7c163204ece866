"""What `gear-lightning parity` compares, on runs of one process."""

from tiny import data, generation, module, trainer

from gear_lightning.parity import compare


def played(run, **options):
    fit = trainer(run, generation(), max_epochs=1)
    fit.fit(module(), datamodule=data(**options))
    fit.save_checkpoint(run / "checkpoints" / "last.ckpt")
    return run


def test_a_loss_that_cancels_is_compared_on_the_scale_of_its_terms(tmp_path):
    """The first loss on new rollouts is 0 but for rounding, and other micro-batches round otherwise."""
    one = played(tmp_path / "one", micro_batch_size=8)
    split = compare(one, played(tmp_path / "split", micro_batch_size=2))
    assert split.same_ids
    assert split.worst["token_advantages"] > 0 or split.worst["train/grad_norm"] > 0, "something is rounded otherwise"
    assert split.worst["train/loss"] < 1e-6
    other = compare(one, played(tmp_path / "other", group_size=3))
    assert not other.same_ids
    assert not other.within(1e-5)
