"""Server of content consistency over HTTP: ``python -m mteditflow.rewards.server``."""

try:
    import fastapi  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"mteditflow.rewards.server needs {error.name}: pip install 'mteditflow[rewards]'"
    ) from error

from mteditflow.rewards.consistency.wire import Limits
from mteditflow.rewards.server.app import create_app
from mteditflow.rewards.server.service import Service
from mteditflow.rewards.server.serving import serve

__all__ = ["Limits", "Service", "create_app", "serve"]
