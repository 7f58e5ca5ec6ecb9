"""Run an exported folder on ONNX Runtime and swap its adapters.

ONNX Runtime checks next to nothing about adapters, and most mistakes silently give the base model's
output; `Session` exists to refuse those mistakes. The same in plain onnxruntime:

    import onnxruntime as ort

    session = ort.InferenceSession("deploy/model.onnx")
    adapter = ort.LoraAdapter()
    adapter.Load("deploy/polite.onnx_adapter")      # a str; keep `adapter` alive as long as `options`
    options = ort.RunOptions()
    options.add_active_adapter(adapter)             # one at most; not seen by run_async nor by IO binding
    logits, = session.run(None, {"input_ids": ids, "attention_mask": mask}, options)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from graphpeft.errors import AdapterError, FileError

SCHEMA = 1
"""Version of the contract between graph, adapter files and sidecars."""
SUFFIX = ".onnx_adapter"


class Session:
    """An exported model in ONNX Runtime, with at most one of its adapters in use.

    Args:
        folder: what `graphpeft.export` wrote.
        providers: execution providers of ONNX Runtime, in order of preference; default: the CPU.
        options: session options; default: those of ONNX Runtime, without its warning about every slot.

    Raises:
        FileError: the folder is no export, or an adapter in it does not fit the graph.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        options: ort.SessionOptions | None = None,
    ) -> None:
        self.folder = Path(folder)
        model = self.folder / "model.onnx"
        if not model.is_file():
            raise FileError(f"{self.folder}: there is no model.onnx. A session opens a folder written by export().")
        if options is None:
            options = ort.SessionOptions()
            options.log_severity_level = 3
        try:
            self.inference = ort.InferenceSession(str(model), options, providers=list(providers))
        except Exception as error:  # ONNX Runtime's errors have no class of their own in common
            raise FileError(
                f"{model}: ONNX Runtime {ort.__version__} cannot load it: {error} Usual causes: model.onnx.data was "
                "not copied along, or the graph's opset is too new. Copy the whole folder, or update ONNX Runtime."
            ) from error
        properties = self.inference.get_modelmeta().custom_metadata_map
        if properties.get("graphpeft.schema") != str(SCHEMA):
            raise FileError(
                f"{model}: graphpeft.schema is {properties.get('graphpeft.schema')!r} in the model's metadata, this "
                f"version reads {SCHEMA}. Export the model again with this version of graphpeft."
            )
        self._base = properties["graphpeft.base"]
        self._slots = {slot.name: slot for slot in self.inference.get_overridable_initializers()}
        # ONNX Runtime keeps bare pointers to these: without a reference here, `run` would silently use the base.
        self._loaded = {path.name.removesuffix(SUFFIX): self._load(path) for path in self.folder.glob("*" + SUFFIX)}
        self.use(None)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that `use` accepts."""
        return tuple(sorted(self._loaded))

    @property
    def active(self) -> str | None:
        """The adapter in use."""
        return self._active

    def use(self, name: str | None) -> None:
        """Run with this adapter from now on; `None` for the base model.

        Raises:
            AdapterError: there is no such adapter, or more than one was asked for.
        """
        if name is not None and not isinstance(name, str):
            raise AdapterError(f"use({name!r}): one adapter at a time; ONNX Runtime would silently drop all others.")
        if name is not None and name not in self._loaded:
            known = ", ".join(self.adapters) or "none; a merged export has its adapter folded in"
            raise AdapterError(f"{self.folder}: there is no adapter {name!r}. Adapters of this folder: {known}.")
        self._active = name
        self._options = ort.RunOptions()
        if name is not None:
            self._options.add_active_adapter(self._loaded[name])

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, for inputs by name (`session.inference.get_inputs()` lists them)."""
        if fed := [name for name in inputs if name in self._slots]:
            raise AdapterError(f"{fed[0]} is a slot: with an adapter in use ONNX Runtime would ignore it. Call use().")
        names = [output.name for output in self.inference.get_outputs()]
        return dict(zip(names, self.inference.run(names, dict(inputs), self._options), strict=True))

    def _load(self, path: Path) -> ort.LoraAdapter:
        self._check_base(path)
        adapter = ort.LoraAdapter()
        try:
            parameters = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
            adapter.Load(str(path))
        except RuntimeError as error:
            raise FileError(f"{path}: not an adapter of ONNX Runtime ({error}). Export the adapter again.") from error
        self._check_fit(path, {name: (value.data_type(), value.shape()) for name, value in parameters.items()})
        return adapter

    def _check_base(self, path: Path) -> None:
        sidecar = path.with_name(path.name.removesuffix(SUFFIX) + ".json")
        try:
            base = json.loads(sidecar.read_text(encoding="utf-8"))["base"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FileError(
                f"{sidecar}: missing or unreadable. It states which base model {path.name} was trained on, and the "
                "adapter's file cannot; copy both files together."
            ) from error
        if base != self._base:
            raise FileError(
                f"{path}: made for base model {base[:12]}, but model.onnx holds {self._base[:12]}. The shapes may fit, "
                "the answers would not: export the adapter from this base model."
            )

    def _check_fit(self, path: Path, parameters: Mapping[str, tuple[str, list[int]]]) -> None:
        remedy = "Usual cause: an adapter of another model or export. Remedy: export model and adapter together."
        ranks: dict[str, dict[str, int]] = {}
        for name, (kind, shape) in parameters.items():
            site, _, side = name.removesuffix(".weight").rpartition(".lora_")
            if (slot := self._slots.get(name)) is None:
                raise FileError(f"{path}: the graph has no slot {name!r}; {site or name!r} takes no adapter. {remedy}")
            if kind != slot.type:
                raise FileError(f"{path}: at {site!r} lora_{side} is {kind}, its slot {slot.type}. {remedy}")
            axis = 1 if side == "A" else 0
            if len(shape) != 2 or shape[1 - axis] != slot.shape[1 - axis]:
                raise FileError(f"{path}: at {site!r} lora_{side} has shape {shape}, its slot {slot.shape}. {remedy}")
            ranks.setdefault(site, {})[side] = shape[axis]
        for site, found in ranks.items():
            if len(found) < 2:
                raise FileError(f"{path}: at {site!r} it has lora_{next(iter(found))} only; a slot takes two. {remedy}")
            if found["A"] != found["B"]:
                raise FileError(f"{path}: at {site!r} the ranks of A and B are {found['A']} and {found['B']}. {remedy}")
