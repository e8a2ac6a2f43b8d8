"""Sphinx configuration. The build also draws the figures and writes the capability table."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "backends"), str(ROOT / "docs")]

import capabilities
import figures

import softk

project = "softk"
author = "The softk developers"
copyright = author
release = version = softk.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "myst_parser"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "softk"
html_static_path = ["_static"]
autodoc_typehints = "none"
napoleon_google_docstring = False
nitpicky = False
suppress_warnings = ["myst.xref_missing"]  # the README's links are relative to the repository

figures.main()
capabilities.main()
