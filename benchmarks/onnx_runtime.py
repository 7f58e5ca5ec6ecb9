"""What open slots, adapters and swaps cost in ONNX Runtime: exported graphs of one Llama against its graph without slots.

`python benchmarks/onnx_runtime.py` prints CPU time on one thread, and ratios to the base graph: medians over rounds, and
their spread. Every round runs each contender in turn, in another order, once to fill the processor's caches with what it
reads, then several times, of which the fastest counts. `bound` is `run_with_iobinding` with all inputs bound beforehand, as
in `Session.generate`; `run` is `InferenceSession.run` with numpy feeds and run options, as in `Session.run`. Before a
contender is timed, its outputs are compared with those of another graph that must agree.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
import transformers

import graphpeft as gp
from graphpeft import onnx
from graphpeft.flat import Flat
from graphpeft.inspect.table import table
from graphpeft.runtime import Use
from graphpeft.slots import fingerprint

RULES = "qkvo:lora(r={rank}); mlp:lora(r={rank})"
RANKS = (8, 16, 64)
PARTIES = ("r8", "b", "c", "d")
"""Adapters of rank 8 that share a batch."""
PAIRS = [name for name in PARTIES for _ in range(2)]
Outputs = Sequence[np.ndarray]
Step = Callable[[], Outputs]


@dataclass(frozen=True)
class Case:
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
                shape = (self.batch, node.shape[1], self.past, node.shape[3])
                given[name] = rng.standard_normal(shape, np.float32)
        return graph.completed(given)


CASES = (
    Case("decode 1×1, past 128", 1, 128, 1, 5),
    Case("prefill 1×128", 1, 0, 128, 2),
    Case("decode 8×1, past 128", 8, 128, 1, 5),
)


def llama(width: int, layers: int) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def adapt(model: torch.nn.Module, rank: int, name: str) -> None:
    """Add an adapter whose every matrix is random, so that it acts."""
    before = {id(parameter) for parameter in model.parameters()}
    gp.apply(model, RULES.format(rank=rank), name=name)
    for parameter in model.parameters():
        if id(parameter) not in before:
            torch.nn.init.normal_(parameter, std=0.05)


def write_base(model: torch.nn.Module, folder: Path) -> None:
    """The base model's graph as `export` would write it if nothing were adapted: its translation, without slots or passes.

    `export` itself refuses a model without adapters.
    """
    flat = Flat.of(model, cached=True)
    axes = [flat.axes[name] for name in flat.inputs]
    graph = onnx.translate(flat.module(), flat.inputs, flat.outputs, axes, None)
    folder.mkdir()
    onnx.save(graph, folder / "model.onnx", (), {"graphpeft.base": fingerprint(model)})


def exports(folder: Path, width: int, layers: int) -> dict[str, gp.Session]:
    """Every graph, open in a session of one thread."""
    model = llama(width, layers)
    with torch.no_grad():
        write_base(model, folder / "base")
    adapt(model, 8, "r8")
    gp.export(model, folder / "merged", merged=True, verify="off")
    for rank, name in [*((rank, f"r{rank}") for rank in RANKS[1:]), *((8, name) for name in PARTIES[1:])]:
        adapt(model, rank, name)
    gp.export(model, folder / "apart", share=False, verify="off")
    gp.export(model, folder / "shared", verify="off")
    gp.export(model, folder / "rows", rows=True, verify="off")
    return {name: opened(folder / name) for name in ("base", "merged", "apart", "shared", "rows")}


def opened(folder: Path) -> gp.Session:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return gp.Session(folder, options=options)


def steps(session: gp.Session, use: Use, feeds: Mapping[str, np.ndarray]) -> dict[str, Step]:
    """A forward pass with an adapter, by way of feeding; later calls of `Session.use` do not matter to it."""
    (graph,) = session.graphs.values()
    session.use(use)
    loaded, options, names = graph.loaded, graph.run_options, graph.outputs
    given = {**feeds, **graph.extra(len(feeds["input_ids"]))}
    binding = graph.inference.io_binding()
    for name, value in {**given, **(loaded.tensors if loaded else {})}.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value)))
    for name in names:
        binding.bind_output(name, "cpu")

    def bound() -> Outputs:
        graph.inference.run_with_iobinding(binding)
        return binding.get_outputs()

    def run(loaded: object = loaded) -> Outputs:  # holds the adapter, of which ONNX Runtime keeps bare pointers
        return graph.inference.run(names, given, options)

    return {"bound": bound, "run": run}


def agree(one: Outputs, other: Outputs) -> bool:
    """Whether logits, the first output, are equal up to rounding."""
    first, second = (np.asarray(each[0].numpy() if hasattr(each[0], "numpy") else each[0]) for each in (one, other))
    return first.shape == second.shape and bool(np.abs(first - second).max() <= 1e-4 * np.abs(second).max())


def contenders(sessions: Mapping[str, gp.Session], case: Case) -> dict[str, dict[str, Step]]:
    """Every graph with every rank, after comparing those that must agree, and those that must not."""
    plan: dict[str, tuple[str, Use, str]] = {"base": ("base", None, "base"), "merged r8": ("merged", None, "r8")}
    for name in ("apart", "shared"):
        plan[f"{name} empty"] = name, None, "base"
        plan |= {f"{name} rank {rank}": (name, f"r{rank}", f"r{rank}") for rank in RANKS}
    plan["rows empty"] = "rows", None, "base"
    if case.batch == len(PAIRS):
        plan["rows, one adapter"] = "rows", ["r8"] * case.batch, "r8"
        plan["rows, four adapters"] = "rows", PAIRS, "mixed"
    made = {title: steps(sessions[name], use, case.feeds(sessions[name])) for title, (name, use, _) in plan.items()}
    first: dict[str, Outputs] = {}
    for title, (_, _, group) in plan.items():
        for way, step in made[title].items():
            if not agree(step(), first.setdefault(group, step())):
                raise SystemExit(f"{case.name}: {title} ({way}) differs from the others of {group}")
    if any(agree(first["base"], outputs) for group, outputs in first.items() if group != "base"):
        raise SystemExit(f"{case.name}: an adapter does nothing")
    return made


def split(session: gp.Session, case: Case) -> Callable[[], Outputs]:
    """What a graph for one adapter at a time does with a batch of four: a swap, a run of two rows, four times."""
    feeds = case.feeds(session)
    parts = [{name: np.ascontiguousarray(value[i : i + 2]) for name, value in feeds.items()} for i in range(0, 8, 2)]

    def run() -> Outputs:
        logits = []
        for name, part in zip(PARTIES, parts, strict=True):
            session.use(name)
            logits.append(session.run(part)["logits"])
        return [np.concatenate(logits)]

    return run


def bound_split(session: gp.Session, case: Case) -> Callable[[], Outputs]:
    """The same with bindings that are ready, one for each adapter."""
    feeds = case.feeds(session)
    parts = [{name: value[i : i + 2] for name, value in feeds.items()} for i in range(0, 8, 2)]
    each = [steps(session, name, part)["bound"] for name, part in zip(PARTIES, parts, strict=True)]
    return lambda: [np.concatenate([step()[0].numpy() for step in each])]


def timed(work: Mapping[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, list[float]]:
    """CPU seconds by contender and round: the fastest of some calls in a row, after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in work}
    shuffler = random.Random(0)
    for _ in range(rounds):
        for name in shuffler.sample(list(work), len(work)):
            work[name]()
            best = float("inf")
            for _ in range(repeats):
                start = time.thread_time()
                work[name]()
                best = min(best, time.thread_time() - start)
            times[name].append(best)
    return times


