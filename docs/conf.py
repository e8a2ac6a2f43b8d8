"""Sphinx configuration. The build also draws the figures and writes the capability table."""

from __future__ import annotations

import re
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
myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
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


#: A picture of the README with a variant for dark pages: the variant, the text in its place, and the picture.
PICTURE = re.compile(r'<picture>\s*<source [^>]*srcset="([^"]*)">\s*<img alt="([^"]*)" src="([^"]*)">\s*</picture>')


def by_theme(app: Any, path: Any, page: str, content: list[str]) -> None:
    """Show one of the two pictures: the theme of the site has a switch, which a `<picture>` does not follow."""
    content[0] = PICTURE.sub(r"![\2](\3){.only-light} ![\2](\1){.only-dark}", content[0])


def setup(app: Any) -> None:
    """Choose the members that the pages of classes list, and the pictures of the theme."""
    app.connect("autodoc-skip-member", leave_out)
    app.connect("include-read", by_theme)


figures.main()
capabilities.main()
