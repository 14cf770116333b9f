"""Sphinx configuration. Build with ``make docs``; warnings are errors."""

from __future__ import annotations

from importlib.metadata import version as installed_version

project = "ghostgrad"
author = "The ghostgrad authors"
copyright = author
version = release = installed_version("ghostgrad")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Docstrings put names in single backticks; there is no need to resolve each of them.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"ghostgrad {release}"
