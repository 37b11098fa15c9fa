"""TPU VMs by gcloud: python -m experiments.launch tpu ACTION --name=NAME --zone=ZONE --topology=v5e:16x16 --workdir=gs://...

create   asks for the slices (a queued resource; --spot: cheaper, and may be taken away)
setup    copies this commit to every host and installs it there
run      starts the training on every host, in the background; the same command again goes on where it stopped
logs     shows what a host prints, as it comes
watch    run, and again create, setup and run after a preemption, until the job has ended
stop     ends the training on every host
delete   gives the slices back
"""

import subprocess
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from experiments.launch.job import Slice, shell

ACTIONS = ("create", "setup", "run", "logs", "watch", "stop", "delete")
GONE = ("SUSPENDED", "SUSPENDING", "FAILED", "")  # states in which there is nothing to run on any more
LOG = "xlstm_jax.log"


class Pod(NamedTuple):
    """Slices of one name in one zone."""

    name: str
    zone: str
    slice: Slice
    slices: int = 1
    spot: bool = False
    project: str | None = None

    def gcloud(self, *words: str) -> list[str]:
        where = [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]
        return ["gcloud", "compute", "tpus", *words, *where]

    def nodes(self) -> list[str]:
        """A TPU VM a slice."""
        return [self.name] if self.slices == 1 else [f"{self.name}-{n}" for n in range(self.slices)]

    def create(self) -> list[list[str]]:
        size = (
            [f"--node-id={self.name}"]
            if self.slices == 1
            else [f"--node-prefix={self.name}", f"--node-count={self.slices}"]
        )
        kind = [f"--accelerator-type={self.slice.accelerator}", f"--runtime-version={self.slice.chip.runtime}"]
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
            "rm -rf code && mkdir code && tar -xzf code.tar.gz -C code && cd code && python3 -m venv .venv"
            " && .venv/bin/pip install -q -e '.[tpu]'"
        )
        return [["git", "archive", "--format=tar.gz", f"--output={archive}", "HEAD"], *copies, *self.on_hosts(install)]

    def run(self, words: list[str]) -> list[list[str]]:
        """pgrep: what runs already is left alone."""
        start = f"cd code && (pgrep -f [e]xperiments.train || nohup {shell(words)} > ../{LOG} 2>&1 &)"
        return self.on_hosts(start)

    def logs(self, host: int = 0) -> list[list[str]]:
        return self.on_hosts(f"tail -n 100 -f {LOG}", worker=str(host))[:1]

    def stop(self) -> list[list[str]]:
        """SIGTERM: the training saves, then ends."""
        return self.on_hosts("pkill -TERM -f [e]xperiments.train || true")

    def delete(self) -> list[list[str]]:
        return [self.gcloud("queued-resources", "delete", self.name, "--force", "--quiet")]

    def state(self) -> list[str]:
        return self.gcloud("queued-resources", "describe", self.name, "--format=value(state.state)")

    def running(self) -> list[str]:
        """Prints a line if host 0 still trains; ends with 1 if it does not."""
        return self.on_hosts("pgrep -f [e]xperiments.train", worker="0")[0]


def watch(pod: Pod, words: list[str], archive: str, ask: Callable[[list[str]], str], pause: float = 60) -> Iterator:
    """The commands of a job that outlives preemptions, one after another; `ask` runs one and gives its output.

    Ends when the slices are there and the training is not: it has finished, or failed by itself (see the logs).
    """
    ready = ask(pod.state()) == "ACTIVE"
    if ready:
        yield from pod.run(words)
    while True:
        time.sleep(pause)
        state = ask(pod.state())
        if state in GONE:
            ready = False
            if state:
                yield from pod.delete()
            yield from pod.create()
        elif state == "ACTIVE" and not ready:
            yield from pod.setup(archive)
            yield from pod.run(words)
            ready = True
        elif state == "ACTIVE" and not ask(pod.running()):
            return


def ask(words: list[str]) -> str:
    """The output of a command; "" where it fails."""
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()
