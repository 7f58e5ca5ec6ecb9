"""Real text that every Python installation has: docstrings of the standard library, labeled by their area.

The task is to predict from a docstring alone which part of the library it documents. No text occurs in both parts of
the split, or twice in one, and texts with the same opening count as one.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from graphpeft.errors import GraphPeftError

AREAS: Mapping[str, str] = {
    "concurrency": "asyncio multiprocessing threading concurrent subprocess queue selectors sched _threading_local",
    "data types": "collections _collections_abc enum typing functools operator types weakref copy heapq bisect "
    "dataclasses graphlib abc contextlib datetime _pydatetime calendar _strptime zoneinfo",
    "email": "email mailbox smtplib imaplib poplib mimetypes quopri",
    "files": "pathlib _pyio io os shutil tempfile glob fnmatch posixpath ntpath genericpath stat filecmp fileinput",
    "graphics": "tkinter turtle curses colorsys",
    "language": "ast inspect importlib dis symtable tokenize pyclbr pkgutil zipimport runpy modulefinder codeop code",
    "logging": "logging argparse optparse getopt getpass cmd warnings configparser",
    "mathematics": "_pydecimal fractions statistics random numbers _pylong",
    "persistence": "tarfile zipfile bz2 lzma gzip pickle pickletools shelve dbm sqlite3 plistlib json csv zipapp",
    "testing": "unittest doctest pdb bdb trace traceback timeit pstats profile tracemalloc",
    "web": "http urllib wsgiref xmlrpc ssl socket socketserver ftplib ipaddress webbrowser cgi html",
    "xml": "xml",
}
"""Area of the library -> its top-level modules and packages. Names that a Python version lacks are skipped."""

MIN_AREAS, MIN_TEXTS = 8, 1500
MIN_WORDS = 5
OPENING = 8
"""Texts with the same first eight words count as one: docstrings of `bz2` and `lzma` differ in a single word."""


class CorpusError(GraphPeftError):
    """The standard library's sources are missing or hold too little text."""


@dataclass(frozen=True)
class Text:
    """One docstring: its words, without its module's name, and its area."""

    words: str
    area: str


@dataclass(frozen=True)
class Corpus:
    """A labeled split with the same number of texts per area; a label is an index into `areas`."""

    areas: tuple[str, ...]
    train: tuple[Text, ...]
    test: tuple[Text, ...]

    def labels(self, texts: tuple[Text, ...]) -> list[int]:
        return [self.areas.index(text.area) for text in texts]


def corpus(seed: int = 0, train: int = 150, test: int = 50, root: Path | None = None) -> Corpus:
    """Collect and split the docstrings found under `root`, by default the running Python's standard library.

    `train` and `test` are texts per area; an area with fewer texts is left out. The result depends only on the sources
    and the seed.

    Raises:
        CorpusError: fewer than 8 areas are left, or fewer than 1,500 texts were found in all.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    found = unique(docstrings(root))
    shuffled = sorted(found, key=lambda text: hashlib.blake2b(f"{seed}:{text.words}".encode()).digest())
    by_area = {area: [text for text in shuffled if text.area == area] for area in AREAS}
    areas = tuple(area for area, texts in by_area.items() if len(texts) >= train + test)
    if len(areas) < MIN_AREAS or len(found) < MIN_TEXTS:
        raise CorpusError(
            f"{root}: {len(found)} docstrings, and {len(areas)} areas with at least {train + test}; the demo needs "
            f"{MIN_TEXTS} and {MIN_AREAS}. Usually this Python comes without the sources of its standard library (an "
            "embedded or zipped build, or a distribution that packages them separately). Run the demo with a full CPython 3.10 "
            "or later, such as one from python.org, pyenv, uv or conda."
        )
    return Corpus(
        areas,
        train=tuple(text for area in areas for text in by_area[area][test : test + train]),
        test=tuple(text for area in areas for text in by_area[area][:test]),
    )


def docstrings(root: Path) -> Iterator[Text]:
    """The docstrings of all modules listed in `AREAS`, in the order of their files."""
    for area, names in AREAS.items():
        for path in [path for name in names.split() for path in _sources(root, name)]:
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    words = clean(ast.get_docstring(node) or "", path.relative_to(root).with_suffix("").parts)
                    if len(words.split()) >= MIN_WORDS:
                        yield Text(words, area)


def clean(docstring: str, names: tuple[str, ...]) -> str:
    """The docstring on one line, without the names in its module's path, which would reveal the label."""
    pattern = "|".join(rf"\b_*{re.escape(name.lstrip('_'))}\b" for name in names)
    return " ".join(re.sub(pattern, " ", docstring, flags=re.IGNORECASE).split())


def unique(texts: Iterator[Text]) -> list[Text]:
    """The texts whose opening words did not occur in an earlier text of any area."""
    first: dict[str, Text] = {}
    for text in texts:
        first.setdefault(" ".join(re.findall(r"\w+", text.words.lower())[:OPENING]), text)
    return list(first.values())


def _sources(root: Path, name: str) -> list[Path]:
    """The Python files of a module or package, without its tests."""
    found = [*(root / name).rglob("*.py"), *root.glob(f"{name}.py")]
    return sorted(path for path in found if not {"test", "tests"} & set(path.relative_to(root).parts))
