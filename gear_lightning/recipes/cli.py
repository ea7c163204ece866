"""`gear-lightning fit | validate | test | predict`: LightningCLI with the classes of this package as options."""

import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse._util import import_object
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from gear_lightning.callbacks.checkpoint import IterationCheckpoint
from gear_lightning.callbacks.first_evaluation import FirstEvaluation
from gear_lightning.callbacks.preemption import Preemption
from gear_lightning.callbacks.progress import PhaseProgress
from gear_lightning.callbacks.resumption import Resumption
from gear_lightning.callbacks.run_status import RunStatus
from gear_lightning.callbacks.startup import StartupCheck, check_launch
from gear_lightning.callbacks.watchdog import Watchdog

from ..data import RolloutDataModule
from ..errors import Stopped, UserError
from ..learning.warm_start import WarmStart, run_warm_start
from ..module import GearModule
from ..runs.checkpoints import CompleteCheckpoints
from ..runs.files import hold
from ..runs.loggers import Board, MetricsFile
from .idle_options import idle_options
from .options.sections import CALLBACKS, DEFAULTS, OWN, SEED, TRAINER_DEFAULTS, WARM_START_TEXT
from .parser import Parser, install_hooks
from .refusals import WRONG_PRECISION, check_strategy, refusals, skeleton_of
from .saved_config import SavedConfig

RUN_FILES = (
    "*config.yaml", "*metrics.csv", "tensorboard", "checkpoints", "rollouts", "predictions", "tokenizer",
    "steps", "credit_map.html", "recredit.html", "status.json", "attempts.jsonl", "crash",
)  # fmt: skip


install_hooks()


