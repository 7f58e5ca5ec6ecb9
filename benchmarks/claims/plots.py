"""The plots of docs/claims.md, drawn from the same results as its tables."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

import criteria_few_shot
import criteria_gates
import matplotlib
import page
import results
from adapting import TASKS, Task

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STYLE = {"svg.hashsalt": "claims", "svg.fonttype": "none", "font.size": 8}
COLORS = {"lora": "C0", "olora": "C1", "pissa": "C2", "melora": "C3", "vera": "C4", "rlora": "C5"}


def draw(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        for plot in (quality, olora, few_shot, gates):
            figure = plot()
            figure.savefig(folder / f"{plot.__name__}.svg", metadata={"Date": None}, bbox_inches="tight")
            plt.close(figure)


def quality() -> Any:
    """Gain against trained parameters; LoRA r=1 is the line to be above."""
    figure, axes = plt.subplots(1, len(TASKS), figsize=(11, 3.6))
    for axis, (name, task) in zip(axes, TASKS.items(), strict=True):
        found = page.loaded(task)
        for method in found.best:
            gains = [*found.gain(method).values()]
            place = found.first(method).trained, mean(gains)
            control = method == "lora(r=1)"
            axis.errorbar(*place, stdev(gains), fmt="s" if control else "o", color=_color(method))
            axis.annotate(method, place, (3, 3), textcoords="offset points", fontsize=5)
            if control:
                axis.axhline(place[1], color="gray", linestyle=":", linewidth=1)
        axis.set(xscale="log", xlabel="trained parameters", ylabel=f"{task.unit} gained", title=name)
    return figure


def _color(method: str) -> str:
    return COLORS[method.partition("(")[0]]


def olora() -> Any:
    """Gain by step: at one small rate, and each at its best."""
    tasks = [task for task in TASKS.values() if task.checkpoints > 1]
    figure, axes = plt.subplots(len(tasks), 2, figsize=(8, 2.6 * len(tasks)))
    for row, task in zip(axes, tasks, strict=True):
        for axis, equal in zip(row, (True, False), strict=True):
            _curves(axis, task, equal)
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    return figure


def _curves(axis: Any, task: Task, equal: bool) -> None:
    found = page.loaded(task)
    for method in ("lora(r=8)", "olora(r=8)", "pissa(r=8)", "olora(r=8, pivot=true)"):
        if method in found.best:
            lr = task.equal if equal else found.best[method]
            steps = list(found.first(method).curve)
            gains = [mean(found.gain(method, lr, step).values()) if step else 0.0 for step in steps]
            style = "--" if "pivot" in method else "-"
            axis.plot(steps, gains, style, color=_color(method), label=method)
    rate = f"all at {task.equal:g}" if equal else "each at its best rate"
    axis.set(title=f"{task.name}, {rate}", xlabel="steps", ylabel=f"{task.unit} gained")


def few_shot() -> Any:
    """Paired differences to no regularizer, with two standard errors."""
    runs = results.read("few_shot")["runs"]
    cells = list(dict.fromkeys((run["data"], run["k"], run["method"]) for run in runs))
    figure, axis = plt.subplots(figsize=(9, 3))
    for shift, arm in enumerate(("decay", "noise", "pac")):
        found = [criteria_few_shot.against(runs, data, method, k, arm, "none") for data, k, method in cells]
        places = [place + 0.2 * (shift - 1) for place in range(len(cells))]
        axis.errorbar(places, [d.mean for d in found], [2 * d.error for d in found], fmt="o", markersize=3, label=arm)
    axis.axhline(0, color="gray", linewidth=0.8)
    axis.set_xticks(range(len(cells)), [f"{data}\n{k}\n{method.split('(')[0]}" for data, k, method in cells])
    axis.set_ylabel("points against none")
    axis.legend(frameon=False)
    return figure


def gates() -> Any:
    """Bit operations of the adapters against accuracy, along the sweep of λ."""
    figure, axis = plt.subplots(figsize=(5, 3.2))
    for i, (name, steps) in enumerate(page.LENGTHS.items()):
        runs = results.read(name)["runs"]
        lambdas = criteria_gates.lambdas(runs)
        accuracies = [[*criteria_gates.by_seed(runs, lam).values()] for lam in lambdas]
        shares = [100 * criteria_gates.share(runs, lam) for lam in lambdas]
        style = {"color": f"C{i}"}
        means, spreads = [*map(mean, accuracies)], [*map(stdev, accuracies)]
        axis.errorbar(shares, means, spreads, fmt="o-", label=f"B-LoRA, {steps}", **style)
        lora = mean(criteria_gates.by_seed(runs, None).values())
        axis.axhline(lora, linestyle=":", label=f"LoRA r=8, {steps}", **style)
        for lam, share, values in zip(lambdas, shares, accuracies, strict=True):
            axis.annotate(f"{lam:g}", (share, mean(values)), (3, 3), textcoords="offset points", fontsize=6)
    axis.set(xscale="log", xlabel="bit operations of the adapters, % of r = 8 at 32 bits", ylabel="accuracy, %")
    axis.legend(frameon=False)
    return figure
