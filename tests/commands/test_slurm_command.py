"""``gear-lightning slurm``: the script that it writes, the options that it refuses, and a recipe under torchrun."""

import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from quickstart_runs import DEADLINE, command_line, metrics

from gear_lightning.callbacks.startup import check_launch
from gear_lightning.commands import serve
from gear_lightning.commands.slurm import slurm_command
from gear_lightning.errors import UserError
from gear_lightning.recipes.slurm_script import seconds

pytestmark = pytest.mark.usefixtures("starts_quickly")
RECIPE = "configs/quickstart.yaml"
SIZE = ("--nodes", "2", "--gpus-per-node", "4", "--time", "24:00:00")


@pytest.fixture(autouse=True)
def _in_the_checkout(repository, monkeypatch):
    monkeypatch.chdir(repository)


@pytest.fixture
def script(capsys):
    """Returns the printed script of a command."""

    def write(*options: str, recipe: str = RECIPE) -> str:
        assert slurm_command(["--config", recipe, *options, "--dry-run"]) == 0
        return capsys.readouterr().out

    return write


def asked(text: str) -> dict[str, str]:
    """Return the options of the script's SBATCH lines."""
    words = [word for line in re.findall(r"^#SBATCH (.*)", text, re.MULTILINE) for word in shlex.split(line)]
    return dict(word.removeprefix("--").partition("=")[::2] for word in words)


def launched(text: str) -> tuple[dict[str, str], list[str]]:
    """Return the options of srun, and the command that it runs."""
    words = shlex.split(text[text.index("exec srun") :].replace("\\\n", ""))[2:]
    end = next(i for i, word in enumerate(words) if not word.startswith("--"))
    return dict(o.removeprefix("--").partition("=")[::2] for o in words[:end]), words[end:]


def test_the_script_requests_one_process_per_gpu_and_trains_with_as_many(script):
    text = script(*SIZE, "--trainer.max_epochs", "7")
    options = asked(text)
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == ("2", "4", "4")
    assert (options["time"], options["open-mode"], options["signal"]) == ("24:00:00", "append", "USR1@300")
    assert "requeue" in options
    srun, command = launched(text)
    assert command[:4] == [sys.executable, "-m", "gear_lightning", "fit"]
    run = str(Path("runs/quickstart").absolute())
    for option in ("num_nodes=2", "devices=4", "accelerator=gpu", f"default_root_dir={run}"):
        assert f"--trainer.{option}" in command
    assert "--ckpt_path=last" in command
    assert command[command.index("--trainer.max_epochs") + 1] == "7"
    assert srun["output"] == f"{run}/slurm/%j_%t.log"
    assert srun["open-mode"] == "append"
    assert srun["cpus-per-task"] == options["cpus-per-task"] == "4"
    assert "OMP_NUM_THREADS=4" in text


def test_the_script_is_valid_bash(script, tmp_path):
    odd = tmp_path / "it's a run"
    text = script(
        *SIZE, f"--trainer.default_root_dir={odd}", "--setup", 'export NOTE="two words"', "--container", "a b#c",
        "--container-mounts", "/data:/data", "--seeds", "0-3%2", "--data.micro_batch_size=32",
    )  # fmt: skip
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr
    # the arguments after the shell has expanded them
    stub = 'srun() { printf \'%s\\n\' "$@"; }\nexec() { "$@"; }\nSLURM_ARRAY_TASK_ID=3\n' + text
    words = subprocess.run(["bash"], input=stub, text=True, capture_output=True, check=True).stdout.splitlines()
    assert f"--trainer.default_root_dir={odd}/seed_3" in words
    assert {"--seed_everything=3", "--data.seed=3"} <= set(words)
    assert "--container-image=a b#c" in words
    assert f"--container-mounts={Path.cwd()}:{Path.cwd()},{odd}:{odd},/data:/data" in words
    assert words[words.index("-m") - 1] == "python", "must be the interpreter of the container"
    options = asked(text)
    assert options["array"] == "0-3%2"
    assert options["output"] == f"{odd}/slurm/%A_%a.out"


VLLM = ("--generation.engine", "gear_lightning.generation.VLLMEngine", "--serve-options", "--python /opt/vllm/python")


