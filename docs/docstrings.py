"""An extension of Griffe: docstrings as the site's Markdown wants them.

Doctests become blocks of code, or Markdown would take `>>>` for quotations. What the reference has
and pages of `docs/` become links where they are named.
"""

import re
from pathlib import Path

import griffe

EXAMPLE = re.compile(r"^>>> .*?(?=\n\n|\Z)", re.DOTALL | re.MULTILINE)
RETURNS = re.compile(r"^Returns:\n.*?(?=\n\n|\Z)", re.DOTALL | re.MULTILINE)
DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)


class Docstrings(griffe.Extension):
    def __init__(self) -> None:
        self._names = set(DIRECTIVE.findall(Path(__file__).with_name("reference.md").read_text()))

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            text = EXAMPLE.sub(_fenced, obj.docstring.value)
            text = RETURNS.sub(_without_types, text)
            text = re.sub(r"docs/(\w+\.md)", r"[docs/\1](\1)", text)
            obj.docstring.value = re.sub(r"`(jax_roipool\.[\w.]+)`", self._linked, text)

    def _linked(self, match: re.Match) -> str:
        return f"[{match[0]}][{match[1]}]" if match[1] in self._names else match[0]


def _fenced(match: re.Match) -> str:
    return f"```pycon\n{match[0].replace('<BLANKLINE>', '')}\n```"


def _without_types(match: re.Match) -> str:
    # Griffe would take what stands before a colon for the type.
    return match[0].replace(": ", "&#58; ")
