"""Loops that run end to end, and the embedded world; installed as ``mteditflow_examples``."""
