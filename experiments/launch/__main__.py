"""Training on machines that are not this one: python -m experiments.launch tpu|slurm|kubernetes ACTION ... [--dry_run]

    tpu         create | setup | run | logs | watch | stop | delete     --name --zone --topology [--spot]
    slurm       submit | script                                         --nodes [--time --option=partition=NAME]
    kubernetes  apply | manifest                                        --name --image --topology [--spot]

Each takes --config=FILE.py[:arg] and --workdir=DIR (a folder that all hosts see) and --config.a.b=v, as
experiments.train does, which runs on every host. Topologies are those of experiments.plan: v5e:16x16, v5e-256, or
v5e:16x16*2 for two slices. --dry_run prints every command and does nothing.
"""

import subprocess
import sys
import tempfile

from experiments import command, planning
from experiments.build import resolve
from experiments.launch import kubernetes, slurm, tpu
from experiments.launch.job import HOSTS, hosts_of, shell, training
from experiments.topology import topology
from xlstm_jax import sharding
from xlstm_jax.names import unknown

ACTIONS = {"tpu": tpu.ACTIONS, "slurm": ("submit", "script"), "kubernetes": ("apply", "manifest")}
NEEDED = {
    "tpu": ("name", "zone", "topology"),
    "slurm": ("config", "workdir"),
    "kubernetes": ("name", "image", "topology", "config", "workdir"),
}


@command.exit_code
def main(argv: list[str]) -> int:
    parser = command.Arguments("launch", __doc__)
    parser.add_argument("where", help=", ".join(ACTIONS))
    parser.add_argument("action", help="; ".join(f"{where}: {', '.join(each)}" for where, each in ACTIONS.items()))
    parser.add_argument("--workdir", type=command.run_folder)
    for name in ("config", "name", "zone", "project", "topology", "image"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--restarts", type=int, default=10, help="kubernetes: of the whole set")
    parser.add_argument("--time", default="24:00:00", help="slurm: the time limit")
    parser.add_argument("--warning", type=int, default=300, help="slurm: seconds before it at which the training saves")
    parser.add_argument("--option", action="append", default=[], help="slurm: another sbatch option, partition=NAME")
    parser.add_argument("--host", type=int, default=0, help="tpu logs: of which host")
    parser.add_argument("--spot", action="store_true")
    parser.add_argument("--dry_run", action="store_true", help="print the commands")
    options = parser.with_overrides(argv)
    if options.where not in ACTIONS:
        raise ValueError(unknown("place", options.where, ACTIONS))
    if options.action not in ACTIONS[options.where]:
        raise ValueError(unknown(f"action of {options.where}", options.action, ACTIONS[options.where]))
    trains = options.where == "tpu" and options.action in ("run", "watch")
    needed = [*NEEDED[options.where], *(("config", "workdir") if trains else ())]
    missing = [f"--{name}" for name in needed if not getattr(options, name)]
    if missing:
        raise ValueError(f"{options.where} {options.action} needs {', '.join(missing)}")
    for name, least in (("nodes", 1), ("restarts", 0), ("warning", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} is {getattr(options, name)}: at least {least} is needed")
    if options.config:
        plain = resolve(planning.read(options.config, options.overrides)[0])
        if options.topology:
            sharding.mesh_sizes(plain.get("mesh"), topology(options.topology).device_count)
    return {"tpu": on_tpu, "slurm": on_slurm, "kubernetes": on_kubernetes}[options.where](options)


def on_tpu(options) -> int:
    where = topology(options.topology)
    if HOSTS[where.generation].runtime is None:
        raise ValueError(f"--topology={options.topology}: there are no TPU VMs of {where.generation}: use kubernetes")
    if not 0 <= options.host < (count := hosts_of(where) * where.slices):
        raise ValueError(f"--host is {options.host}: there are {count} hosts, counted from 0")
    pod = tpu.Pod(options.name, options.zone, where, options.spot, options.project)
    words = training(options.config, options.workdir, options.overrides, python=tpu.PYTHON)
    with tempfile.TemporaryDirectory() as folder:
        archive = f"{'DIR' if options.dry_run else folder}/code.tar.gz"
        if options.action == "watch" and not options.dry_run:
            return max((execute(each) for each in tpu.watch(pod, words, archive, tpu.ask)), default=0)
        steps = {
            "create": pod.create,
            "setup": lambda: pod.setup(archive),
            "run": lambda: pod.run(words),
            "logs": lambda: pod.logs(options.host),
            "watch": lambda: [pod.state(), *pod.create(), *pod.setup(archive), *pod.run(words), pod.status()],
            "stop": pod.stop,
            "delete": pod.delete,
        }
        return perform(steps[options.action](), options.dry_run)


def on_slurm(options) -> int:
    words = training(options.config, options.workdir, options.overrides)
    text = slurm.script(
        words,
        name=options.name or "xlstm_jax",
        nodes=options.nodes,
        time=options.time,
        warning=options.warning,
        options=options.option,
        workdir=options.workdir,
    )
    file = options.workdir / "job.sh"
    if options.action == "script" or options.dry_run:
        return show(text, [] if options.action == "script" else ["sbatch", str(file)])
    options.workdir.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return execute(["sbatch", str(file)])


def on_kubernetes(options) -> int:
    text = kubernetes.manifest(
        training(options.config, options.workdir, options.overrides),
        name=options.name,
        image=options.image,
        where=topology(options.topology),
        restarts=options.restarts,
        spot=options.spot,
    )
    words = ["kubectl", "apply", "-f", "-"]
    if options.action == "manifest" or options.dry_run:
        return show(text, [] if options.action == "manifest" else words)
    return execute(words, text)


def show(text: str, words: list[str]) -> int:
    """A file on stdout and, on stderr, the command that it is for."""
    print(text, end="", flush=True)
    if words:
        print(f"$ {shell(words)}", file=sys.stderr)
    return 0


def perform(commands: list[list[str]], dry_run: bool) -> int:
    """Runs them in order up to the first that fails; returns its exit code."""
    for words in commands:
        if dry_run:
            print(shell(words))
        elif code := execute(words):
            return code
    return 0


def execute(words: list[str], given: str | None = None) -> int:
    """Runs a command, shown first; its exit code."""
    print(f"$ {shell(words)}", file=sys.stderr, flush=True)
    try:
        return subprocess.run(words, input=given, text=True).returncode
    except FileNotFoundError:
        raise ValueError(f"{words[0]} is not installed here: install it, or see the commands by --dry_run") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
