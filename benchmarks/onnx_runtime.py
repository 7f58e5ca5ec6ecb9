"""What open slots, adapters and swaps cost in ONNX Runtime: exported graphs of one Llama against its graph without slots.

`python benchmarks/onnx_runtime.py` prints CPU time on one thread, and ratios to the base graph: medians over rounds, and
their quartiles. Every round runs each contender in turn, in another order, once to fill the processor's caches with what it
reads, then several times, of which the fastest counts. All is done again in new sessions, opened in another order: two
sessions of one file differ by up to a tenth in decoding, for as long as they live. `merged` shows what noise is left.
`bound` is `run_with_iobinding` with all inputs bound beforehand, as
in `Session.generate`; `run` is `InferenceSession.run` with numpy feeds and run options, as in `Session.run`. Before a
contender is timed, its logits are compared with those of other graphs that must agree.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
import torch
import transformers

import graphpeft as gp
from graphpeft.exporting import onnx
from graphpeft.exporting.flat import Flat
from graphpeft.exporting.slots import fingerprint
from graphpeft.runtime.session import Use
from graphpeft.show.table import table

RANKS = (8, 16, 64)
STYLES = ("apart", "shared")  # slots for each weight, or one for weights that read the same activation
PARTIES = ("r8", "b", "c", "d")  # adapters of rank 8 that have two rows each in a batch of eight
PAIRS = [name for name in PARTIES for _ in range(2)]
SPLIT = "four runs of two rows"
Step = Callable[[], Sequence[np.ndarray]]
Figures = dict[str, dict[str, float]]


class Case(NamedTuple):
    name: str
    batch: int
    past: int
    tokens: int
    repeats: int

    def feeds(self, session: gp.Session) -> dict[str, np.ndarray]:
        """The same random tokens and past for every graph."""
        (graph,) = session.graphs.values()
        rng = np.random.default_rng(0)
        given = {"input_ids": rng.integers(3, 1000, (self.batch, self.tokens))}
        for name, node in graph.inputs.items():
            if name.startswith("past_key_values."):
                given[name] = rng.standard_normal((self.batch, node.shape[1], self.past, node.shape[3]), np.float32)
        return graph.completed(given)


CASES = [Case("decode 1×1, past 128", 1, 128, 1, 6), Case("prefill 1×128", 1, 0, 128, 1)]
CASES += [Case("decode 8×1, past 128", 8, 128, 1, 5)]


def adapt(model: torch.nn.Module, rank: int, name: str) -> None:
    """Add an adapter to all seven projections, every matrix random, so that it acts."""
    before = {id(parameter) for parameter in model.parameters()}
    gp.apply(model, f"qkvo:lora(r={rank}); mlp:lora(r={rank})", name=name)
    for parameter in model.parameters():
        if id(parameter) not in before:
            torch.nn.init.normal_(parameter, std=0.05)


def write(folder: Path, width: int, layers: int) -> None:
    """Export every graph, each to a folder of its own."""
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    flat = Flat.of(model, cached=True)  # `export` wants adapters; this translates as it does, without slots and passes
    with torch.no_grad():
        base = onnx.translate(flat.module(), flat.inputs, flat.outputs, [flat.axes[name] for name in flat.inputs])
    (folder / "base").mkdir()
    onnx.save(base, folder / "base" / "model.onnx", (), {"graphpeft.base": fingerprint(model)})
    adapt(model, 8, "r8")
    gp.export(model, folder / "merged", merged=True, verify="off")
    for rank, name in [(16, "r16"), (64, "r64"), *((8, name) for name in PARTIES[1:])]:
        adapt(model, rank, name)
    for style in STYLES:
        gp.export(model, folder / style, share=style == "shared", verify="off")
        gp.export(model, folder / f"rows {style}", per_row=True, share=style == "shared", verify="off")


def opened(folder: Path, seed: int) -> dict[str, gp.Session]:
    """Every graph in a new session of one thread."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    paths = sorted(folder.iterdir())
    return {path.name: gp.Session(path, options=options) for path in random.Random(seed).sample(paths, len(paths))}


def steps(session: gp.Session, use: Use, feeds: Mapping[str, np.ndarray]) -> dict[str, Step]:
    """A forward pass with an adapter, by way of feeding; later calls of `Session.use` do not matter to it."""
    (graph,) = session.graphs.values()
    session.use(use)
    loaded, options = graph.loaded, graph.run_options
    given = {**feeds, **graph.extra(len(feeds["input_ids"]))}
    binding = graph.inference.io_binding()
    for name, value in {**given, **(loaded.tensors if loaded else {})}.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value)))
    for name in graph.outputs:
        binding.bind_output(name, "cpu")

    def bound() -> Sequence[np.ndarray]:
        graph.inference.run_with_iobinding(binding)
        return [binding.get_outputs()[0].numpy()]

    def run(loaded: object = loaded) -> Sequence[np.ndarray]:  # ONNX Runtime keeps bare pointers to the adapter
        return graph.inference.run(graph.outputs, given, options)

    return {"bound": bound, "run": run}


def split(session: gp.Session, feeds: Mapping[str, np.ndarray]) -> dict[str, Step]:
    """What a graph for one adapter at a time does with a batch of four: two rows, four times."""
    parts = [{name: np.ascontiguousarray(value[i : i + 2]) for name, value in feeds.items()} for i in range(0, 8, 2)]
    each = [steps(session, name, part) for name, part in zip(PARTIES, parts, strict=True)]
    return {way: lambda way=way: [np.concatenate([step[way]()[0] for step in each])] for way in ("bound", "run")}


