"""Two forms of an adapter for every row of a batch in ONNX Runtime: gates over concatenated ranks, or gathered matrices.

    gate     h = (x @ [A_1 … A_n]) * gate[rows],   y = x @ W + h @ [B_1; …; B_n]
    gather   y = x @ W + (x @ A[rows]) @ B[rows],  A (adapters, in, rank) and B (adapters, rank, out)

`python benchmarks/onnx_rows.py` prints CPU time on one thread of a chain of layers, as a ratio to the chain without adapters:
medians over rounds in which every form runs in turn. Gates cost work that grows with adapters × rank, gathered matrices are
copied for every row and call.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator, Mapping

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from graphpeft.show.table import table

FORMS = ("base", "gate", "gather")
Feeds = dict[str, np.ndarray]


def nodes(form: str, layer: int, x: str, y: str) -> Iterator[object]:
    a, b, h, d, w = (f"{name}{layer}" for name in ("a", "b", "h", "d", "w"))
    if form == "base":
        yield helper.make_node("MatMul", [x, w], [y])
        return
    yield helper.make_node("MatMul", [x, w], [f"{w}x"])
    if form == "gather":
        yield helper.make_node("Gather", [a, "rows"], [f"{a}r"])
        yield helper.make_node("Gather", [b, "rows"], [f"{b}r"])
        yield helper.make_node("MatMul", [x, f"{a}r"], [h])
        yield helper.make_node("MatMul", [h, f"{b}r"], [d])
    else:
        yield helper.make_node("MatMul", [x, a], [f"{h}a"])
        yield helper.make_node("Mul", [f"{h}a", "gate"], [h])
        yield helper.make_node("MatMul", [h, b], [d])
    yield helper.make_node("Add", [f"{w}x", d], [y])


def session(form: str, width: int, layers: int) -> ort.InferenceSession:
    """A chain of layers without biases or activations; their weights are scaled to keep the size of x."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((width, width), np.float32) / width**0.5 for _ in range(layers)]
    made = [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)]
    names = ["x", *(f"y{i}" for i in range(layers - 1)), "y"]
    body = [node for i in range(layers) for node in nodes(form, i, names[i], names[i + 1])]
    dims: dict[str, tuple[int, list[object]]] = {"x": (TensorProto.FLOAT, ["batch", "tokens", width])}
    if form == "gate":
        dims["gate"] = TensorProto.FLOAT, ["batch", 1, "ranks"]
    if form == "gather":
        dims["rows"] = TensorProto.INT64, ["batch"]
    for i in range(layers if form != "base" else 0):
        dims[f"a{i}"] = TensorProto.FLOAT, [width, "ranks"] if form == "gate" else ["adapters", width, "rank"]
        dims[f"b{i}"] = TensorProto.FLOAT, ["ranks", width] if form == "gate" else ["adapters", "rank", width]
    inputs = [helper.make_tensor_value_info(name, *each) for name, each in dims.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "tokens", width])
    graph = helper.make_graph(body, form, inputs, [output], made)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feeds(width: int, layers: int, batch: int, tokens: int, adapters: int, rank: int) -> dict[str, Feeds]:
    """The same adapters in both forms; every row has one, neighbors share."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((batch, tokens, width), np.float32)
    rows = np.arange(batch) * adapters // batch
    gate = np.repeat(rows[:, None] == np.arange(adapters), rank, axis=1).astype(np.float32)[:, None]
    found: dict[str, Feeds] = {"base": {"x": x}, "gate": {"x": x, "gate": gate}, "gather": {"x": x, "rows": rows}}
    for i in range(layers):
        a = rng.standard_normal((adapters, width, rank), np.float32) / width**0.5
        b = rng.standard_normal((adapters, rank, width), np.float32) / 10
        found["gather"] |= {f"a{i}": a, f"b{i}": b}
        joined = np.ascontiguousarray(a.transpose(1, 0, 2)).reshape(width, -1)
        found["gate"] |= {f"a{i}": joined, f"b{i}": b.reshape(-1, width)}
    return found


def bound(made: ort.InferenceSession, given: Feeds) -> ort.IOBinding:
    binding = made.io_binding()
    for name, value in given.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value))
    binding.bind_output("y", "cpu")
    return binding


def ratios(made: Mapping[str, ort.InferenceSession], given: Mapping[str, Feeds], rounds: int) -> dict[str, float]:
    """Median CPU time of each form over that of the base, in the same round; the forms' results are compared first."""
    binding = {form: bound(made[form], given[form]) for form in made}
    results = {}
    for form in made:
        made[form].run_with_iobinding(binding[form])
        results[form] = binding[form].get_outputs()[0].numpy().copy()
    scale = np.abs(results["gate"]).max()
    if np.abs(results["gate"] - results["gather"]).max() > 1e-4 * scale:
        raise SystemExit("the two forms differ")
    if np.abs(results["gate"] - results["base"]).max() < 1e-2 * scale:
        raise SystemExit("the adapters do nothing")
    times: dict[str, list[float]] = {form: [] for form in made}
    for seed in range(rounds):
        for form in random.Random(seed).sample(list(made), len(made)):
            made[form].run_with_iobinding(binding[form])
            start = time.thread_time()
            made[form].run_with_iobinding(binding[form])
            times[form].append(time.thread_time() - start)
    return {form: statistics.median(t / b for t, b in zip(times[form], times["base"], strict=True)) for form in made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    made = {form: session(form, options.width, options.layers) for form in FORMS}
    found = []
    for batch, tokens in ((8, 1), (8, 64), (32, 1)):
        for adapters, rank in ((4, 8), (8, 8), (8, 64)):
            given = feeds(options.width, options.layers, batch, tokens, adapters, rank)
            each = ratios(made, given, options.rounds)
            found.append([f"{batch} × {tokens}", adapters, rank, f"{each['gate']:.2f}", f"{each['gather']:.2f}"])
    head = ["rows × tokens", "adapters", "rank", "gates", "gathered"]
    print(f"{options.layers} layers of width {options.width}, time over that without adapters")
    print(table(head, found, right=head[1:]))


if __name__ == "__main__":
    main()
