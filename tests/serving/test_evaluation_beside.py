"""Evaluations that run on the server while the policy is updated."""

import lightning as L
import pytest
from detached_engine import Detached
from tiny_runs import data, generation, module, trainer

from gear_lightning.callbacks.evaluation_beside import EvaluationBeside
from gear_lightning.callbacks.first_evaluation import FirstEvaluation
from gear_lightning.errors import Stopped, UserError
from gear_lightning.generation import CachedEngine
from gear_lightning.runs.metrics_file import read_columns


def fit(folder, *callbacks, engine=None, ckpt=None, **options):
    runs = trainer(folder, generation(engine=engine or Detached()), *callbacks, **{"max_epochs": 3, **options})
    runs.fit(module(), datamodule=data(), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return runs


def column(folder, name):
    return read_columns(folder / "metrics.csv")[name][1].tolist()


def test_it_measures_what_lightnings_validation_measures(tmp_path):
    fit(tmp_path / "beside", EvaluationBeside())
    fit(tmp_path / "val", FirstEvaluation(enabled=False), limit_val_batches=None)
    for name in ("success", "reward", "turns", "response_tokens"):
        there = column(tmp_path / "val", f"val/{name}")
        assert column(tmp_path / "beside", f"beside/{name}")[-1] == pytest.approx(there[-1])
    assert column(tmp_path / "beside", "beside/step")[-1] == 3, "the last weights are evaluated before the run ends"


def test_a_cadence_evaluates_every_n_iterations(tmp_path):
    fit(tmp_path, EvaluationBeside(every_n_iterations=2), max_epochs=5)
    assert set(column(tmp_path, "beside/step")) == {2, 4}


def test_an_evaluation_that_a_stop_interrupts_is_repeated(tmp_path):
    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "last.ckpt")
                raise Stopped

    with pytest.raises(Stopped):
        fit(tmp_path, EvaluationBeside(every_n_iterations=2), Stop(), max_epochs=3)
    fit(tmp_path, EvaluationBeside(every_n_iterations=2), ckpt=tmp_path / "last.ckpt", max_epochs=3)
    assert column(tmp_path, "beside/step") == [2]


@pytest.mark.parametrize(
    ("engine", "source", "message"),
    [
        (CachedEngine(), data(), "CachedEngine samples in the training process"),
        (None, data(val_tasks=None), "val_tasks"),
    ],
)
def test_what_it_cannot_do_is_refused(tmp_path, engine, source, message):
    runs = trainer(tmp_path, generation(engine=engine or Detached()), EvaluationBeside())
    with pytest.raises(UserError, match=message):
        runs.fit(module(), datamodule=source)
    with pytest.raises(UserError, match="must be at least 1"):
        EvaluationBeside(0)