def steps(text: str) -> list[tuple[dict[str, str], list[str]]]:
    """Return the options and the command of each srun of a job with serving nodes, as the shell expands them."""
    stub = r"""
scontrol() { printf '%s\n' n1 n2 n3; }
getent() { echo "10.0.0.${2#n} STREAM $2"; }
srun() { printf '%s\0' "$@" >> "$OUT"; printf '\0' >> "$OUT"; }
squeue() { :; }; scancel() { :; }; timeout() { :; }; find() { :; }
export -f scontrol getent
SLURM_JOB_ID=1203
"""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        subprocess.run(["bash"], input=stub + text, text=True, env={**os.environ, "OUT": str(out)}, check=False)
        found = []
        for step in out.read_text().rstrip("\0").split("\0\0"):
            words = step.split("\0")
            end = next(i for i, word in enumerate(words) if not word.startswith("--"))
            found.append((dict(o.removeprefix("--").partition("=")[::2] for o in words[:end]), words[end:]))
    return sorted(found, key=lambda step: step[0].get("job-name", ""))


def test_the_last_nodes_serve_and_the_others_train_with_their_addresses(script):
    text = script(
        "--nodes=3", "--serve-nodes=2", "--gpus-per-node=4", "--gpus-per-server=2", "--time=1:00:00", *VLLM,
        "--cpus-per-task=6",
    )  # fmt: skip
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert asked(text)["nodes"] == "3"
    (train, fit), (serve, command) = steps(text)
    assert (train["nodes"], train["relative"], train["ntasks"], train["ntasks-per-node"]) == ("1", "0", "4", "4")
    assert (serve["nodes"], serve["relative"], serve["ntasks"], serve["ntasks-per-node"]) == ("2", "1", "4", "2")
    assert serve["cpus-per-task"] == "12"
    run = str(Path("runs/quickstart").absolute())
    assert serve["output"] == f"{run}/slurm/%j_serve_%t.log"
    port = 20000 + 1203 % 600 * 16
    servers = ",".join(f"http://10.0.0.{node}:{port + i}" for node in (2, 3) for i in (0, 1))
    assert f"--generation.engine.servers=[{servers}]" in fit
    assert f"--generation.engine.folder={run}/served_model" in fit
    assert "--trainer.num_nodes=1" in fit
    assert command[:2] == ["bash", "-c"]
    task = ["bash", "-c", command[2].replace('exec "$@"', 'echo "$CUDA_VISIBLE_DEVICES" "$@"'), *command[3:]]
    place = {"SLURM_NODEID": "1", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3", "GEAR_PORT": str(port)}
    environment = {**os.environ, **place, "GEAR_HOSTS": "10.0.0.2 10.0.0.3 "}
    words = shlex.split(subprocess.check_output(task, env=environment, text=True))
    assert words[0] == "2,3"
    assert words[-4:] == ["--host", "10.0.0.3", "--port", str(port + 1)]
    assert words[1:5] == [sys.executable, "-m", "gear_lightning", "serve"]
    assert {"--keep-serving", "--python=/opt/vllm/python", f"--trainer.default_root_dir={run}"} <= set(words)
    assert command[command.index("--python=/opt/vllm/python") + 1] == "--vllm=--tensor-parallel-size 2"


def test_a_folder_of_the_recipe_is_kept_and_seeds_have_servers_of_their_own(script):
    text = script(*SIZE, "--serve-nodes=1", *VLLM, "--generation.engine.folder=/shared/weights", "--seeds=0-3")
    assert "served_model" not in text
    assert text.count("--trainer.default_root_dir=") == 2
    assert text.count("/seed_$SLURM_ARRAY_TASK_ID") == 2
    assert "slurm/%A_%a_serve_%t.log" in text


def test_timeouts_of_collectives_are_longer_than_that_of_the_watchdog(script):
    text = script(*SIZE, "--config", "configs/strategy/ddp.yaml", "--timeout", "600")  # not waited for
    _, command = launched(text)
    assert "--watchdog.seconds=600" in command
    assert "--trainer.strategy.init_args.timeout=0:20:00" in command
    assert "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=1200" in text
    for strategy in ("fsdp", "zero2"):
        text = script(*SIZE, "--config", f"configs/strategy/{strategy}.yaml")
        assert "--trainer.strategy.init_args.timeout=1:00:00" in launched(text)[1]
    again = script(*SIZE, "--timeout", "600")  # not waited for
    assert "init_args.timeout" not in again, "the recipe names no strategy, so no timeout can be set"


@pytest.mark.parametrize("file", ["gpu_nodes", "cpu_trial"])
def test_the_shipped_cluster_files_work(script, file):
    options = ("--cluster", f"configs/slurm/{file}.yaml", "--data.tasks_per_iteration", "32")
    found = asked(script(*options))
    assert found["nodes"] == {"gpu_nodes": "4", "cpu_trial": "2"}[file]
    assert found["time"] == {"gpu_nodes": "24:00:00", "cpu_trial": "15"}[file], "YAML would parse it as a number"
    assert asked(script(*options, "--nodes", "1"))["nodes"] == "1", "the command line overrides the file"


def test_the_example_script_is_the_output_of_its_command(script, repository):
    example = (repository / "configs" / "slurm" / "four_nodes.sh").read_text()
    command = shlex.split(re.search(r"^# gear-lightning slurm (.*)", example, re.MULTILINE)[1])
    text = script(*command[2:], recipe=command[1])
    text = text.replace(str(repository), "/home/me/gear_lightning")
    assert text.splitlines()[2:] == example.splitlines()[2:]


def test_a_script_is_written_to_the_folder_of_its_logs(tmp_path, capsys):
    run = tmp_path / "run"
    assert slurm_command(["--config", RECIPE, *SIZE, f"--trainer.default_root_dir={run}"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == run / "slurm" / "job.sh"
    assert asked(path.read_text())["output"] == f"{run}/slurm/%j.out"


def test_a_dry_run_writes_nothing(tmp_path, script):
    script(*SIZE, f"--trainer.default_root_dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


WRONG = {
    ("--nodes", "0"): "--nodes 0: must be at least 1",
    ("--gpus-per-node", "-1"): "--gpus-per-node -1: must be at least 1, or 0",
    ("--gpus-per-node", "0"): "add e.g. --tasks-per-node",
    ("--tasks-per-node", "2"): "--tasks-per-node 2: must equal --gpus-per-node 4",
    ("--cpus-per-task", "0"): "--cpus-per-task 0",
    ("--time", "a day"): "--time a day: give hours:minutes:seconds",
    ("--time", "5"): "--signal 300: the job would be asked to save 300 s before its limit, but --time 5 is 300 s",
    ("--signal", "0"): "--signal 0",
    ("--timeout", "0"): "--timeout 0",  # not waited for
    ("--name", "bash"): "Lightning treats a job of that name as a shell",
    ("--trainer.default_root_dir", "runs/interactive"): "--name interactive",
    ("--trainer.default_root_dir", "runs/50%"): "'%' and ',' in a path",
    ("--seeds", "0-3", "--data.seed", "1"): "--seeds sets --data.seed in each run",
    ("--seeds", "one"): "--seeds one: give seeds as 0-9",
    ("--sbatch", "exclusive"): "--sbatch exclusive: give a full option",
    ("--config", "configs/none.yaml"): "--config configs/none.yaml: no such file",
    ("--trainer.devices", "3"): "--trainer.devices is set by the job: give --gpus-per-node",
    ("--ckpt_path", "a.ckpt"): "copy it and its .json to RUN/checkpoints",
    ("--data.tasks_per_iteration", "12"): "data.tasks_per_iteration=12 is not divisible by 2 x 4 processes",
    ("--serve-nodes", "1"): "--serve-nodes 1: the recipe samples with CachedEngine; add --generation.engine",
    ("--serve-nodes", "2", *VLLM): "--serve-nodes 2: of --nodes 2, at least one node must train",
    ("--serve-nodes", "0", *VLLM): "--serve-nodes 0: must be at least 1",
    ("--serve-nodes", "1", *VLLM, "--gpus-per-server", "3"): "--gpus-per-server 3: must divide --gpus-per-node 4",
    ("--serve-nodes", "1", *VLLM[:2]): ".venv-vllm/bin/python is missing; run make vllm, or give --serve-options",
    ("--serve-nodes", "1", *VLLM, "--generation.engine.servers", "[http://a:1]"): "give only one of them",
    ("--serve-nodes", "1", *VLLM[:2], "--serve-options", "--port 9"): "--serve-options: --port is set by the job",
    ("--serve-nodes", "1", *VLLM[:2], "--serve-options", "--prt 9"): "--prt is no option of gear-lightning serve",
    ("--gpus-per-server", "2"): "--gpus-per-server has no effect without --serve-nodes",
    ("--serve-nodes", "1", *VLLM, "--data.tasks_per_iteration", "6"): "is not divisible by 1 x 4 processes",
    ("--cluster", "none.yaml"): "--cluster none.yaml: cannot be read (No such file",
}


@pytest.mark.parametrize("options", WRONG, ids=" ".join)
def test_jobs_that_would_fail_are_refused_before_submission(options, monkeypatch):
    monkeypatch.setattr(serve, "PYTHON", Path("no") / serve.PYTHON)
    with pytest.raises(UserError) as told:
        slurm_command(["--config", RECIPE, *SIZE, *options, "--dry-run"])
    assert WRONG[options] in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("missing", "told"),
    [(option, f"{option} is missing") for option in ("--time", "--gpus-per-node", "--config")],
)
def test_a_missing_option_is_named(missing, told):
    words = ["--config", RECIPE, *SIZE]
    del words[words.index(missing) : words.index(missing) + 2]
    with pytest.raises(UserError, match=re.escape(told)):
        slurm_command(words)


def test_an_option_that_is_unknown_to_fit_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        slurm_command(["--config", RECIPE, *SIZE, "--model.creddit", "3", "--dry-run"])
    assert ended.value.code == 2
    assert "creddit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nodez: 2", "no option 'nodez'; there are account, "),
        ("nodes: [2, 3]", "nodes takes one value"),
        ("- nodes", "one option per line, such as `nodes: 2`"),
        ("nodes: {", "no valid YAML"),
        ("nodes: 2\ntime: 1:00\nnodes: 3", "the key nodes is there twice, in lines 1 and 3"),
        ("submit: yes", "no option 'submit'"),
    ],
)
def test_an_invalid_cluster_file_is_named(tmp_path, text, told):
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=rf"{re.escape(str(file))}:(\d:)? ") as error:
        slurm_command(["--config", RECIPE, *SIZE, "--cluster", str(file), "--dry-run"])
    assert told in str(error.value)


