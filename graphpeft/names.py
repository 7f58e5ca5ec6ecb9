"""Which text may become an attribute name.

torch.fx writes attribute names into generated code, as `self.adapters.NAME.q` or in quotes without escaping, so a name
is the one way for text to become code. Every name that graphpeft assigns is checked here: adapter names by `is_name`,
names made from roles and paths by `attribute`.
"""

from __future__ import annotations

import hashlib
import keyword
import re
import unicodedata

from torch import fx

LONGEST = 200


def is_name(text: str) -> bool:
    """Whether a text can name an attribute unchanged: an identifier that Python reads as written."""
    plain = re.fullmatch(r"[^\W\d]\w*", text) is not None and text == unicodedata.normalize("NFKC", text)
    return plain and len(text) <= LONGEST and not keyword.iskeyword(text)


def attribute(text: str) -> str:
    """The text itself if it can name an attribute (a leading digit is allowed); otherwise a name derived from it."""
    if text and is_name(f"_{text}") and not keyword.iskeyword(text):
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9_]', '_', text)[: LONGEST // 2]}_{digest}"


def unwritable(graph: fx.Graph) -> str | None:
    """The first target in a graph that torch.fx would write into code as something other than a name, or `None`."""
    targets = (str(node.target) for node in graph.nodes if node.op in {"get_attr", "call_module"})
    return next((target for target in targets if not all(map(_writable, target.split(".")))), None)


def _writable(atom: str) -> bool:
    """Whether FX generates valid code for an attribute of that name: bare for an identifier, quoted otherwise."""
    if atom.isidentifier():
        return is_name(atom) or len(atom) > LONGEST
    return bool(atom) and atom.isprintable() and not set(atom) & set("\"\\'")
