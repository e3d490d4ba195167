"""``python -m mteditflow`` is the ``mteditflow`` command."""

from mteditflow.cli import main

main()
