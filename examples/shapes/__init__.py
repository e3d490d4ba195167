"""The shapes world: tiny images, edits by rule, exact rewards, and a tiny FLUX editor for them."""

from transformers.utils import logging

# Suppresses the hint of transformers at import to install torchvision, which is not needed here.
logging.set_verbosity_error()
