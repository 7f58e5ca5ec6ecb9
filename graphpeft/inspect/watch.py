"""Watch passes run: a table of all passes, dumps of their graphs before and after, printed graphs, and a progress bar."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches, unified_diff
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from graphpeft.errors import GraphPeftError
from graphpeft.inspect import pass_dump as listing
from graphpeft.registered import passes
from graphpeft.show.table import table
from graphpeft.tracing import Step, Watcher, watching

INDEX = "steps.json"
DUMPED = r"steps\.(json|txt)|\d{2,}-[^/\\]+\.(txt|before\.txt|after\.txt|diff)"
"""A pattern of the names of a dump's files."""


class WatchError(GraphPeftError, ValueError):
    """The watched pass does not exist, or the dump folder cannot be written."""


@dataclass
class Record:
    """A recorded step: its operators before and after, its time, and its error."""

    name: str
    path: tuple[str, ...]
    number: int
    before: Counter[str]
    after: Counter[str] = field(default_factory=Counter)
    compared: bool = False
    """Whether the result and the subject are of the same kind, so that `delta` is meaningful."""
    seconds: float = 0.0
    error: str | None = "did not end"
    files: list[str] = field(default_factory=list)

    @property
    def delta(self) -> dict[str, int]:
        """Change in the number of operators, by name."""
        if not self.compared:
            return {}
        return {op: n for op in {**self.before, **self.after} if (n := self.after[op] - self.before[op])}

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for `json.dumps`."""
        told = {"step": self.name, "path": self.path, "seconds": round(self.seconds, 6), "error": self.error}
        return told | {"before": self.before, "after": self.after, "delta": self.delta, "files": self.files}


@dataclass
class Seen:
    """The recorded steps, in the order in which they began. Prints as a table."""

    steps: list[Record] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [
            (f"{'  ' * (len(s.path) - 1)}{s.name}", f"{s.seconds:.3f}", sum(s.after.values()) or "", _delta_text(s))
            for s in self.steps
        ]
        return table(("step", "seconds", "operators", "change"), rows, right=["seconds", "operators"])


def _delta_text(one: Record) -> str:
    changes = sorted(one.delta.items(), key=lambda item: -abs(item[1]))
    text = " ".join(f"{n:+} {op}" for op, n in changes[:10]) + (" ..." if len(changes) > 10 else "")
    return text if one.error is None else f"failed: {one.error.splitlines()[0]}"


@contextmanager
def watch(
    dump: str | Path | None = None, print_after: str | Iterable[str] = (), progress: bool = False
) -> Iterator[Seen]:
    """Within this context record every pass of this thread, in `apply`, `merge`, `export` and all other calls.

    Args:
        dump: a folder, new or with an earlier dump. It gets a table (`steps.txt`, `steps.json`) and each pass's subject as
            text: `05-insert.before.txt`, `05-insert.after.txt` and `05-insert.diff`, or, if nothing changed,
            `02-capture.txt`.
        print_after: names of passes, or "all": print the graph after each to standard error.
        progress: show the current pass on standard error, if that is a terminal.

    Yields the recorded steps, which print as a table of seconds and changes in operators. The seconds of an outer pass
    include the cost of recording its inner passes.

    Raises:
        WatchError: there is no such pass, the folder holds something else, or, after the passes, the dump failed.
    """
    wanted = _known(print_after)
    folder = None if dump is None else _Folder(Path(dump))
    recorder = _Recorder(folder, wanted)
    with ExitStack() as stack:
        if progress and sys.stderr.isatty():
            stack.enter_context(watching(_Guarded(stack.enter_context(_progress(sys.stderr)))))
        guarded = _Guarded(recorder)
        stack.enter_context(watching(guarded))
        yield recorder.seen
        if guarded.error is not None:
            raise WatchError(f"Passes ran, but could not be watched: {guarded.error}") from guarded.error


def _known(names: str | Iterable[str]) -> frozenset[str]:
    wanted = frozenset([names] if isinstance(names, str) else names)
    if "all" in wanted:
        return frozenset(passes())
    known = passes()
    for name in sorted(wanted - known.keys()):
        near = get_close_matches(name, known, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise WatchError(f'There is no pass {name!r}.{hint} There are: {", ".join(known)}; or "all".')
    return wanted


class _Guarded:
    """A watcher that never raises: its first error stops it, and is stored until the passes are done."""

    def __init__(self, inner: Watcher) -> None:
        self.inner = inner
        self.error: Exception | None = None

    def begin(self, step: Step) -> None:
        self._tell(self.inner.begin, step)

    def advance(self, step: Step) -> None:
        self._tell(self.inner.advance, step)

    def end(self, step: Step) -> None:
        self._tell(self.inner.end, step)

    def _tell(self, what: Callable[[Step], None], step: Step) -> None:
        if self.error is None:
            try:
                what(step)
            except Exception as error:
                self.error = error


class _Recorder:
    """Records steps, and writes or prints their text on request."""

    def __init__(self, folder: _Folder | None, printed: frozenset[str]) -> None:
        self.seen = Seen()
        self.folder, self.printed = folder, printed
        self.open: dict[Step, tuple[Record, list[str]]] = {}

    def begin(self, step: Step) -> None:
        record = Record(step.name, step.path, len(self.seen.steps) + 1, listing.ops(step.subject))
        self.seen.steps.append(record)
        self.open[step] = record, listing.listing(step.subject) if self.folder is not None else []

    def advance(self, step: Step) -> None:
        pass

    def end(self, step: Step) -> None:
        record, before = self.open.pop(step)
        made = step.result if listing.listed(step.result) else step.subject
        record.after, record.compared = listing.ops(made), listing.alike(step.subject, made)
        record.seconds = step.seconds
        record.error = None if step.error is None else f"{type(step.error).__name__}: {step.error}"
        after = listing.listing(made) if self.folder is not None or step.name in self.printed else []
        if self.folder is not None:
            self.folder.write(record, before, after)
            self.folder.index(self.seen)
        if step.name in self.printed:
            print("\n".join([f"-- after {' > '.join(record.path)}", *after, ""]), file=sys.stderr)


class _Folder:
    """The files of a dump."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._clear()
            path.mkdir(parents=True, exist_ok=True)
            self.index(Seen())
        except OSError as error:
            raise WatchError(f"{path}: cannot dump there: {error}. Name a folder that can be written.") from error

    def _clear(self) -> None:
        """Delete the files of an earlier dump, as listed in its index."""
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        try:
            told = json.loads((self.path / INDEX).read_text(encoding="utf-8"))
            files = [INDEX, "steps.txt", *(name for one in told["graphpeft_steps"] for name in one["files"])]
        except (OSError, ValueError, KeyError, TypeError):
            raise WatchError(
                f"{self.path} exists and is not an earlier dump, so nothing is written there. Name a new folder."
            ) from None
        for name in files:
            if re.fullmatch(DUMPED, str(name)):  # whatever else an index lists is not ours
                (self.path / name).unlink(missing_ok=True)

    def index(self, seen: Seen) -> None:
        """Write the table. This happens after every step, so that it survives a crash in the next one."""
        told = {"graphpeft_steps": [one.as_dict() for one in seen.steps]}
        (self.path / INDEX).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        (self.path / "steps.txt").write_text(f"{seen}\n", encoding="utf-8")

    def write(self, record: Record, before: Sequence[str], after: Sequence[str]) -> None:
        name = f"{record.number:02}-{record.name}"
        if before == after or not before:
            texts = {"txt": after}
        else:
            texts = {"before.txt": before, "after.txt": after}
            if record.compared:
                texts["diff"] = list(unified_diff(before, after, "before", "after", lineterm=""))
        for ending, text in texts.items():
            if text:
                record.files.append(f"{name}.{ending}")
                (self.path / record.files[-1]).write_text("\n".join(text) + "\n", encoding="utf-8")


@contextmanager
def _progress(file: TextIO) -> Iterator[_Bar]:
    # Write to the given file: during a capture, `sys.stderr` itself is redirected to hide messages.
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[of]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=Console(file=file), transient=True) as shown:
        yield _Bar(shown)


class _Bar:
    """A progress line: the current pass, how much of it is done if known, and the elapsed time."""

    def __init__(self, shown: Progress) -> None:
        self.shown = shown
        self.task = shown.add_task("loading", total=None, of="")

    def begin(self, step: Step) -> None:
        self.advance(step)

    def advance(self, step: Step) -> None:
        of = f"{step.done}/{step.total}" if step.total else ""
        self.shown.update(
            self.task, description=" > ".join(step.path), completed=step.done, total=step.total or None, of=of
        )

    def end(self, step: Step) -> None:
        if step.outer is not None:
            self.advance(step.outer)
