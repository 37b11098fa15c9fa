"""The parts of `experiments.bench`: cases, timing, our contenders, the others, and the report."""
