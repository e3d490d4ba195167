"""FLUX trainer: configuration and presets, what surrounds the loop, and launch files."""
