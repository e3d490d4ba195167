"""Sphinx: the site of pages, notebooks and the API reference; ``make site`` builds it.

The pages in api/ are written by ``python -m docs.render_api``, the outputs of the notebooks by
``python -m docs.render_notebooks``.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # docs.site_links and the other extension

import mteditflow
import mteditflow.rewards.server  # autodoc sets TYPE_CHECKING as it imports; fastapi fails then
from docs.site_links import source_address

project = "mteditflow"
author = "The mteditflow authors"
project_copyright = author
version = release = mteditflow.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.linkcode",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "docs.site_links",
    "docs.site_notebooks",
]
html_theme = "furo"
pygments_dark_style = "one-dark"
html_title = f"mteditflow {version}"
html_copy_source = False
html_show_sourcelink = False
html_static_path = ["static"]
html_css_files = ["site.css"]

# Anchors of headings are those of GitHub, where the same pages are read.
myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 4

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

linkcode_resolve = source_address


def skip_field(_app: Any, _kind: str, name: str, thing: Any, _skip: bool, _options: Any) -> Any:
    """Leave out fields of tuples and defaults that are functions: the docstring describes them."""
    is_field = type(thing).__name__ == "_tuplegetter"
    is_default = getattr(thing, "__name__", name) != name
    return True if is_field or is_default else None


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-skip-member", skip_field)
