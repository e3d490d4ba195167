"""The shapes world: tiny images, edits by rule, exact rewards, and a tiny FLUX editor for them."""

import os

# Else transformers says at import what torchvision, which nothing here needs, would be good for.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
