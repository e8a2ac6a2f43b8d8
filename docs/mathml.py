"""Write mathematics as MathML, which browsers draw themselves: no script, no font and no network is needed."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

SHORT_FRACTION = re.compile(r"(\\[td]?frac)\s*(\w)\s*(\w)")
WORD_JOINER = "\N{WORD JOINER}"  # no line begins with the full stop or comma after a formula


def inline(writer: Any, node: nodes.math) -> None:
    """Write a formula within a sentence."""
    writer.body.append(mathml(node.astext(), as_block=False) + WORD_JOINER)
    raise nodes.SkipNode


def display(writer: Any, node: nodes.math_block) -> None:
    """Write a formula on lines of its own."""
    writer.body.append(f'<div class="math">{mathml(node.astext(), as_block=True)}</div>\n')
    raise nodes.SkipNode


def mathml(tex: str, as_block: bool) -> str:
    r"""Convert TeX. An unknown command is an error. The converter would read ``\frac12`` as a fraction of 12."""
    return tex2mathml(SHORT_FRACTION.sub(r"\1{\2}{\3}", tex), as_block=as_block)


def setup(app: Any) -> dict[str, bool]:
    """Register the renderer for `html_math_renderer`."""
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
