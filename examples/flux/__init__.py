"""What the FLUX trainer is told: its configuration, presets, and launch files of accelerate."""

import diffusers
import transformers

# Loading says its own words in the run's log; these would stand between them on every rank.
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
