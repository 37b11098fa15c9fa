"""A SLURM job: python -m experiments.launch slurm submit --nodes=4 --config=... --workdir=DIR [--time=24:00:00]

The script asks for the signal some minutes before the time limit, on which the training saves and ends; SLURM then, and
after a preemption, puts the job back into its queue, and the same command goes on from the checkpoint.
"""

from pathlib import Path

from experiments.launch.job import shell

PORT = 12321
KILLS = 20  # restarts after which a killed process is not one more reason


def script(
    words: list[str], *, name: str, nodes: int, time: str, warning: int, options: list[str], workdir: Path
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
            f"srun --kill-on-bad-exit=1 {command}",
            "code=$?",
            "# 75: told to stop before its end, or a process was lost; above 128: killed, which may come again",
            f'[ "$code" -gt 128 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {KILLS} ] && again=1',
            '[ "$code" -eq 75 ] || [ "$again" ] && scontrol requeue "$SLURM_JOB_ID"',
            'exit "$code"',
            "",
        ]
    )
