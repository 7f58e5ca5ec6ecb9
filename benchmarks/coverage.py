"""Roles on every architecture that transformers maps: builds each small, finds its sites, judges them, writes a table.

    python benchmarks/coverage.py                 # docs/coverage.md, about 15 minutes on two cores
    python benchmarks/coverage.py --only llama    # prints the lines of matching types, writes nothing

The right answers come from `tests/support/answers.py`, where people say by name what each weight does.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from architectures import build, entries  # noqa: E402
from judge import ATTENTION, MLP, Verdict, judge  # noqa: E402
from rich.progress import track  # noqa: E402

from graphpeft.capturing.survey import find_base_sites  # noqa: E402
from graphpeft.errors import CaptureError  # noqa: E402
from graphpeft.ir.site import Site  # noqa: E402

LIMIT = 300
"""Seconds for one model."""


INDEXER = "`q_a_proj` is read by the indexer of sparse attention too, so it is no bottleneck of one projection"
REASONS = {
    "axk2|deepseek_v32|dots3_note.*|glm_moe_dsa|glm5_next": INDEXER,
    "deepseek_v4": "in the 7 tokens of the example no window of the compressor is full; `o_a_proj` is reshaped into groups "
    "before it multiplies; where a table of tokens chooses the experts, the gate only weighs them",
    "hy_v4": "streams of the residual are mixed by sums of element-wise products, which is no residual join here",
    "inkling2.*": "what joins the layers is attention over depth, no sum; keys and values are multiplied by a projected kernel",
    "jetmoe": "how many tokens an expert gets depends on the data, so the way from its weights cannot be run to tell the rows",
    "reformer": "reversible layers, in an autograd function of their own, and attention without a softmax",
    "mra": "attention without a softmax: blocks of exponentials, normalized by hand",
    "zamba2?": "the MLP follows attention without a residual, and joins through one more linear layer",
    "muse_spark": "projections stand between the residual and the experts",
}
"""Why roles are missed, read off the models' sources."""


@dataclass
class Line:
    """What became of one model type and task."""

    model_type: str
    task: str
    name: str
    built: bool = True
    reason: str = ""
    """Why it could not be built or captured, or which parts of it were not reached."""
    captured: bool = False
    sites: dict[str, int] = field(default_factory=dict)
    fused: dict[str, int] = field(default_factory=dict)
    verdict: Verdict = field(default_factory=Verdict)
    seconds: float = 0.0

    def judged(self, roles: Iterable[str]) -> bool:
        return self.captured and any(self.verdict.expected.get(r) for r in roles)

    def right(self, roles: Iterable[str]) -> bool:
        return not any(r in self.verdict.missed or r in self.verdict.wrong for r in roles)


