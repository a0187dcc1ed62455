"""The code that the pages show, to be run as it stands there."""

import re
import textwrap
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def snippet(page: str, *, with_line: str) -> str:
    """The indented block of a page of docs/ that has a line which begins so."""
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", (DOCS / page).read_text(), re.MULTILINE)
    (found,) = (block for block in blocks if re.search(rf"^    {re.escape(with_line)}", block, re.MULTILINE))
    return textwrap.dedent(found)
