"""Jobs on machines that are not this one: a TPU pod, a SLURM cluster, a Kubernetes cluster."""