def examine(entry: tuple[str, str, str]) -> Line:
    """Build, capture, find and judge one entry. Sizes are the default config's, the depth is cut."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    line = Line(*entry)
    try:
        model = build(line.model_type, line.name)
    except Exception as error:  # what a default config or a missing package raises is up to transformers
        line.built, line.reason = False, _first_line(error)
        return line
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LIMIT)
    start = time.perf_counter()
    try:
        found = find_base_sites(model)
    except (CaptureError, TimeoutError) as error:
        line.reason = _first_line(error)
        return line
    finally:
        signal.alarm(0)
    line.seconds = time.perf_counter() - start
    line.captured, line.verdict = True, judge(model, found)
    line.sites, line.fused = _count(found.sites), _count(s for s in found.sites if s.rows is not None)
    line.reason = "; ".join(f"{path or 'the whole'}: {_first_line(why)}" for path, why in found.unreached.items())
    return line


def _count(sites: Iterable[Site]) -> dict[str, int]:
    return dict(Counter(site.role for site in sites))


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"not done after {LIMIT} s")


def _first_line(error: object) -> str:
    """The cause in one line, without paths of this machine."""
    text = " ".join(str(error).split())
    return re.sub(r"(?:/[\w.\-]+){2,}/", "", text).partition(" You can install")[0][:160].replace("|", "/")


def report(lines: list[Line], defaults: set[str]) -> Iterator[str]:
    """The page, line by line."""
    built = [x for x in lines if x.built]
    captured = [x for x in built if x.captured]
    attending, with_mlp = [x for x in captured if x.judged(ATTENTION)], [x for x in captured if x.judged(MLP)]
    wrong = [x for x in captured if any(r in x.verdict.wrong for r in (*ATTENTION, *MLP))]
    torch_version = torch.__version__.partition("+")[0]
    yield "# Roles on every architecture"
    yield ""
    yield "<!-- Written by benchmarks/coverage.py; do not edit. -->"
    yield ""
    yield f"Every model type that transformers {transformers.__version__} maps for ten tasks, built from its default config with"
    yield f"few layers on the meta device (torch {torch_version}), captured with sample inputs made from that config, and judged"
    yield "against what people say about the names (`tests/support/answers.py`). The matcher sees no names. Only weights that the"
    yield "captured calls use are judged. A model type counts as right if it is so in every task that it is mapped for."
    yield ""
    yield from _table(
        ("", "model types", "type × task"),
        [
            ("mapped", _types(lines), len(lines)),
            ("built", _types(built), len(built)),
            ("captured", _types(captured), len(captured)),
            ("captured and attending", _types(attending), len(attending)),
            ("q, k, v right in every layer", *_right(attending, ATTENTION)),
            ("captured, with an MLP", _types(with_mlp), len(with_mlp)),
            ("MLP right in every layer", *_right(with_mlp, MLP)),
            ("a weight wrongly called q, k, v, gate, up or down", _types(wrong), len(wrong)),
            ("PEFT has default targets", *_both([x for x in lines if x.model_type in defaults])),
        ],
    )
    yield ""
    yield "## Misses and their reasons"
    yield ""
    yield from _table(
        ("model type", "task", "missed", "wrong", "why"),
        [
            (x.model_type, x.task, _names(x.verdict.missed), _names(x.verdict.wrong), _why(x.model_type))
            for x in captured
            if x.verdict.missed or x.verdict.wrong
        ],
    )
    yield ""
    yield "## Not captured, or in part"
    yield ""
    yield from _table(("model type", "task", "why"), [(x.model_type, x.task, x.reason) for x in built if x.reason])
    yield ""
    yield "## Not built from a default config"
    yield ""
    yield from _table(("model type", "task", "why"), [(x.model_type, x.task, x.reason) for x in lines if not x.built])
    yield ""
    yield "## All"
    yield ""
    yield from _table(
        ("model type", "task", "sites", "fused rows", "q k v", "MLP", "seconds", "PEFT default"),
        [
            (x.model_type, x.task, _counts(x.sites), _counts(x.fused), _mark(x, ATTENTION), _mark(x, MLP), f"{x.seconds:.1f}",
             "yes" if x.model_type in defaults else "")
            for x in captured
        ],
    )  # fmt: skip


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"


def _types(lines: list[Line]) -> int:
    return len({x.model_type for x in lines})


def _both(lines: list[Line]) -> tuple[int, int]:
    return _types(lines), len(lines)


def _right(lines: list[Line], roles: Iterable[str]) -> tuple[str, str]:
    """How many model types, and how many lines, have all of these roles right."""
    bad = [x for x in lines if not x.right(roles)]
    counts = ((_types(lines), _types(bad)), (len(lines), len(bad)))
    one, other = (f"{n - b} ({100 * (n - b) / max(1, n):.1f} %)" for n, b in counts)
    return one, other


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{role} {n}" for role, n in found.items())


def _names(found: dict[str, list[str]]) -> str:
    one = {role: sorted({re.sub(r"\.\d+\.", ".\\*.", n) for n in names}) for role, names in found.items()}
    return "; ".join(
        f"{role}: {', '.join(f'`{n}`' for n in names[:2])}{' …' * (len(names) > 2)}" for role, names in one.items()
    )


def _why(model_type: str) -> str:
    return next((why for types, why in REASONS.items() if re.fullmatch(types, model_type)), "not looked into")


def _mark(line: Line, roles: Iterable[str]) -> str:
    if not line.judged(roles):
        return "–"
    return "right" if line.right(roles) else "not right"


def peft_defaults() -> set[str]:
    """Model types for which PEFT's LoRA knows target modules by itself."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as mapping

    return set(mapping)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="regular expression on the model type")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    todo = [e for e in entries() if not arguments.only or re.fullmatch(arguments.only, e[0])]
    # Fresh workers now and then: what torch and transformers remember of hundreds of models adds up.
    with get_context("spawn").Pool(arguments.workers, maxtasksperchild=60) as pool:
        lines = list(track(pool.imap(examine, todo), total=len(todo), description="models"))
    text = "\n".join(report(lines, peft_defaults())) + "\n"
    if arguments.only:
        print(text)
    else:
        (ROOT / "docs").mkdir(exist_ok=True)
        (ROOT / "docs" / "coverage.md").write_text(text, encoding="utf-8")
        print("\n".join(text.splitlines()[6:20]))


if __name__ == "__main__":
    main()
