"""Studies in the embedded worlds, such as of the paper's findings; see ``examples/ablations.py``."""
