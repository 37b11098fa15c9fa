"""A JobSet on GKE: python -m experiments.launch kubernetes manifest --name=NAME --image=IMAGE --topology=v5e:16x16 ...

Needs the JobSet controller (kubernetes-sigs/jobset). A job a slice, a pod a host; a pod that fails restarts the set.
"""

import json

from experiments.launch.job import Slice


def manifest(words: list[str], *, name: str, image: str, slice: Slice, slices: int, restarts: int, spot: bool) -> str:
    """As JSON, which is YAML too."""
    per_host = slice.chips // slice.hosts
    selector = {
        "cloud.google.com/gke-tpu-accelerator": slice.chip.node,
        "cloud.google.com/gke-tpu-topology": slice.shape,
    } | ({"cloud.google.com/gke-spot": "true"} if spot else {})
    container = {
        "name": "train",
        "image": image,
        "command": words,
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
        "resources": {"requests": {"google.com/tpu": per_host}, "limits": {"google.com/tpu": per_host}},
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 120,  # to save in
        "nodeSelector": selector,
        "containers": [container],
    }
    hosts = {"parallelism": slice.hosts, "completions": slice.hosts, "completionMode": "Indexed", "backoffLimit": 0}
    job = {"name": "slice", "replicas": slices, "template": {"spec": hosts | {"template": {"spec": pod}}}}
    metadata = {
        "name": name,
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
    }
    spec = {"failurePolicy": {"maxRestarts": restarts}, "replicatedJobs": [job]}
    whole = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}
    return json.dumps(whole, indent=2) + "\n"