def test_a_submission_without_slurm_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="sbatch is not on PATH"):
        slurm_command(["--config", RECIPE, *SIZE, "--submit"])


@pytest.mark.parametrize(("code", "said"), [(0, "Submitted batch job 17"), (1, "Invalid partition name")])
def test_a_submission_prints_the_output_of_sbatch(tmp_path, monkeypatch, capsys, code, said):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/bash\ntest -s "$1" || exit 9\necho {said}\nexit {code}\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    words = ["--config", RECIPE, *SIZE, "--submit", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    if code:
        with pytest.raises(UserError, match=f"sbatch did not accept .*job.sh: {said}"):
            slurm_command(words)
    else:
        assert slurm_command(words) == 0
        assert capsys.readouterr().out.endswith(f"{said}\n")


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("90", 5400), ("2:30", 150), ("24:00:00", 86400), ("2-12", 216000), ("1-00:30", 88200), ("1-0:0:1", 86401)],
)
def test_time_limits_are_parsed_like_in_slurm(limit, expected):
    assert seconds(limit) == expected


SLURM = {"SLURM_JOB_NAME": "run", "SLURM_STEP_ID": "0", "SLURM_NTASKS_PER_NODE": "2"}
TRAINER = {"devices": 2, "num_nodes": 2, "accelerator": "cpu", "plugins": None}


