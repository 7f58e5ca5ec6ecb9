"""The oldest ONNX Runtime that runs what `gp.export` writes, by opset: exports are made here and run in other environments.

`python benchmarks/old_runtimes.py --opsets 18 23 --versions 1.20.1 1.23.0` makes small exports of several kinds, with what ONNX
Runtime computes here, and for each version an environment of its own, without torch, in which a session of graphpeft's runs
them, base and adapter. It prints the largest difference for each, or the error.
`graphpeft.exporting.onnx.runtimes` has what was found.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("numpy", "rich")


def exports(folder: Path, opset: int) -> None:
    """Folders of several kinds, each with `feeds.npz` and `want.npz`."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import torch
    import zoo
    from checks import randomize

    import graphpeft as gp
    from graphpeft.capturing.samples import sample_inputs

    kinds = {
        "llama": (zoo.llama, "qv:lora(r=2); mlp:lora(r=2)", {}),
        "llama rows": (zoo.llama, "qv:lora(r=2)", {"rows": True}),
        "llama share": (zoo.llama, "qv:lora(r=2)", {"share": True}),
        "llama int4": (lambda: zoo.llama(hidden_size=128), "qv:lora(r=2)", {"quantize": "int4"}),
        "llama int8": (zoo.llama, "qv:lora(r=2)", {"quantize": "int8"}),
        "gpt2": (zoo.gpt2, "linear:lora(r=2)", {}),
        "bert": (lambda: zoo.ZOO["bert"]("sdpa"), "qv:lora(r=2)", {}),
        "vit": (lambda: zoo.ZOO["vit"]("sdpa"), "qv:lora(r=2)", {}),
        "t5": (zoo.t5, "qv:lora(r=2)", {}),
    }
    for name, (make, rules, options) in kinds.items():
        torch.manual_seed(0)
        model = gp.apply(make().eval(), rules)
        randomize(model, std=0.05)
        place = folder / name.replace(" ", "_")
        gp.export(model, place, opset=opset, verify="fast", **options)
        inputs = {key: value.numpy() for key, value in sample_inputs(model).items()}
        session = gp.Session(place)
        part = next(iter(session.graphs.values()))
        feeds = {key: value for key, value in inputs.items() if key in part.inputs}
        np.savez(place / "feeds.npz", **feeds)
        np.savez(place / "want.npz", **{str(use): answer(session, feeds, use) for use in (None, "default")})


def answer(session: object, feeds: dict[str, np.ndarray], use: str | None) -> np.ndarray:
    """The first output of the first graph, of an encoder where there are two."""
    session.use(use)  # type: ignore[attr-defined]
    return next(iter(next(iter(session.graphs.values())).run(feeds).values()))  # type: ignore[attr-defined]


def run(folder: Path) -> None:
    """In the other environment: every export that lies there."""
    sys.path.insert(0, str(ROOT))
    from graphpeft.runtime.session import Session

    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        feeds, want = dict(np.load(place / "feeds.npz")), np.load(place / "want.npz")
        try:
            session = Session(place)
            off = max(float(np.abs(answer(session, feeds, use) - want[str(use)]).max()) for use in (None, "default"))
            print(f"    {place.name:12} off by {off:.1e}")
        except Exception as error:  # whatever the runtime says
            print(f"    {place.name:12} {type(error).__name__}: {str(error)[:160]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--opsets", nargs="*", type=int, default=[*range(18, 24)])
    parser.add_argument("--versions", nargs="*", default=["1.20.1", "1.22.1", "1.23.0", "1.23.2"])
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run is not None:
        run(given.run)
        return
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for opset in given.opsets:
            exports(work / str(opset), opset)
        for version in given.versions:
            home = work / f"ort-{version}"
            venv.create(home, with_pip=True)
            python = home / "bin" / "python"
            subprocess.run([python, "-m", "pip", "install", "-q", f"onnxruntime=={version}", *NEEDED], check=True)
            for opset in given.opsets:
                print(f"ONNX Runtime {version}, opset {opset}", flush=True)
                command = [python, __file__, "--run", str(work / str(opset))]
                subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


if __name__ == "__main__":
    main()
