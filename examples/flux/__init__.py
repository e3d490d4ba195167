"""The FLUX trainer: configuration, presets, launch files of accelerate, and the parts of a run."""
