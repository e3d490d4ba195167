"""Speed and memory of the hot functions, as ratios to plain code: ``python -m benchmarks``."""
