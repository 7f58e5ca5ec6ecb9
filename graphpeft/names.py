"""Which text may become the name of an attribute. torch.fx writes such names into the code that it generates, as
`self.adapters.NAME.q`, or in quotes without escaping; so a name is the one way by which text could become code.

Every name that graphpeft gives enters here: of adapters by `is_name`, of everything made from roles and paths by `attribute`.
"""

from __future__ import annotations

import hashlib
import keyword
import re
import unicodedata

from torch import fx

LONGEST = 200


def is_name(text: str) -> bool:
    """Whether a text may name an attribute as it is: an identifier that Python reads as written."""
    plain = re.fullmatch(r"[^\W\d]\w*", text) is not None and text == unicodedata.normalize("NFKC", text)
    return plain and len(text) <= LONGEST and not keyword.iskeyword(text)


def attribute(text: str) -> str:
    """The text itself where it, a digit in front aside, may name an attribute; otherwise a name that is made from it."""
    if text and is_name(f"_{text}") and not keyword.iskeyword(text):
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9_]', '_', text)[: LONGEST // 2]}_{digest}"


def unwritable(graph: fx.Graph) -> str | None:
    """The first target of a graph that torch.fx would write into code as something else than a name, if there is one."""
    targets = (str(node.target) for node in graph.nodes if node.op in {"get_attr", "call_module"})
    return next((target for target in targets if not all(map(_writable, target.split(".")))), None)


def _writable(atom: str) -> bool:
    """Whether FX's code for an attribute of that name reads it: bare if it is an identifier, in quotes if not."""
    if atom.isidentifier():
        return is_name(atom) or len(atom) > LONGEST
    return bool(atom) and atom.isprintable() and not set(atom) & set("\"\\'")
