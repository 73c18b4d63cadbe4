"""Sphinx: `make docs` builds docs/_build/html."""

import nybble

project = "nybble"
author = "the nybble authors"
project_copyright = author
version = release = nybble.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
default_role = "code"

html_theme = "furo"
html_title = f"nybble {release}"
