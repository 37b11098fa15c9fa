"""A JobSet on GKE: python -m experiments.launch kubernetes manifest --name=NAME --image=IMAGE --topology=v5e:16x16 ...

Needs the JobSet controller (kubernetes-sigs/jobset, 0.6 or later). A job a slice, a pod a host. A pod that is lost, or
ends with anything but 0, 1 and 2, restarts the set; 1 (diverged) and 2 (something is wrong) end it.
"""

import json

from experiments.launch.job import HOSTS, hosts_of
from experiments.topology import Topology, chips_of


def manifest(words: list[str], *, name: str, image: str, where: Topology, restarts: int, spot: bool) -> str:
    """As JSON, which is YAML too."""
    count = hosts_of(where)
    per_host = chips_of(where.shape) // count
    selector = {
        "cloud.google.com/gke-tpu-accelerator": HOSTS[where.generation].node,
        "cloud.google.com/gke-tpu-topology": where.shape,
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
    ends = {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": [1, 2]}}
    hosts = {"parallelism": count, "completions": count, "completionMode": "Indexed", "backoffLimit": 0}
    hosts |= {"podFailurePolicy": {"rules": [ends]}}
    job = {"name": "slice", "replicas": where.slices, "template": {"spec": hosts | {"template": {"spec": pod}}}}
    metadata = {
        "name": name,
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
    }
    rule = {"name": "ends", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    spec = {"failurePolicy": {"maxRestarts": restarts, "rules": [rule]}, "replicatedJobs": [job]}
    whole = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}
    return json.dumps(whole, indent=2) + "\n"
