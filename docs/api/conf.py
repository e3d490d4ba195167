"""Sphinx: the API reference from docstrings; ``make api`` builds it without a warning.

The pages beside this file are written by ``python -m docs.render_api``.
"""

from typing import Any

import mteditflow
import mteditflow.rewards.server  # autodoc sets TYPE_CHECKING as it imports; fastapi fails then

project = "mteditflow"
author = "The mteditflow authors"
project_copyright = author
version = release = mteditflow.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["conf.py"]
html_theme = "furo"
html_title = f"mteditflow {version}"
html_copy_source = False

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# Every reference must lead somewhere, but for types in signatures: those of other packages have no
# page here, and no network is needed to build this.
nitpicky = True
nitpick_ignore_regex = [("py:class", ".*"), ("py:exc", "[A-Z][A-Za-z]+")]


def skip_field(_app: Any, _kind: str, name: str, thing: Any, _skip: bool, _options: Any) -> Any:
    """Leave out fields of tuples and defaults that are functions: the docstring tells of them."""
    is_field = type(thing).__name__ == "_tuplegetter"
    is_default = getattr(thing, "__name__", name) != name
    return True if is_field or is_default else None


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-skip-member", skip_field)