def contenders(sessions: Mapping[str, gp.Session], case: Case) -> dict[str, dict[str, Step]]:
    """Every graph with every rank, after comparing those that must agree, and those that must not."""
    plan: dict[str, tuple[str, Use, str]] = {"base": ("base", None, "base"), "merged r8": ("merged", None, "r8")}
    for style in STYLES:
        plan |= {f"{style}, empty": (style, None, "base"), f"rows {style}, empty": (f"rows {style}", None, "base")}
        plan |= {f"{style}, rank {rank}": (style, f"r{rank}", f"r{rank}") for rank in RANKS}
        if case.batch == 8:
            plan[f"rows {style}, four adapters"] = f"rows {style}", PAIRS, "mixed"
    feeds = case.feeds(sessions["base"])
    made = {title: steps(sessions[name], use, feeds) for title, (name, use, _) in plan.items()}
    groups = {title: group for title, (_, _, group) in plan.items()}
    if case.batch == 8:
        made[SPLIT], groups[SPLIT] = split(sessions["apart"], feeds), "mixed"
    first: dict[str, np.ndarray] = {}
    for title, group in groups.items():
        for way, step in made[title].items():
            first.setdefault(group, step()[0].copy())
            if np.abs(step()[0] - first[group]).max() > 1e-4 * np.abs(first[group]).max():
                raise SystemExit(f"{case.name}: {title} ({way}) differs from the others of {group}")
    base = first.pop("base")
    if any(np.abs(logits - base).max() < 1e-2 * np.abs(base).max() for logits in first.values()):
        raise SystemExit(f"{case.name}: an adapter does nothing")
    return made


def timed(work: Mapping[str, Step], rounds: int, repeats: int) -> dict[str, list[float]]:
    """CPU seconds by contender and round: the fastest of some calls in a row, after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in work}
    shuffler = random.Random(0)
    for _ in range(rounds):
        for name in shuffler.sample(list(work), len(work)):
            work[name]()
            times[name].append(min(clocked(work[name], time.thread_time) for _ in range(repeats)))
    return times


def figures(times: Mapping[str, list[float]]) -> Figures:
    """Milliseconds, and ratios to the base in the same round."""
    found = {}
    for name, taken in times.items():
        low, middle, high = statistics.quantiles([t / b for t, b in zip(taken, times["base"], strict=True)], n=4)
        found[name] = {"ms": 1e3 * statistics.median(taken), "low": low, "ratio": middle, "high": high}
    return found


def clocked(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    work()
    return clock() - start


def handling(session: gp.Session, rows: gp.Session) -> dict[str, float]:
    """Median wall-clock milliseconds to load adapters, to swap and to blend them."""
    names = itertools.count()
    work: dict[str, Callable[[], object]] = {
        "Session.use, a name": lambda: session.use(PARTIES[next(names) % 2]),
        "Session.use, a blend of two": lambda: session.use({"r8": 0.5, "b": 0.5}),
        "Session.use, four adapters for eight rows": lambda: rows.use(PAIRS),
    }
    for path in (session.folder / f"r{rank}.onnx_adapter" for rank in RANKS):
        work[f"Session.add, {path.name}"] = lambda path=path: session.add(path, f"copy {next(names)}")
    return {title: 1e3 * statistics.median(clocked(each) for _ in range(15)) for title, each in work.items()}


def sizes(folder: Path) -> dict[str, float]:
    """MB on disk: graphs with their weights, adapters, and ten adapters either way."""
    files = {"base": "base/model.*", "base with slots": "shared/model.*", "merged copy": "merged/model.*"}
    files |= {f"adapter of rank {rank}, {style}": f"{style}/r{rank}.onnx_adapter" for style in STYLES for rank in RANKS}
    found = {title: sum(path.stat().st_size for path in folder.glob(each)) / 1e6 for title, each in files.items()}
    found["slots and ten of rank 8"] = found["base with slots"] + 10 * found["adapter of rank 8, shared"]
    return found | {"ten merged copies": 10 * found["merged copy"]}


def show(case: Case, found: Mapping[str, Figures]) -> None:
    form = "{ms:.2f} {ratio:.3f} {low:.3f}-{high:.3f}"
    rows = [[title, *" ".join(form.format(**it[title]) for it in found.values()).split()] for title in found["bound"]]
    head = [case.name, "bound ms", "ratio", "quartiles", "run ms", "ratio ", "quartiles "]
    print(table(head, rows, right=head[1:]))
    for style in STYLES if case.batch == 8 else ():
        rates = [it[SPLIT]["ratio"] / it[f"rows {style}, four adapters"]["ratio"] for it in found.values()]
        print(f"rows {style}, four adapters: {rates[0]:.2f} and {rates[1]:.2f} times as fast as {SPLIT}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="in every opening")
    parser.add_argument("--openings", type=int, default=6, help="how often sessions are opened anew")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    times: dict[str, dict[str, dict[str, list[float]]]] = {}
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), options.width, options.layers)
        for opening in range(options.openings):
            sessions = opened(Path(name), opening)
            for case in CASES:
                made = contenders(sessions, case)
                for way in ("bound", "run"):
                    taken = timed({title: each[way] for title, each in made.items()}, options.rounds, case.repeats)
                    known = times.setdefault(case.name, {}).setdefault(way, {})
                    known.update({title: known.get(title, []) + each for title, each in taken.items()})
        tables = {"ms": handling(sessions["shared"], sessions["rows shared"]), "MB": sizes(Path(name))}
    found = {case: {way: figures(each) for way, each in ways.items()} for case, ways in times.items()}
    for case in CASES:
        show(case, found[case.name])
    for title, values in tables.items():
        print(table(["", title], [(k, f"{v:.3f}") for k, v in values.items()], right=[title]))
    if options.json:
        options.json.write_text(json.dumps({**found, **tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
