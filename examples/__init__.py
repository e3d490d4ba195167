"""Training loops that run end to end, and embedded worlds; installed as ``mteditflow_examples``."""

import os

# Suppresses hints about optional packages at import: a refused command must print only one line.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
