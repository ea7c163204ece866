"""The part of a batch script that serves: vLLM servers on the last nodes of a job, while the others train."""

from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from ..errors import UserError

PORTS = 16  # ports per job, one for each server of a node


@dataclass(frozen=True)
class Serving:
    """The serving nodes of a job.

    Args:
        nodes: number of nodes that serve, the last ones of the job.
        per_node: servers on each of them.
        gpus: GPUs of each server. 0: on CPUs.
        cpus: cores and threads of each server.
        folder: whether the job sets the directory in which weights are handed over, to one on the shared file system.
        options: options of ``gear-lightning serve``.
    """

    nodes: int
    per_node: int
    gpus: int
    cpus: int
    folder: bool
    options: tuple[str, ...] = ()

    def addresses(self, first: int) -> list[str]:
        """Return the lines that find the addresses of the servers.

        Args:
            first: number of nodes that train; the serving nodes follow them.
        """
        return [
            "# Servers listen only at the address by which the first node reaches their node. They have no password.",
            'NODES=($(scontrol show hostnames "$SLURM_JOB_NODELIST")) SERVERS=',
            f"export GEAR_HOSTS= GEAR_PORT=$((20000 + SLURM_JOB_ID % 600 * {PORTS}))",
            f'for node in "${{NODES[@]:{first}}}"; do',
            "  host=$(getent ahostsv4 \"$node\" | awk 'NR == 1 {print $1}')",
            '  GEAR_HOSTS+="${host:=$node} "',
            f"  for ((i = 0; i < {self.per_node}; i++)); do",
            '    SERVERS+="${SERVERS:+,}http://$host:$((GEAR_PORT + i))"',
            "  done",
            "done",
        ]

    def engine(self, run: str) -> list[str]:
        """Return the options of ``fit`` by which the training finds the servers, for a quoted run directory."""
        folder = [f"--generation.engine.folder={run}/served_model"] if self.folder else []
        return ['--generation.engine.servers="[$SERVERS]"', *folder]

    def start(self, srun: list[str], serve: list[str], run: str, logs: str, first: int, timeout: int) -> list[str]:
        """Return the lines that start the servers and wait until they answer.

        Args:
            srun: options of srun for a container.
            serve: the command that starts a server, without its address.
            run: the run directory, quoted.
            logs: the logs of the servers, ``%t`` for the number of a server.
            first: number of nodes that train.
            timeout: seconds until all servers must answer.
        """
        gpus = [
            "gpus=(${CUDA_VISIBLE_DEVICES//,/ })",
            f'export CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${{gpus[*]:SLURM_LOCALID * {self.gpus}:{self.gpus}}}")',
        ]
        task = [
            'trap "" USR1 USR2 TERM',
            f"export OMP_NUM_THREADS={self.cpus}",
            *(gpus if self.gpus else []),
            "hosts=($GEAR_HOSTS)",
            'exec "$@" --host "${hosts[SLURM_NODEID]}" --port "$((GEAR_PORT + SLURM_LOCALID))"',
        ]
        inside = "\n".join(["", *(f"    {line}" for line in task)])
        step = [
            "srun --job-name=serve",
            f"--nodes={self.nodes}",
            f"--relative={first}",
            f"--ntasks={self.nodes * self.per_node}",
            f"--ntasks-per-node={self.per_node}",
            f"--cpus-per-task={self.cpus}",
        ]
        kept = ["--kill-on-bad-exit=1 --wait=0 --open-mode=append", f"--output={quote(logs)}", *srun]
        find = "squeue --noheader --steps --jobs=\"$SLURM_JOB_ID\" --format='%i %j' | awk '$2 == \"serve\" {print $1}'"
        return [
            "# Slurm's signals reach every process of the job. Servers ignore those that ask it to save, because the",
            "# training needs them until it has saved; this script ends them with SIGINT.",
            *continued(" ".join(step), *kept, f"bash -c {quote(inside)} serve", *serve, end=" &"),
            "SERVING=$!",
            "",
            "end_servers() {",
            f"  step=$({find})",
            '  scancel --signal=INT "$SLURM_JOB_ID.${step##*.}"',
            "  for ((i = 0; i < 60; i++)); do kill -0 $SERVING || return; sleep 0.5; done",
            "  kill $SERVING",
            "} 2> /dev/null",
            "fail() {",
            f'  echo "$1; its log is in "{quote(str(Path(logs).parent))} >&2',
            "  end_servers",
            "  exit 1",
            "}",
            "",
            "trap 'end_servers; exit 143' TERM",
            "for url in ${SERVERS//,/ }; do",
            "  place=${url#http://}",
            '  until timeout 5 bash -c ": < /dev/tcp/${place/:/\\/}" 2> /dev/null; do',
            '    kill -0 $SERVING 2> /dev/null || fail "a vLLM server has ended before it answered"',
            f'    ((SECONDS < {timeout})) || fail "the vLLM server $url has not answered within {timeout} s"',
            "    sleep 1",
            "  done",
            "done",
            *(
                [
                    "# files of updates during which the job was killed",
                    f"find {run}/served_model -name 'gear-weights-*' -delete",
                ]
                if self.folder
                else []
            ),
        ]

    def end(self) -> list[str]:
        """Return the lines that wait for the training, which was started in the background, and end the servers."""
        return [
            "TRAINING=$!",
            "",
            "# a signal to this script also reaches the training",
            'for name in USR1 USR2 TERM; do trap "kill -s $name $TRAINING" $name; done',
            "while kill -0 $TRAINING 2> /dev/null; do wait $TRAINING; done",
            "wait $TRAINING",
            "STATUS=$?",
            "end_servers",
            "exit $STATUS",
        ]


def continued(*options: str, end: str = "") -> list[str]:
    """Return a command on several lines."""
    first, *rest = [*(f"{option} \\" for option in options[:-1]), options[-1] + end]
    return [first, *(f"  {line}" for line in rest)]


def serving_of(
    nodes: int, serve_nodes: int, per_server: int | None, gpus: int, cpus: int, folder: bool, given: list[str]
) -> Serving:
    """Return the serving nodes.

    Args:
        nodes: number of all nodes.
        serve_nodes: number of those that serve.
        per_server: GPUs of a server (default 1).
        gpus: GPUs of a node. 0: a job on CPUs.
        cpus: cores of a node.
        folder: see `Serving`.
        given: options of ``gear-lightning serve``.

    Raises:
        UserError: the numbers do not fit, or an option is one that the job sets.
    """
    if serve_nodes < 1:
        raise UserError(f"--serve-nodes {serve_nodes}: must be at least 1")
    if serve_nodes >= nodes:
        raise UserError(f"--serve-nodes {serve_nodes}: of --nodes {nodes}, at least one node must train")
    if per_server is not None and not gpus:
        raise UserError(f"--gpus-per-server {per_server}: the job has no GPUs; leave it out")
    share = 1 if per_server is None else per_server
    if share < 1 or gpus % share:
        raise UserError(f"--gpus-per-server {share}: must divide --gpus-per-node {gpus}")
    if gpus // share > PORTS:
        raise UserError(f"--gpus-per-server {share}: a node can have {PORTS} servers at most")
    per_node = gpus // share or 1
    return Serving(
        nodes=serve_nodes,
        per_node=per_node,
        gpus=share if gpus else 0,
        cpus=max(1, cpus // per_node),
        folder=folder,
        options=tuple(given),
    )
