"""Studies in the embedded worlds, such as the paper's findings: ``examples/ablations.py``."""
