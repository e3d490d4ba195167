"""The paper's findings, looked for in the shapes world; ``examples/ablations.py`` runs it."""
