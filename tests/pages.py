"""The pages of the documentation, and the examples in them: a block of Python, and the output that it prints."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n+(?:^```text\n(?P<output>.*?)^```)?", re.DOTALL | re.MULTILINE)
