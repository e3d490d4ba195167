"""Reasons why a model of the Hugging Face hub cannot be read, in one line with the remedy."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

SITE = "https://huggingface.co"
# Errors of huggingface_hub by class name, most specific first; it is not imported here.
_REASONS = {
    "GatedRepoError": "its license is not accepted by the account of this machine; accept it on "
    "{site}/{source}, then run hf auth login",
    "RepositoryNotFoundError": "the hub has no such public model; check the spelling, or run hf "
    "auth login if it is private",
    "RevisionNotFoundError": "the hub does not have this revision of it",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set and the model is not in the cache; run hf "
    "download {source} with a network (hf auth login first if it is gated), or give a local folder",
    "LocalEntryNotFoundError": "{site}/{source} cannot be reached and the model is not in the "
    "cache; run hf download {source} with a network (hf auth login first if it is gated), or give "
    "a local folder",
}
# Raised by diffusers and transformers without a cause of the hub in some versions.
_UNREACHABLE = ("couldn't connect to", "Cannot reach")


def hub_reason(source: str | os.PathLike[str], error: BaseException) -> str | None:
    """Return why a model of the hub cannot be read; None if the hub is not the cause.

    Args:
        source: hub id, or a folder, for which the hub is never the cause.
        error: error of loading it, whose causes are searched.

    Example:
        >>> error = OSError("We couldn't connect to 'https://huggingface.co'")
        >>> "some/model with a network" in hub_reason("some/model", error)
        True
        >>> hub_reason("some/model", ValueError("rank: expected 2, got 3")) is None
        True
    """
    source = os.fspath(source)
    if os.path.exists(source):
        return None
    causes = list(_causes(error))
    names = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    if any(words in str(cause) for cause in causes for words in _UNREACHABLE):
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        names.add("OfflineModeIsEnabled" if offline else "LocalEntryNotFoundError")
    found = next((reason for name, reason in _REASONS.items() if name in names), None)
    return None if found is None else found.format(site=SITE, source=source)


class HubError(ValueError):
    """A model of the hub cannot be read."""


@contextmanager
def explaining_hub(name: str, source: str | os.PathLike[str]) -> Iterator[None]:
    """Replace an error of the hub by one line with its reason; retries print nothing.

    Args:
        name: name of the option that gives the model.
        source: hub id or folder.

    Raises:
        HubError: the hub is the cause; other errors of the block are unchanged.

    Example:
        >>> try:
        ...     with explaining_hub("detector", "some/model"):
        ...         raise OSError("We couldn't connect to 'https://huggingface.co'")
        ... except HubError as error:
        ...     print(str(error)[:59])
        detector: expected a model that can be read, got some/model
    """
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # a warning for each of its retries
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="huggingface_hub")
            yield
    except (OSError, ValueError) as error:
        reason = hub_reason(source, error)
        if reason is None:
            raise
        raise HubError(
            f"{name}: expected a model that can be read, got {source}: {reason}"
        ) from error
    finally:
        logger.setLevel(level)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the errors that led to it."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__
