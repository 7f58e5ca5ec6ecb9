"""One graph in ONNX Runtime and the adapter that it runs."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from graphpeft.errors import AdapterError, FileError
from graphpeft.runtime.adapter_file import SUFFIX, write
from graphpeft.runtime.facts import read_facts, read_sidecar
from graphpeft.runtime.layout import ROW_WEIGHTS, Arrays, NativeSlot, Pairs, a_of, b_of, filled, pair_slots, unfilled

MISMATCH_HINT = "Usual cause: an adapter of another model or export. Remedy: export model and adapter together."
NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
         "tensor(int64)": np.int64, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8, "tensor(int32)": np.int32}  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """An adapter in a graph's layout. ONNX Runtime keeps raw pointers to it, so keep this object alive while it runs."""

    adapter: ort.LoraAdapter
    tensors: Arrays
    pairs: Pairs


class Graph:
    """A graph, its slots, and the adapter in use."""

    def __init__(
        self, path: Path, providers: Sequence[str], options: ort.SessionOptions | None, temporary: str
    ) -> None:
        self.path, self._temporary = path, Path(temporary)
        if options is None:
            options = ort.SessionOptions()
            options.log_severity_level = 3
        try:
            self.inference = ort.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # ONNX Runtime's errors have no common base class
            raise FileError(
                f"{path}: ONNX Runtime {ort.__version__} cannot load it: {error} Usual causes: {path.name}.data was "
                "not copied along, or the graph's opset is too new. Copy the whole folder, or update ONNX Runtime."
            ) from error
        facts = read_facts(path, self.inference)
        self.base, self.slots, self.facts, self.oldest = facts.base, facts.slots, facts.generation, facts.onnxruntime
        self.open = {node.name: node for node in self.inference.get_overridable_initializers()}
        self.inputs = {node.name: node for node in self.inference.get_inputs()}
        self.outputs = [node.name for node in self.inference.get_outputs()]
        self.use(None)

    def load(self, tensors: Arrays, source: Path) -> Loaded:
        """Check an adapter and load it. Raises `FileError` naming the first site where it does not fit."""
        self._check(tensors, source)
        pairs = unfilled(self.slots, tensors)
        path = source if source.is_file() else None
        if not set(tensors) <= set(self.open):  # the file has one slot per site, and this graph shares slots
            tensors, path = filled(self.slots, pairs), None
        adapter = ort.LoraAdapter()
        if path is None:
            path = self._temporary / (uuid.uuid4().hex + SUFFIX)
            write(path, tensors, self.base)
        adapter.Load(str(path))
        return Loaded(adapter, tensors, pairs)

    def use(self, loaded: Loaded | None) -> None:
        self.loaded = loaded
        self.row_weights: np.ndarray | None = None
        self.run_options = ort.RunOptions()
        if loaded is not None:
            self.run_options.add_active_adapter(loaded.adapter)

    def use_rows(self, loaded: Loaded | None, weights: np.ndarray) -> None:
        """Use concatenated adapters with segments; `weights` (rows, adapters) are each row's strengths."""
        self.use(loaded)
        if loaded is not None and self.slots:
            self.row_weights = weights.astype(NUMPY[self.open[ROW_WEIGHTS].type])

    def require_gates(self) -> None:
        """Raise `AdapterError` if the graph has no per-row gates."""
        if self.slots and ROW_WEIGHTS not in self.open:
            raise AdapterError(
                f"{self.path}: this graph runs one adapter for all rows. Export with per_row=True, or run the rows separately."
            )

    def extra(self, rows: int) -> Arrays:
        """Inputs to feed besides the model's inputs and the adapter, for a batch of this many rows."""
        if self.row_weights is None:
            return {}
        if len(self.row_weights) != rows:
            raise AdapterError(f"use() was given {len(self.row_weights)} rows, but the batch has {rows}.")
        return {ROW_WEIGHTS: self.row_weights}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. Adds an empty KV cache, mask and positions if they are not given."""
        if fed := [name for name in inputs if name in self.open]:
            raise AdapterError(f"{fed[0]} is a slot: with an adapter in use ONNX Runtime would ignore it. Call use().")
        given = self.completed(inputs)
        rows = next(iter(given.values())).shape[0] if given else 0
        found = self.inference.run(self.outputs, given | self.extra(rows), self.run_options)
        return dict(zip(self.outputs, found, strict=True))

    def completed(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A decoder's inputs, completed with an empty KV cache, a mask of ones, and positions counted from the mask."""
        given = dict(inputs)
        past = [node for name, node in self.inputs.items() if name.startswith("past_key_values.")]
        if "input_ids" not in given:
            return given
        rows, length = given["input_ids"].shape
        if not past:
            if "attention_mask" in self.inputs:
                given.setdefault("attention_mask", np.ones((rows, length), np.int64))
            return given
        for node in past:
            _, heads, _, width = node.shape
            given.setdefault(node.name, np.zeros((rows, heads, 0, width), NUMPY[node.type]))
        if "attention_mask" in self.inputs:
            total = given[past[0].name].shape[2] + length
            given.setdefault("attention_mask", np.ones((rows, total), np.int64))
        if "position_ids" in self.inputs:
            counted = np.maximum(given["attention_mask"].cumsum(1) - 1, 0)[:, -length:]
            given.setdefault("position_ids", counted.astype(np.int64))
        return given

    def _check(self, tensors: Arrays, source: Path) -> None:
        by_site = {site: slot for slot in pair_slots(self.slots) for site in slot.sites}
        shapes = {name: tuple(place.shape) for name, place in self.open.items()}
        for site, slot in by_site.items():
            shapes |= {
                a_of(site): (slot.inputs, f"rank of {site}"),
                b_of(site): (f"rank of {site}", dict(slot.members)[site]),
            }
        for name, tensor in tensors.items():
            label, _, side = name.removesuffix(".weight").rpartition(".lora_")
            where = f"{source}: at {label!r} lora_{side}"
            if name not in shapes:
                raise FileError(
                    f"{source}: the graph has no slot {name!r}; {label or name!r} takes no adapter. {MISMATCH_HINT}"
                )
            kind = self.open[name].type if name in self.open else self._kind()
            if tensor.dtype != NUMPY[kind]:
                raise FileError(f"{where} is {tensor.dtype}, but its slot is {kind}. {MISMATCH_HINT}")
            want = shapes[name]
            if len(tensor.shape) != len(want) or any(
                isinstance(size, int) and size != got for size, got in zip(want, tensor.shape, strict=True)
            ):
                raise FileError(
                    f"{where} has shape {list(tensor.shape)}, but its slot has {list(want)}. {MISMATCH_HINT}"
                )
            if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
                raise FileError(f"{where} has values that are not finite. Train the adapter again, or export it anew.")
        self._check_ranks(tensors, source)

    def _check_ranks(self, tensors: Arrays, source: Path) -> None:
        """Check that every A comes with all of its Bs, with equal ranks."""
        for slot in self.slots:
            if isinstance(slot, NativeSlot):
                missing = [name for name in slot.shapes if name not in tensors]
                if 0 < len(missing) < len(slot.shapes):
                    raise FileError(f"{source}: at {slot.site!r} it lacks {missing[0]!r}. {MISMATCH_HINT}")
                continue
            layouts = [(slot.a, slot.sites)] if slot.a in tensors else [(a_of(site), (site,)) for site in slot.sites]
            for a, sites in layouts:
                for site in sites:
                    present = [name for name in (a, b_of(site)) if name in tensors]
                    if len(present) == 1:
                        side = "A" if present[0] == a else "B"
                        raise FileError(
                            f"{source}: at {site!r} it has lora_{side} only; a slot takes A and B. {MISMATCH_HINT}"
                        )
                    if len(present) == 2 and tensors[a].shape[1] != tensors[b_of(site)].shape[0]:
                        ranks = f"{tensors[a].shape[1]} and {tensors[b_of(site)].shape[0]}"
                        raise FileError(f"{source}: at {site!r} the ranks of A and B are {ranks}. {MISMATCH_HINT}")

    def _kind(self) -> str:
        return next(iter(self.open.values())).type


def checked_base(sidecar: Path, base: str) -> None:
    """Raise `FileError` if an adapter's sidecar is missing or names another base model."""
    name = sidecar.name.removesuffix(".json") + SUFFIX
    said = read_sidecar(sidecar)
    if said != base:
        raise FileError(
            f"{sidecar.with_name(name)}: made for base model {said[:12]}, but the graph holds {base[:12]}. The "
            "shapes may fit, but the outputs would be wrong: export the adapter from this base model."
        )
