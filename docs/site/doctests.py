"""The examples of the docstrings as code: mkdocstrings would take `>>>` for quotes in quotes."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^([ \t]*)>>> .*(?:\n[ \t]*\S.*)*", flags=re.MULTILINE)  # up to the next empty line


class Doctests(griffe.Extension):
    """Put each example of a docstring between fences."""

    def on_object(self, *, obj: griffe.Object, **settings: Any) -> None:
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(r"\n\1```pycon\n\g<0>\n\1```", obj.docstring.value)
