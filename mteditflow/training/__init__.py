"""What a long run needs around its loop: rows, updates, checkpoints, evaluation, pictures.

Each part stands alone; none knows the trainer. Needs the extra ``mteditflow[train]``.
"""

try:
    import accelerate  # noqa: F401
    import matplotlib  # noqa: F401
    import peft  # noqa: F401
    import tqdm  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"mteditflow.training needs {error.name}: pip install 'mteditflow[train]'"
    ) from error
