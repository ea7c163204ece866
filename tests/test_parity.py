"""What `gear-lightning parity` compares, on runs of one process."""

import csv

import yaml
from tiny import data, generation, module, trainer

from gear_lightning.parity import STRATEGIES, compare


def played(run, **options):
    fit = trainer(run, generation(), max_epochs=1)
    fit.fit(module(), datamodule=data(**options))
    fit.save_checkpoint(run / "checkpoints" / "last.ckpt")
    return run


def read(metrics) -> float:
    with metrics.open() as file:
        return float(next(csv.DictReader(file))["train/loss"])


def test_a_loss_that_cancels_is_compared_on_the_scale_of_its_terms(tmp_path):
    """The first loss on new rollouts is 0 but for rounding, and other micro-batches round otherwise."""
    one = played(tmp_path / "one", micro_batch_size=8)
    split = compare(one, played(tmp_path / "split", micro_batch_size=2))
    assert split.same_ids
    losses = [read(tmp_path / name / "metrics.csv") for name in ("one", "split")]
    assert abs(losses[0] - losses[1]) > 1e-3 * abs(losses[0]), "as a share of itself, rounding is a large part of it"
    assert max(map(abs, losses)) < 1e-6
    assert 0 < split.worst["train/loss"] < 1e-6
    other = compare(one, played(tmp_path / "other", group_size=3))
    assert not other.same_ids
    assert not other.within(1e-5)


def test_a_strategy_is_the_same_here_and_as_a_config(repository):
    files = {path.stem: path for path in (repository / "configs" / "strategy").glob("*.yaml")}
    assert files.keys() == STRATEGIES.keys()
    for name, path in files.items():
        assert yaml.safe_load(path.read_text()) == {"trainer": {"strategy": STRATEGIES[name]}}
