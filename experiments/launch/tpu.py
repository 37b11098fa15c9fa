"""TPU VMs by gcloud: python -m experiments.launch tpu ACTION --name=NAME --zone=ZONE --topology=v5e:16x16 --workdir=DIR

create   asks for the slices (a queued resource; --spot: cheaper, and may be taken away)
setup    copies this commit to every host and installs it there, with a Python of its own (a host's may be too old)
run      starts the training on every host, in the background; the same command again goes on where it stopped
logs     shows what a host prints, as it comes
watch    create, setup and run where that is missing; again after a preemption or exit code 75, until the job has ended
stop     ends the training on every host, which saves; end `watch` before
delete   gives the slices back
"""

import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from experiments.launch.job import HOSTS, accelerator, hosts_of, shell
from experiments.topology import Topology

ACTIONS = ("create", "setup", "run", "logs", "watch", "stop", "delete")
GONE = ("SUSPENDED", "SUSPENDING", "FAILED", "")  # states in which there is nothing to run on any more
LOG, ENDED = "xlstm_jax.log", "xlstm_jax.ended"  # what a host printed; the exit code of its training
PYTHON = ".venv/bin/python"
AT_WORK = f"pgrep -f '^{PYTHON} -m experiments[.]train'"  # not the shell whose command line names it too
UV = "curl -LsSf https://astral.sh/uv/install.sh | sh"  # a Python of its own: that of the image is 3.10
ENDS = ("0", "1", "2")  # exit codes after which the same command would do nothing else


class Pod(NamedTuple):
    """Slices of one name in one zone."""

    name: str
    zone: str
    where: Topology
    spot: bool = False
    project: str | None = None

    def gcloud(self, *words: str) -> list[str]:
        where = [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]
        return ["gcloud", "compute", "tpus", *words, *where]

    def nodes(self) -> list[str]:
        """A TPU VM a slice."""
        count = self.where.slices
        return [self.name] if count == 1 else [f"{self.name}-{n}" for n in range(count)]

    def create(self) -> list[list[str]]:
        size = (
            [f"--node-id={self.name}"]
            if self.where.slices == 1
            else [f"--node-prefix={self.name}", f"--node-count={self.where.slices}"]
        )
        runtime = HOSTS[self.where.generation].runtime
        kind = [f"--accelerator-type={accelerator(self.where)}", f"--runtime-version={runtime}"]
        spot = ["--spot"] if self.spot else []
        return [self.gcloud("queued-resources", "create", self.name, *size, *kind, *spot)]

    def on_hosts(self, command: str, worker: str = "all") -> list[list[str]]:
        return [
            self.gcloud("tpu-vm", "ssh", node, f"--worker={worker}", f"--command={command}") for node in self.nodes()
        ]

    def setup(self, archive: str) -> list[list[str]]:
        """`archive`: a .tar.gz of the repository."""
        copies = [self.gcloud("tpu-vm", "scp", archive, f"{node}:code.tar.gz", "--worker=all") for node in self.nodes()]
        install = (
            f"! {AT_WORK} || {{ echo 'a training is at work here: stop it first'; exit 1; }}; {UV}"
            " && rm -rf code && mkdir code && tar -xzf code.tar.gz -C code && cd code"
            " && ~/.local/bin/uv venv -q --python 3.11 && ~/.local/bin/uv pip install -q -e '.[tpu]'"
        )
        return [["git", "archive", "--format=tar.gz", f"--output={archive}", "HEAD"], *copies, *self.on_hosts(install)]

    def run(self, words: list[str]) -> list[list[str]]:
        """What runs already is left alone."""
        train = shlex.quote(f"{shell(words)}; echo $? > ../{ENDED}")
        start = f"rm -f ../{ENDED}; nohup bash -c {train} < /dev/null >> ../{LOG} 2>&1 &"
        return self.on_hosts(f"cd code && {{ {AT_WORK} || {{ {start} }}; }}")

    def logs(self, host: int = 0) -> list[list[str]]:
        """Counted over all slices: the hosts of the first, then those of the second."""
        node, worker = divmod(host, hosts_of(self.where))
        return self.on_hosts(f"tail -n 100 -F {LOG}", worker=str(worker))[node : node + 1]

    def stop(self) -> list[list[str]]:
        """SIGTERM: the training saves, then ends."""
        return self.on_hosts(AT_WORK.replace("pgrep", "pkill -TERM", 1) + " || true")

    def delete(self) -> list[list[str]]:
        return [self.gcloud("queued-resources", "delete", self.name, "--force", "--quiet")]

    def state(self) -> list[str]:
        return self.gcloud("queued-resources", "describe", self.name, "--format=value(state.state)")

    def status(self) -> list[str]:
        """Prints "running", or the exit code of the training of host 0; nothing where there was none."""
        return self.on_hosts(f"{AT_WORK} > /dev/null && echo running || cat {ENDED}", worker="0")[0]


def watch(pod: Pod, words: list[str], archive: str, ask: Callable[[list[str]], str], pause: float = 60) -> Iterator:
    """The commands of a job that outlives preemptions, one after another; `ask` runs one and gives its output.

    Ends when the training has, by itself and for good: finished, diverged, or something is wrong (see the logs).
    """
    ready = began = False
    while True:
        state = ask(pod.state())
        if state in GONE:
            ready = False
            if state:
                yield from pod.delete()
            yield from pod.create()
        elif state == "ACTIVE":
            found = ask(pod.status())
            if began and found in ENDS:
                return
            if found != "running":
                if not ready:
                    yield from pod.setup(archive)
                yield from pod.run(words)
            ready = began = True
        time.sleep(pause)


def ask(words: list[str]) -> str:
    """The output of a command; "" where it fails."""
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()
