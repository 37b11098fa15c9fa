"""Imported before JAX by what compiles for TPUs without one: the process is a CPU's, and libtpu only compiles."""

import os

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_ID": "0"}
os.environ.pop("XLA_FLAGS", None)  # libtpu ends a process that has flags of the CPU compiler
