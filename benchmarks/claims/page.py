"""The tables and plots of docs/claims.md, made from the files in results/: `python benchmarks/claims/page.py`.

Text between the markers <!-- NAME --> and <!-- /NAME --> is the script's, all other text is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import criteria_few_shot
import criteria_gates
import results
from adapting import TASKS, Task
from criteria import Results
from paired import difference
from run_record import Run

PAGE = Path(__file__).parents[2] / "docs" / "claims.md"
LENGTHS = {"gates": "600 steps"}


def loaded(task: Task) -> Results:
    """The reported runs of a task of E1 to E3."""
    kept = results.read(task.module)
    runs = [Run(**run | {"curve": {int(step): score for step, score in run["curve"].items()}}) for run in kept["runs"]]
    return Results(runs, kept["best_rates"], task.falls)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _cell(verdict: dict[str, Any] | None) -> str:
    return "" if verdict is None else f"{'yes' if verdict['holds'] else '**no**'}: {verdict['figures']}"


def adapting() -> str:
    """Verdicts of E1 to E3, a column for each task."""
    found = {name: {v["claim"]: v for v in results.read(task.module)["verdicts"]} for name, task in TASKS.items()}
    claims = dict.fromkeys(claim for verdicts in found.values() for claim in verdicts)
    return table(("claim", *found), ((claim, *(_cell(v.get(claim)) for v in found.values())) for claim in claims))


def methods(task: Task) -> str:
    """What every method trained, its rate, and its gain, best first."""
    kept, sweeps = loaded(task), results.read(task.module)["sweeps"]
    rows = []
    for method, lr in kept.best.items():
        gains = [*kept.gain(method).values()]
        rates = sorted(map(float, sweeps[method]))
        ended = " (end of its sweep)" if lr in (rates[0], rates[-1]) else ""
        spread = f"{mean(gains):.{_digits(task)}f} ± {stdev(gains):.{_digits(task)}f}"
        rows.append((mean(gains), (f"`{method}`", f"{kept.first(method).trained:,}", f"{lr:g}{ended}", spread)))
    rows.sort(key=lambda row: -row[0])
    return table(("method", "trained", "learning rate", f"{task.unit} gained over the base"), (row for _, row in rows))


def _digits(task: Task) -> int:
    return 3 if task.falls else 1


def verdicts(name: str) -> str:
    return table(("claim", "here"), ((v["claim"], _cell(v)) for v in results.read(name)["verdicts"]))


def _cells(runs: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
    return list(dict.fromkeys((run["data"], run["k"], run["method"]) for run in runs))


def few_shot() -> str:
    """Accuracy without a regularizer, and paired differences of the others to it."""
    runs = results.read("few_shot")["runs"]
    rows = []
    for data, k, method in _cells(runs):
        none = criteria_few_shot.accuracies(runs, data, method, k, "none")
        arms = [criteria_few_shot.against(runs, data, method, k, arm, "none") for arm in ("decay", "noise", "pac")]
        pac = _pac(runs, data, k, method)["setting"]
        numbers = f"{pac['gamma']:g}, {pac['sigma']:g}"
        rows.append((data, k, f"`{method}`", len(none), f"{mean(none.values()):.1f}", *arms, numbers))
    head = ("data", "per class", "method", "seeds", "none", "decay", "noise alone", "PAC", "γ, σ₀")
    return table(head, rows)


def bounds() -> str:
    """What PAC ended with, in the mean over seeds."""
    runs = results.read("few_shot")["runs"]
    rows = []
    for data, k, method in _cells(runs):
        mine = [r for r in runs if (r["data"], r["k"], r["method"], r["setting"]["arm"]) == (data, k, method, "pac")]
        low, middle, high = (mean(run["sigmas"][i] for run in mine) for i in range(3))
        kl, bound = (mean(run[name] for run in mine) for name in ("kl", "bound"))
        rows.append((data, k, f"`{method}`", f"{low:.3f} / {middle:.3f} / {high:.3f}", f"{kl:,.0f}", f"{bound:.1f}"))
    return table(("data", "per class", "method", "σ: 10 / 50 / 90 %", "KL", "bound of the loss, in nats"), rows)


def _pac(runs: list[dict[str, Any]], data: str, k: int, method: str) -> dict[str, Any]:
    key = (data, k, method, "pac")
    return next(r for r in runs if (r["data"], r["k"], r["method"], r["setting"]["arm"]) == key)


def gates(name: str) -> str:
    """The sweep of λ, means over seeds."""
    runs = results.read(name)["runs"]
    rows = []
    for lam in (None, *criteria_gates.lambdas(runs)):
        mine = [run for run in runs if run["lam"] == lam]
        accuracy = criteria_gates.by_seed(runs, lam)
        shares = (f"{100 * mean(run['share'][part] for run in mine):.3g} %" for part in ("adapters", "base", "total"))
        rows.append((
            "LoRA r=8" if lam is None else f"λ = {lam:g}", f"{mean(accuracy.values()):.1f}",
            "" if lam is None else difference(accuracy, criteria_gates.by_seed(runs, None), 1),
            "" if not lam else difference(accuracy, criteria_gates.by_seed(runs, 0.0), 1),
            f"{mean(run['rank'] for run in mine):.1f}",
            " / ".join(f"{mean(tensor):.1f}" for tensor in zip(*(run["bits"] for run in mine), strict=True)), *shares,
        ))  # fmt: skip
    head = ("", "accuracy", "against LoRA", "against λ = 0", "rank", "bits of B / E / A", "adapters", "base", "total")
    return table(head, rows)


def blocks() -> dict[str, str]:
    """Every generated part of the page by name."""
    return {
        "E1 to E3": adapting(),
        **{name: methods(task) for name, task in TASKS.items()},
        "E4": verdicts("few_shot"), "few-shot": few_shot(), "bounds": bounds(),
        **{f"E5, {steps}": f"{verdicts(name)}\n\n{gates(name)}" for name, steps in LENGTHS.items()},
    }  # fmt: skip


def render(text: str, parts: dict[str, str]) -> str:
    """The page with its generated parts replaced. Raises `ValueError` if one has no place."""
    for name, block in parts.items():
        pattern = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)"
        text, count = re.subn(pattern, lambda found, block=block: f"{found[1]}{block}\n{found[2]}", text, flags=re.S)
        if count != 1:
            raise ValueError(f"docs/claims.md has {count} places for {name!r}; it needs one.")
    return text


def main() -> None:
    import plots

    PAGE.write_text(render(PAGE.read_text(), blocks()))
    plots.draw(PAGE.parent / "claims")


if __name__ == "__main__":
    main()
