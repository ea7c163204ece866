"""The command line. Heavy imports happen only in the commands that need them."""

import logging
import os
import signal
import sys
from importlib import import_module

HELP = """usage: gear-lightning COMMAND [OPTIONS]

Post-train LLM agents with granularity-adaptive credit (GEAR) on PyTorch Lightning.

train and evaluate (options: gear-lightning COMMAND --help [SECTION|CLASS])
  fit        train:      gear-lightning fit --config configs/quickstart.yaml
  validate   evaluate on the validation tasks
  test       the same, logged as test/...
  predict    write rollouts of the validation tasks

begin
  recipes    list the packaged recipes; --config takes their names
  init       write a small project that trains at once:  gear-lightning init my_project

inspect models and runs
  template   check a model's chat template:  gear-lightning template MODEL
  teacher-check  check that the teacher's divergence is informative:  gear-lightning teacher-check --config RECIPE
  status     show the phase of a run and its failures:  gear-lightning status RUN
  credit     print credit per token, or write the HTML page:  gear-lightning credit RUN
  study      compare arms of a recipe over seeds:  gear-lightning study --config configs/study/reading.yaml
  compare    learning curves and numbers of runs, with intervals:  gear-lightning compare RUN RUN ...
  recredit   compute credit of recorded rollouts under another rule:  gear-lightning recredit RUN --credit RLSD
  export     write a Hugging Face model directory:  gear-lightning export CHECKPOINT DIR [--adapter]

scale
  doctor     memory per GPU, and options that will not work:  gear-lightning doctor --config RECIPE --gpus 8
  parity     compare strategies on a recipe:  gear-lightning parity --config RECIPE --strategies ddp,fsdp,zero3
  noise-floor  measure how rounding changes credit:  gear-lightning noise-floor --config RECIPE
  serve      start a vLLM server for rollouts:  gear-lightning serve --config RECIPE
  slurm      write or submit a job:  gear-lightning slurm --config RECIPE --nodes 4 --gpus-per-node 8 --time 2-0
"""
LIGHTNING = ("fit", "validate", "test", "predict")
COMMANDS = {  # module of `gear_lightning.commands`; its `NAME_command` takes the arguments and returns the exit status
    "credit": "credit",
    "recredit": "recredit",
    "status": "status",
    "compare": "compare",
    "doctor": "doctor",
    "template": "template",
    "export": "export",
    "parity": "parity",
    "serve": "serve",
    "slurm": "slurm",
    "study": "study",
    "teacher-check": "teacher_check",
    "noise-floor": "noise_floor",
    "recipes": "recipes",
    "init": "init",
}


def main() -> None:
    """Entry point of ``gear-lightning``."""
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help"):
        print(HELP)
        return
    if args[0] == "--version":
        from . import __version__

        print(__version__)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make a busy CPU tens of times slower
    for name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao, which logs warnings
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed sets its logger's level itself, and logs on every process that there is no GPU
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.module != "real_accelerator")
    sys.path.append(os.getcwd())  # to import a user's own environments and rewards, as with `python -m`
    from .commands.arguments import look_at, unknown_command
    from .errors import UserError, one_line, printable
    from .recipes.packaged import with_packaged

    command, rest = args[0], args[1:]
    if command == "fit":  # record stop signals that arrive before training starts; training acts on them
        from .runs.signals import NOTES

        NOTES.watch(signal.SIGUSR1, signal.SIGUSR2)
    try:
        if command not in (*LIGHTNING, *COMMANDS):
            raise unknown_command(command, [*LIGHTNING, *COMMANDS])
        rest = with_packaged(rest)
        if (answer := look_at(command, rest)) is not None:
            print(answer, end="")
        elif command in LIGHTNING:
            from .recipes.cli import main as run

            run([command, *rest])
        else:
            name = COMMANDS[command]
            module = import_module(f".commands.{name}", __package__)
            sys.exit(getattr(module, f"{name}_command")(rest))
    except UserError as error:
        print(f"gear-lightning: error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader closed the pipe: `gear-lightning ... | head`
        if command in LIGHTNING:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        print(f"gear-lightning: error: {printable(line)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
