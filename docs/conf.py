"""Sphinx configuration. The build also draws the figures and writes the capability table."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "backends"), str(ROOT / "docs")]

import capabilities
import figures

import softk

project = "softk"
author = "The softk developers"
copyright = author
release = version = softk.__version__

extensions = [
    "mathml",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
templates_path = ["_templates"]
exclude_patterns = ["_build", "_templates"]
html_theme = "furo"
html_title = f"softk {release}"
html_static_path = ["_static", str(files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf")]
html_css_files = ["softk.css"]
html_math_renderer = "mathml"
autodoc_typehints = "none"
napoleon_google_docstring = False
nitpicky = False
copybutton_exclude = ".linenos, .gp, .go"  # a copied example has neither prompts nor output


def leave_out(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of tuples, which their docstrings describe, and the methods that scikit-learn adds."""
    return True if isinstance(obj, type(softk.Plan.plan)) or name.startswith("set_") else None


def setup(app: Any) -> None:
    """Choose the members that the pages of classes list."""
    app.connect("autodoc-skip-member", leave_out)


figures.main()
capabilities.main()
