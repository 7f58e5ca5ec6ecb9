"""Plot the demo's loss curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def plot_losses(losses: Mapping[str, Sequence[float]], epochs: int, path: Path) -> None:
    """Draw each run's loss per step, raw and as a running mean over half an epoch, into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for color, (label, values) in enumerate(losses.items()):
        position = np.arange(1, len(values) + 1) * epochs / len(values)
        axes.plot(position, values, color=f"C{color}", alpha=0.2, linewidth=0.8)
        axes.plot(position, smooth(values, len(values) // (2 * epochs)), color=f"C{color}", linewidth=2, label=label)
    axes.set(xlabel="epoch", ylabel="cross-entropy of a batch [nat]", title="Training loss, and its running mean")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and up to `window - 1` before it."""
    return [float(np.mean(values[max(0, i - max(window, 1)) : i])) for i in range(1, len(values) + 1)]
