"""Names of metrics on docs/metrics.md."""

import re
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


def documented() -> list[str]:
    """Names in the first column of the page's tables, such as ``reward/<reward>``."""
    rows = re.findall(r"^\| (`[^|]+) \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def undocumented(names: Iterable[str]) -> list[str]:
    """Names that no row of the page has."""
    patterns = [re.sub(r"<[a-z ]+>", "[^/]+", name) for name in documented()]
    return [name for name in names if not any(re.fullmatch(x, name) for x in patterns)]
