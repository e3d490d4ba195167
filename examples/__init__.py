"""Loops that run end to end, and the embedded world; installed as ``mteditflow_examples``."""

import os

# Its hints about optional packages, at import, would stand beside the one line of a refusal.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
