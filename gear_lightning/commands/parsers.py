"""The parsers of the commands that import torch when they run: their help and their errors need no import."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from ..export.dtypes import DType
from ..parity.tolerance import LOW_TOLERANCE, TOLERANCE
from ..recipes.options.parser import CommandParser
from ..study.axes import AXES
from .slurm import parser as slurm

PAGE = "recredit.html"
ON_PAGE = 1000  # rollouts
EQUAL, DIFFERENT, UNCOMPARED = 0, 1, 3  # exit statuses of parity; 2 is an error


def credit() -> CommandParser:
    """Return the parser of ``credit``."""
    parser = CommandParser("credit", description="Show the credit of each token of a recorded rollout.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory (holds rollouts/ and tokenizer/)")
    parser.add_argument("--iteration", type=int, metavar="N", help="default: the last one that has the rollout")
    parser.add_argument("--task", metavar="ID", help="only rollouts of this task")
    parser.add_argument("--rollout", type=int, metavar="K", help="number of the rollout in its group, from 0")
    parser.add_argument("--list", action="store_true", help="print a table of the rollouts instead")
    parser.add_argument(
        "--html",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="PATH",
        help="write the page instead (default RUN/credit_map.html); of all iterations unless --iteration is given",
    )
    parser.add_argument(
        "--no-colour", "--no-color", action="store_true", help="plain text, with the weights written out"
    )
    return parser


def compare() -> CommandParser:
    """Return the parser of ``compare``."""
    parser = CommandParser(
        "compare",
        description="Compare runs: learning curves over iterations, rollouts, sampled tokens and seconds; mean over "
        "the curve and final value by arm; paired differences by seed. Runs whose configs differ only in seeds "
        "form one arm. Every arm is compared with the arm of the first run.",
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run directories")
    parser.add_argument("--metric", default="val/success", help="column of metrics.csv (default val/success)")
    parser.add_argument(
        "--over", choices=list(AXES), default="iterations", help="axis of the tables (default iterations)"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="VALUE",
        help="report when the metric reaches this value (default 0.8 for .../success)",
    )
    parser.add_argument(
        "--group",
        action="append",
        metavar="LABEL=GLOB",
        help="put the run directories that match a pattern into one arm, even if their configs differ; can be repeated",
    )
    parser.add_argument(
        "--names",
        type=lambda text: [name.strip() for name in text.split(",")],
        metavar="NAME,NAME",
        help="comma-separated names of the arms, in their order",
    )
    parser.add_argument(
        "--out",
        action="append",
        type=Path,
        metavar="FILE",
        help="output file: .html (page with figure and tables), .png or .svg (figure), .csv (one row per run), .md "
        "(tables); can be repeated (default: compare.html next to the first run)",
    )
    parser.add_argument(
        "--allow-different-tasks", action="store_true", help="also compare runs of different tasks or environments"
    )
    return parser


def doctor() -> CommandParser:
    """Return the parser of ``doctor``."""
    parser = CommandParser(
        "doctor",
        usage="gear-lightning doctor --config RECIPE [--config MORE ...] [--gpus N] [--gpu-memory GIB] [fit's options]",
        description="Estimate a recipe's memory per GPU under each strategy and report problems, without running it.",
    )
    parser.add_argument("--gpus", type=int, help="number of GPUs on all nodes; default: that of the recipe")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory of one GPU; default: of this machine's")
    return parser


def serve() -> CommandParser:
    """Return the parser of ``serve``."""
    parser = CommandParser(
        "serve",
        usage="gear-lightning serve --config RECIPE [--config MORE ...] [--python PATH] [--port N] [fit's options]",
        description="Start a vLLM server for a recipe with the engine gear_lightning.generation.VLLMEngine. It begins "
        "with random weights; the run sends it the policy's before the first rollouts.",
    )
    parser.add_argument(
        "--python",
        type=Path,
        metavar="PATH",
        help="Python of the environment with vLLM (default .venv-vllm/bin/python)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1); it has no password"
    )
    parser.add_argument("--port", type=int, default=8765, help="port to listen at (default 8765)")
    parser.add_argument(
        "--kv-gib",
        type=float,
        metavar="GIB",
        help="memory of the key-value cache (default: vLLM's; 2 on a CPU)",
    )
    parser.add_argument(
        "--keep-serving",
        action="store_true",
        help="do not end on SIGTERM, SIGUSR1 and SIGUSR2, which Slurm sends to all processes of a job that has to "
        "save; SIGINT ends the server",
    )
    parser.add_argument(
        "--vllm", default="", metavar="OPTIONS", help="further options of vLLM, e.g. '--tensor-parallel-size 2'"
    )
    return parser


def export() -> CommandParser:
    """Return the parser of ``export``."""
    parser = CommandParser("export", description="Write a Hugging Face model directory.")
    parser.add_argument("checkpoint", type=Path, help="a .ckpt file")
    parser.add_argument("folder", type=Path, help="directory to write")
    parser.add_argument("--adapter", action="store_true", help="write only the adapters, for peft, instead of merging")
    parser.add_argument(
        "--dtype", choices=get_args(DType), default="auto", help="dtype of the weights; auto: as in the checkpoint"
    )
    parser.add_argument("--shard-size", metavar="SIZE", help="maximum size of a weights file, e.g. 5GB; default: 50GB")
    parser.add_argument("--no-card", dest="card", action="store_false", help="write no model card (README.md)")
    parser.add_argument("--license", metavar="ID", help="license on the model card, e.g. apache-2.0")
    parser.add_argument(
        "--base", metavar="DIR|ID", help="the base model of the adapters, if it has moved since training"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="also upload the directory to this repository of the hub")
    parser.add_argument("--private", action="store_true", help="with --push: make the repository private if it is new")
    return parser


def parity() -> CommandParser:
    """Return the parser of ``parity``."""
    parser = CommandParser(
        "parity",
        description="Train a recipe for a few iterations in one process and under several strategies, from the same "
        "weights and seeds, and compare rollouts, credit, losses, gradients and updates. Differences that rounding "
        "explains count as equal. All other options are those of fit.",
        epilog=f"Exit status: {EQUAL} if all are equal, {DIFFERENT} if some differ or failed, {UNCOMPARED} if nothing "
        "was trained, or if no iteration could be compared for one of them.",
    )
    parser.add_argument("--strategies", default="ddp,fsdp,zero1,zero2,zero3", help="comma-separated: %(default)s")
    parser.add_argument("--iterations", type=int, default=3, help="RL iterations (default %(default)s)")
    parser.add_argument("--devices", type=int, help="number of processes per strategy (default: all GPUs, else 2)")
    parser.add_argument("--reference", default="one", help="one (a single process, the default), or a strategy")
    parser.add_argument("--resume", action="store_true", help="stop every strategy's run halfway and resume it")
    parser.add_argument(
        "--tolerance",
        type=float,
        help="relative difference of gradients, log-probs and credit that counts as rounding (default "
        f"{TOLERANCE.share:g} in float32, {LOW_TOLERANCE.share:g} in bfloat16)",
    )
    parser.add_argument(
        "--out", type=Path, help="directory for the runs (default: a temporary one, removed if all are equal)"
    )
    parser.add_argument("--deadline", type=float, default=3600, help="seconds for each run (default %(default)s)")
    return parser


def recredit() -> CommandParser:
    """Return the parser of ``recredit``. The options of the rules are only listed for the help."""
    parser = CommandParser(
        "recredit",
        usage="gear-lightning recredit RUN --credit RULE [--credit.OPTION VALUE ...] [--against RULE "
        "[--against.OPTION VALUE ...]] [--iterations A-B] [--html [PATH]] [--json PATH]",
        description="Recompute the credit of a run's recorded rollouts, without its model, and show the differences "
        "from the recorded credit, or from that of a second rule. RULE is a class of gear_lightning.credit "
        "(GEAR, RLSD, ...), the import path of your own class, or a YAML file with model.credit; --credit.help RULE "
        "lists its options.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory (holds rollouts/ and tokenizer/)")
    parser.add_argument("--credit", metavar="RULE", help="rule to compute")
    parser.add_argument("--against", metavar="RULE", help="rule to compare with (default: the recorded credit)")
    parser.add_argument("--iterations", metavar="A-B", help="only these, inclusive; or one number (default: all)")
    parser.add_argument(
        "--html", nargs="?", type=Path, const=Path(), metavar="PATH",
        help=f"write the credit page with the computed and the recorded credit (default RUN/{PAGE}; the newest "
        f"{ON_PAGE:,} rollouts)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all values, of every iteration, as JSON")
    return parser


def template() -> CommandParser:
    """Return the parser of ``template``."""
    parser = CommandParser(
        "template",
        description="Check a model's chat template: show what is trained on and what is context, and prove that tool "
        "calls are read back as they are written.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="like model.policy.path: a directory, hub id, .gguf or package:..."
    )
    parser.add_argument("--tool_syntax", default="auto", choices=["auto", "json", "json_list", "words"])
    parser.add_argument("--list_tools", default="template", choices=["template", "system"])
    parser.add_argument(
        "--template_arguments", type=json.loads, metavar="JSON", help="like model.chat.template_arguments"
    )
    return parser


WITH_RECIPE: dict[str, Callable[[], CommandParser]] = {"doctor": doctor, "parity": parity, "slurm": slurm}
PARSERS: dict[str, Callable[[], CommandParser]] = {
    "credit": credit, "compare": compare, "export": export, "recredit": recredit,
    "template": template, **WITH_RECIPE
}  # fmt: skip
