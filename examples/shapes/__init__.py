"""The shapes world: tiny images, edits by rule, exact rewards, and a tiny FLUX editor for them."""

from transformers.utils import logging

# Else transformers says at import what torchvision, which nothing here needs, would be good for.
logging.set_verbosity_error()
