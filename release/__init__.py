"""Checks of what is released: ``make dist`` and ``make matrix``."""