@pytest.mark.parametrize(
    ("variables", "trainer", "told"),
    [
        ({"SLURM_NTASKS": "4", "SLURM_NNODES": "2"}, {}, None),
        ({"SLURM_NTASKS": "4", "SLURM_NNODES": "2"}, {"devices": "auto"}, "asks for 2 on 2: give --trainer.num_nodes"),
        ({"SLURM_NTASKS": "4", "SLURM_NNODES": "2"}, {"devices": [0, 1]}, None),
        ({"SLURM_NTASKS": "4", "SLURM_NNODES": "2"}, {"devices": "0,1"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_NNODES": "1"}, {}, "Slurm started 4 tasks on 1 nodes"),
        ({"SLURM_NTASKS": "8", "SLURM_NNODES": "2"}, {}, "Slurm started 8 tasks on 2 nodes, and trainer.devices=2 x"),
        ({"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_STEP_ID": None}, {}, "put srun before the command"),
        ({"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": None}, {}, "give --ntasks-per-node=2"),
        ({"SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_JOB_NAME": "bash"}, {}, None),  # a shell in a job
        ({}, {}, None),
        ({"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "4"}, {}, None),
        ({"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2"}, {}, "torchrun started 2 processes"),
        ({"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "4", "SLURM_NTASKS": "2", "SLURM_NNODES": "2"}, {}, None),
    ],
)
def test_a_number_of_processes_that_does_not_match_the_recipe_is_refused(monkeypatch, variables, trainer, told):
    for name in [n for n in os.environ if n.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in {**SLURM, **variables}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    if told is None:
        check_launch({**TRAINER, **trainer})
    else:
        with pytest.raises(UserError) as error:
            check_launch({**TRAINER, **trainer})
        assert told in str(error.value)


@pytest.mark.parametrize(
    ("apart", "told"),
    [
        ("folder", "rank 1 on .* cannot see a file that rank 0 on .* wrote there; give a directory on a file system"),
        ("version", "rank 1 has other versions than rank 0: transformers is 9.9.9 there and 5.* on rank 0; give all"),
    ],
)
def test_all_ranks_raise_if_versions_or_run_directories_differ(tmp_path, repository, apart, told):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    running = []
    for rank in range(2):
        command, environment = command_line(Path("run"), "--trainer.strategy=ddp", "--trainer.devices=2")
        command = [str(repository / word) if word.startswith("configs/") else word for word in command]
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
        paths, folder = [str(repository), environment["PYTHONPATH"]], tmp_path
        if rank and apart == "version":
            (tmp_path / "other" / "transformers-9.9.9.dist-info").mkdir(parents=True)
            (tmp_path / "other" / "transformers-9.9.9.dist-info" / "METADATA").write_text("Version: 9.9.9\n")
            paths.insert(0, str(tmp_path / "other"))
        elif rank:
            folder = tmp_path / "elsewhere"
            folder.mkdir()
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        running.append(
            subprocess.Popen(
                command, cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
            )
        )
    for process in running:
        said = process.communicate(timeout=DEADLINE)[1]
        assert process.returncode == 2, said[-3000:]
        assert re.search(told, said), said[-3000:]
        assert "Traceback" not in said
    assert not list(tmp_path.rglob(".shared-*"))


def torchrun(run: Path, repository: Path, processes: int, *options: str) -> subprocess.CompletedProcess:
    """Run the recipe under torchrun."""
    command, environment = command_line(run, "--trainer.strategy=ddp", *options)
    ours = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [command[0], *ours, *command[1:]], cwd=repository, env=environment, timeout=DEADLINE, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


def test_the_same_recipe_trains_under_torchrun(tmp_path, repository):
    done = torchrun(tmp_path, repository, 2, "--trainer.devices=2", "--trainer.num_nodes=1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "each of 2 processes holds" in done.stderr + done.stdout
    assert len(metrics(tmp_path)) == 5


def test_torchrun_with_another_number_of_processes_is_refused(tmp_path, repository):
    done = torchrun(tmp_path, repository, 2, "--trainer.devices=1")
    assert done.returncode != 0
    assert "torchrun started 2 processes, and trainer.devices=1 x trainer.num_nodes=1 asks for 1" in done.stderr
    assert "in check_launch" not in done.stderr, "the error must be one line, without a traceback"


def test_files_and_commands_in_the_slurm_documentation_work(repository, script):
    text = (repository / "docs" / "slurm.md").read_text()
    assert set(re.findall(r"^\| `(\w+\.(?:yaml|sh))` \|", text, re.MULTILINE)) == {
        path.name for path in (repository / "configs" / "slurm").iterdir()
    }
    for block in re.findall(r"```bash\n(gear-lightning slurm .*?)```", text, re.DOTALL):
        words = shlex.split(block.replace("\\\n", "").replace("my_recipe.yaml", RECIPE))[2:]
        sent = [word for word in words if word not in ("--submit", "--dry-run")]
        assert script(*sent[2:], "--data.tasks_per_iteration=32", recipe=sent[1])
