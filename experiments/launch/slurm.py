"""A SLURM job: python -m experiments.launch slurm submit --nodes=4 --config=... --workdir=DIR [--time=24:00:00]

The script asks for the signal some minutes before the time limit, on which the training saves and ends; SLURM then, and
after a preemption, puts the job back into its queue, and the same command goes on from the checkpoint.
"""

from experiments.launch.job import shell

PORT = 12321


def script(
    words: list[str], *, name: str, nodes: int, time: str, warning: int, options: list[str], workdir: str
) -> str:
    """For sbatch. warning: seconds before the time limit at which the training is told; options: further ones."""
    lines = [
        f"--job-name={name}",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        f"--time={time}",
        f"--signal=TERM@{warning}",
        "--requeue",
        "--open-mode=append",
        f"--output={workdir}/slurm-%j.log",
        *(f"--{option}" for option in options),
    ]
    address = f'"$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):{PORT}"'
    command = shell(words).replace("--processes=auto", f"--processes={address}")
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {line}" for line in lines),
            "# the training ends with 75 where it was told to stop before its end: once more, then",
            f"srun --kill-on-bad-exit=1 {command}",
            "code=$?",
            '[ "$code" -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"',
            'exit "$code"',
            "",
        ]
    )
