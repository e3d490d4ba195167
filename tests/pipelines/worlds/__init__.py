"""Tiny pipelines of the real diffusers classes: what ``make support`` records, replays and trains."""
