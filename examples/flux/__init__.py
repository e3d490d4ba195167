"""What the FLUX trainer is told: its configuration, presets, and launch files of accelerate."""