def figures(times: Mapping[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Milliseconds, and ratios to the base of the same round: median, quartiles."""
    found = {}
    for name, taken in times.items():
        ratios = [t / b for t, b in zip(taken, times[base], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[name] = {"ms": 1e3 * statistics.median(taken), "ratio": middle, "quarter": low, "three quarters": high}
    return found


def measure(sessions: Mapping[str, gp.Session], case: Case, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Figures by way of feeding and contender; of rows, those against runs of two rows too."""
    made = contenders(sessions, case)
    found = {}
    for way in ("bound", "run"):
        work = {title: each[way] for title, each in made.items()}
        if case.batch == len(PAIRS):
            work["four runs of two rows"] = (bound_split if way == "bound" else split)(sessions["shared"], case)
            if not agree(work["four runs of two rows"](), work["rows, four adapters"]()):
                raise SystemExit(f"{case.name}: rows differ from runs of two rows")
        found[way] = figures(timed(work, rounds, case.repeats), "base")
    return found


def elapsed(work: Callable[[int], object], count: int) -> float:
    """Median wall-clock milliseconds of a call."""
    taken = []
    for number in range(count):
        start = time.perf_counter()
        work(number)
        taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken)


def handling(session: gp.Session, rows: gp.Session) -> dict[str, float]:
    """Milliseconds to load adapters, to swap and to blend them."""
    loads = {
        f"Session.add, rank {rank}": elapsed(
            lambda number, rank=rank: session.add(session.folder / f"r{rank}.onnx_adapter", f"copy {rank} {number}"), 9
        )
        for rank in RANKS
    }
    swaps = {
        "Session.use, a name": elapsed(lambda number: session.use(PARTIES[number % 2]), 201),
        "Session.use, a blend of two": elapsed(lambda _: session.use({"r8": 0.5, "b": 0.5}), 9),
        "Session.use, four adapters for eight rows": elapsed(lambda _: rows.use(PAIRS), 9),
    }
    return loads | swaps


def sizes(folder: Path) -> dict[str, float]:
    """MB on disk."""

    def size(name: str) -> float:
        return sum(path.stat().st_size for path in (folder / name).iterdir() if path.name.startswith("model.")) / 1e6

    one = {rank: (folder / "shared" / f"r{rank}.onnx_adapter").stat().st_size / 1e6 for rank in RANKS}
    found = {"base": size("base"), "base with slots": size("shared"), "merged": size("merged")}
    found |= {f"adapter of rank {rank}": each for rank, each in one.items()}
    found |= {f"adapter of rank {rank}, apart": (folder / "apart" / f"r{rank}.onnx_adapter").stat().st_size / 1e6 for rank in RANKS}
    return found | {"ten merged copies": 10 * size("merged"), "slots and ten of rank 8": size("shared") + 10 * one[8]}


def show(case: Case, found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    rows = []
    for title in found["bound"]:
        row = [title]
        for way in ("bound", "run"):
            it = found[way][title]
            row += [f"{it['ms']:.2f}", f"{it['ratio']:.3f}", f"{it['quarter']:.3f}-{it['three quarters']:.3f}"]
        rows.append(row)
    head = [case.name, "bound ms", "ratio", "quartiles", "run ms", "ratio ", "quartiles "]
    print(table(head, rows, right=head[1:]), "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        sessions = exports(Path(name), options.width, options.layers)
        found: dict[str, object] = {}
        for case in CASES:
            found[case.name] = times = measure(sessions, case, options.rounds)
            show(case, times)
        found["milliseconds"] = taken = handling(sessions["shared"], sessions["rows"])
        found["MB"] = stored = sizes(Path(name))
    print(table(["handling", "ms"], [(k, f"{v:.3f}") for k, v in taken.items()], right=["ms"]), "\n")
    print(table(["files", "MB"], [(k, f"{v:.2f}") for k, v in stored.items()], right=["MB"]))
    if options.json:
        options.json.write_text(json.dumps({"options": str(vars(options)), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
