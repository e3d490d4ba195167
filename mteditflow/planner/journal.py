"""A file of JSON lines that survives a kill at any moment: whole lines, each written once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from mteditflow.chains.errors import first_error

Record = TypeVar("Record", bound=BaseModel)


class Journal:
    """Appends lines to a file; a half line that a kill has left behind is cut off at the start.

    Args:
        path: made with its folder if it is not there.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "names.jsonl"
        >>> Journal(path).append('{"name": "cat"}')
        >>> with path.open("a") as file:
        ...     _ = file.write('{"na')
        >>> Journal(path).append('{"name": "dog"}')
        >>> path.read_text().split()
        ['{"name":', '"cat"}', '{"name":', '"dog"}']
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        whole = path.read_bytes()
        if not whole.endswith(b"\n"):
            os.truncate(path, whole.rfind(b"\n") + 1)

    def append(self, line: str) -> None:
        """Write one line and wait until it lies on the disk."""
        with self.path.open("ab") as file:
            file.write(f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())

    def read(self, model: type[Record]) -> Iterator[Record]:
        """Read the lines back.

        Raises:
            ValueError: a line is not of this form; the message names file, line and reason.
        """
        with self.path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield self._parse(model, line, number)

    def _parse(self, model: type[Record], line: str, number: int) -> Record:
        try:
            return model.model_validate_json(line)
        except ValidationError as error:
            raise ValueError(f"{self.path}:{number}: {first_error(error)}") from error