class GearCLI(LightningCLI):
    """LightningCLI for `GearModule` and `RolloutDataModule`, with rollouts, records and checkpoints enabled."""

    command = "fit"  # whose own options are added, see `OWN`
    lock: Any = None  # the open lock file of the run directory
    reports_idle = True  # whether `fit` reports options without effect

    def __init__(self, args: list[str] | None = None):
        self._asked_for = next(iter(sys.argv[1:] if args is None else args), None)
        super().__init__(
            GearModule,
            RolloutDataModule,
            save_config_callback=SavedConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=SEED.default,
            parser_kwargs={"parser_mode": "omegaconf+"},
            parser_class=Parser,
            auto_configure_optimizers=False,
            args=args,
        )

    def subcommands(self) -> dict[str, set[str]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return only the requested subcommand, because collecting the options of each takes 0.2 s or more."""
        known = LightningCLI.subcommands()
        return {name: skip for name, skip in known.items() if name == self._asked_for} or known

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name, path in CALLBACKS.items():
            kind: Any = import_object(path)
            parser.add_lightning_class_args(kind, name)
        parser.add_argument("--warm_start", type=WarmStart | None, default=None, help=WARM_START_TEXT)
        for own in OWN.get(self.command, ()):
            parser.add_argument(f"--{own.name}", type=own.kind, default=own.default, help=own.text)
        parser.set_defaults(DEFAULTS)

    @property
    def run_dir(self) -> Path:
        """Folder of all files of this run."""
        return Path(self._get(self.config, "trainer")["default_root_dir"])

    @property
    def _checkpoint_dir(self) -> Path:
        return Path(self._get(self.config, "checkpoint")["dirpath"] or self.run_dir / "checkpoints").resolve()

    def _own_file(self, name: str) -> str:
        """Return a file name with the subcommand as prefix, so that evaluations do not replace files of training."""
        return name if self.subcommand == "fit" else f"{self.subcommand}_{name}"

    def _parse_ckpt_path(self) -> None:
        """Do nothing: the recipe comes only from the command line.

        Lightning would let the checkpoint's ``hyper_parameters`` change the recipe, including its classes.
        """

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise UserError(f"seed_everything: {error}") from None
        self._follow_seed()

    def _follow_seed(self) -> None:
        """Set ``data.seed`` to ``seed_everything`` unless it is given; ``config.yaml`` shows the value."""
        config = self.config[str(self.subcommand)]
        given = config["seed_everything"]
        if config["data"]["seed"] is None:
            config["data"]["seed"] = 0 if isinstance(given, bool) else given  # seed_everything=false disables seeding

    def before_instantiate_classes(self) -> None:
        self.save_config_kwargs["config_filename"] = self._own_file("config.yaml")

    def instantiate_classes(self) -> None:
        path = self._get(self.config, "ckpt_path")
        if path == "best":
            raise UserError("ckpt_path=best is known only to the process that trained; give last or a file")
        named = path in (None, "last", "hpc", "registry") or "://" in str(path)
        if not named and not Path(str(path)).exists():
            raise UserError(f"ckpt_path={path}: no such checkpoint")
        found = path == "last" and any(self._checkpoint_dir.glob("*.ckpt"))
        if path == "last" and self.subcommand != "fit" and not found:
            raise UserError(f"ckpt_path=last: there is no checkpoint in {self._checkpoint_dir}")
        if path is None and self.subcommand != "fit":
            print(f"No --ckpt_path: {self.subcommand} uses the policy before training.", file=sys.stderr)
        super().instantiate_classes()
        flat = self.config[str(self.subcommand)]
        self.datamodule.resolved_config = {k: str(v) for k, v in vars(flat.as_flat()).items() if k != "config"}
        if path == "last":  # at the first start of a job that restarts with the same command there is none yet
            self.config_init[str(self.subcommand)]["ckpt_path"] = str(self._checkpoint_dir) if found else None
        resumes = self._get(self.config_init, "ckpt_path") is not None
        for callback in self.trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, SavedConfig):
                callback.resumes = resumes
        if self._get(self.config_init, "weights_only") is None:  # Lightning would unpickle a remote checkpoint
            self.config_init[str(self.subcommand)]["weights_only"] = True
        self._refuse()

    def _refuse(self) -> None:
        """Raise on errors that are visible in the recipe, before processes are started and weights are loaded."""
        pieces = self.model, self.datamodule, self._get(self.config_init, "generation")
        processes, asked = self.trainer.num_devices * self.trainer.num_nodes, self._get(self.config, "trainer")
        model = skeleton_of(self.model.source)
        fitting, checkpoint = self.subcommand == "fit", self._get(self.config_init, "checkpoint")
        checkpoint = None if asked["enable_checkpointing"] is False else checkpoint
        resumes = self._get(self.config_init, "ckpt_path") is not None
        for message in refusals(*pieces, asked, processes, model, fitting, checkpoint, resumes):
            raise UserError(message)
        if self.subcommand == "fit" and self.reports_idle:
            for line in idle_options(self.config["fit"], *pieces):
                rank_zero_warn(line)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        run, config = self.run_dir, self._get(self.config_init, "trainer")
        check_launch(config)
        try:
            run.mkdir(parents=True, exist_ok=True)
            probe = run / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"trainer.default_root_dir={run} cannot be written to ({error.strerror})") from None
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, CompleteCheckpoints()]
        logger, file = config.get("logger"), MetricsFile(str(run), self._own_file("metrics.csv"))
        if logger in (None, True):
            board = [Board(run, name="", version="tensorboard")] if self.subcommand == "fit" else []
            kwargs["logger"] = [file, *board]
        elif logger:
            kwargs["logger"] = [file, *(logger if isinstance(logger, list) else [logger])]
        self._get(self.config_init, "checkpoint").dirpath = str(self._checkpoint_dir)
        if self.subcommand == "fit" and getattr(rank_zero_only, "rank", 0) == 0:
            self._lock()
        check_strategy(self._get(self.config, "trainer"))
        try:
            return super().instantiate_trainer(**kwargs)
        except ValueError as error:
            if isinstance(error, UserError) or "precision=" not in str(error):
                raise
            raise UserError(WRONG_PRECISION.format(config.get("precision"))) from None

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        off = [PhaseProgress] if config.get("enable_progress_bar") is False else []
        off += [IterationCheckpoint] if config.get("enable_checkpointing") is False else []
        kept = [c for c in callbacks if not isinstance(c, tuple(off))]
        # Preemption and Watchdog run first: the watchdog covers the start of other callbacks and the save on a stop
        kept.sort(key=lambda c: 0 if isinstance(c, Preemption) else 1 if isinstance(c, Watchdog) else 2)
        return super()._instantiate_trainer(config, [*kept, *self._unasked()])

    def _unasked(self) -> list[L.Callback]:
        """Return the callbacks of every run that have no options."""
        return [StartupCheck(), RunStatus(), Resumption()]

    def _lock(self) -> None:
        """Lock the run directory against a second run until this process ends."""
        if GearCLI.lock is not None:  # from an earlier command line in this process
            GearCLI.lock.close()
        GearCLI.lock = hold(
            self.run_dir / ".lock",
            f"another process is training in {self.run_dir}; wait for it, or give another trainer.default_root_dir",
        )

    def _quiet_trainer(self, **kwargs: Any) -> L.Trainer:
        """Return a Trainer on the same hardware for another stage, which writes no files."""
        again = self._get(self.parser.instantiate_classes(self.config), "trainer")
        shared = {key: again[key] for key in ("accelerator", "strategy", "devices", "num_nodes", "precision")}
        return L.Trainer(
            **shared,
            default_root_dir=self.run_dir,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[Preemption(), Watchdog(self._get(self.config, "watchdog")["seconds"]), PhaseProgress()],
            **kwargs,
        )

    def before_fit(self) -> None:
        config = self.config["fit"]
        if self._get(self.config_init, "ckpt_path") is not None:
            if config["warm_start"] is not None:
                rank_zero_info("warm_start does nothing on a resume: the weights are those of the checkpoint.")
            return
        generation = self._get(self.config_init, "generation")
        generation.attach(self.model, self.datamodule)  # reports unusable tasks before training
        if self.trainer.is_global_zero:
            self._set_aside_earlier_run()
        options: WarmStart | None = self._get(self.config_init, "warm_start")
        if options is not None:
            generation.prepare_engine(self.model, self.trainer)
            trainer = self._quiet_trainer(max_steps=options.steps, max_epochs=-1, gradient_clip_val=1.0)
            self.model.initial_weights = run_warm_start(
                options,
                self.model,
                trainer,
                config["trainer"]["precision"],
                partial(generation.check_model, self.model),
                generation.check_sampling,
            )

    def _set_aside_earlier_run(self) -> None:
        """Move files of an earlier run in the same directory away, so that a fresh start does not mix with them."""
        found = [path for name in RUN_FILES for path in self.run_dir.resolve().glob(name)]
        found += [self._checkpoint_dir] if self._checkpoint_dir.exists() and self._checkpoint_dir not in found else []
        if found:
            taken = [path.name.removeprefix("earlier-") for path in self.run_dir.glob("earlier-*")]
            number = 1 + max((int(name) for name in taken if name.isdecimal()), default=0)
            aside = self.run_dir / f"earlier-{number}"
            aside.mkdir()
            for path in found:
                try:
                    path.rename(aside / path.name)
                except OSError as error:  # for example a mount point
                    raise UserError(
                        f"{path} belongs to an earlier run and cannot be moved to {aside} ({error.strerror}); resume "
                        "that run with --ckpt_path last, or give another trainer.default_root_dir"
                    ) from None
            print(f"{self.run_dir} held an earlier run, now in {aside} (to resume a run: --ckpt_path last)")

    def after_fit(self) -> None:
        metrics = {k: float(v) for k, v in self.trainer.callback_metrics.items()}  # on all ranks: communicates
        if not self.trainer.is_global_zero:
            return
        first: FirstEvaluation = self._get(self.config_init, "first_evaluation")
        before, after = first.metrics.get("val/success"), metrics.get("val/success")
        lines = ["", f"Results are in {self.run_dir}:"]
        if after is not None:
            since = "" if before is None else f"{before:.3f} -> "
            lines.append(f"  success on held-out tasks   {since}{after:.3f}")
        kept: IterationCheckpoint = self._get(self.config_init, "checkpoint")
        if kept.monitor is not None and kept.best_model_score is not None:
            score = f"{float(kept.best_model_score):.3f}"
            lines.append(f"  best {kept.monitor:<22} {score}: checkpoints/{Path(kept.best_model_path).name}")
        files = {
            "metrics.csv": f"all metrics, one row per step (also: tensorboard --logdir {self.run_dir})",
            "credit_map.html": "the credit of every token: open it in a browser",
            "checkpoints/last.ckpt": "to resume: fit with --ckpt_path last",
        }
        lines += [f"  {name:<27} {text}" for name, text in files.items() if (self.run_dir / name).exists()]
        grpo = "  the same run with plain GRPO: add --config configs/credit/grpo.yaml"
        lines += [
            "Next steps:",
            f"  gear-lightning credit {self.run_dir}",
            *([grpo] if self.model.distillation is None else []),  # that config does not turn off a distillation
            f"  gear-lightning export {self.run_dir}/checkpoints/last.ckpt DIR   (a Hugging Face model directory)",
        ]
        print("\n".join(lines))

    def after_predict(self) -> None:
        if self.trainer.is_global_zero:
            print(f"\nRollouts are in {self.run_dir / 'predictions'}, one JSON object per line.")


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory, if there is no GPU.

    On a CPU, glibc would return the memory of activations to the system after every step, and the system would then map
    it again page by page (a fifth of the time of a teacher's pass). With a GPU the setting stays unchanged, because
    weights pass through CPU memory only once.
    """
    import ctypes
    import platform

    if platform.libc_ver()[0] != "glibc" or torch.cuda.is_available():
        return
    libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3
    libc.mallopt(mmap_threshold, 1 << 27)  # larger blocks (checkpoints, full weights) are returned
    libc.mallopt(trim_threshold, (1 << 31) - 1)


def main(args: list[str], kind: type[GearCLI] = GearCLI) -> None:
    """Run a LightningCLI subcommand."""
    import warnings

    _keep_freed_memory()

    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # RolloutDataModule restores its own position
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    warnings.filterwarnings("ignore", message=".*across ranks is zero.*")  # no validation tasks
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*`IterableDataset` has `__len__`.*")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*recommended to use `self.log.'step'.*")  # equal on all processes
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated.*_single")  # DeepSpeed's calls
    warnings.filterwarnings("ignore", message=".*DTensor random operators may not have complete support.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "💡" not in r.getMessage())
    # processes that Lightning starts for other ranks run the same command line
    sys.argv = [sys.argv[0], *args]
    try:
        kind()
    except Stopped as stopped:
        sys.exit(stopped.status)
    finally:
        if GearCLI.lock is not None:
            GearCLI.lock.close()


Command = Callable[[list[str]], int]
