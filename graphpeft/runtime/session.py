"""Run an exported folder on ONNX Runtime: swap adapters, blend them, choose one for each row, and generate text.

ONNX Runtime checks almost nothing about adapters, and most mistakes silently give the base model's output. `Session`
raises an error instead. The same in plain onnxruntime:

    import onnxruntime as ort

    session = ort.InferenceSession("deploy/model.onnx")
    adapter = ort.LoraAdapter()
    adapter.Load("deploy/polite.onnx_adapter")      # a str; keep `adapter` alive as long as `options`
    options = ort.RunOptions()
    options.add_active_adapter(adapter)             # one at most; not seen by run_async nor by IO binding
    logits, = session.run(["logits"], {"input_ids": ids, "attention_mask": mask, ...}, options)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from graphpeft.errors import AdapterError, FileError
from graphpeft.runtime.adapter_file import SUFFIX, read, write
from graphpeft.runtime.folder import recover
from graphpeft.runtime.generation import Generator
from graphpeft.runtime.layout import Arrays, NativeSlot, Pairs, blended, concat_adapters, filled
from graphpeft.runtime.serving import Graph, Loaded, checked_base

Mix = Mapping[str, float]
"""Strengths by adapter."""
Use = str | Mix | Sequence["str | Mix | None"] | None
KEPT = 16
"""How many blends and concatenated adapters a session caches."""
PARTS = ("model", "encoder", "decoder")


class Session:
    """An exported model in ONNX Runtime, with its adapters.

    Args:
        folder: a folder that `graphpeft.export` wrote.
        providers: execution providers of ONNX Runtime, in order of preference; default: the CPU.
        options: session options; default: ONNX Runtime's, without its warning about every slot.
        adapters: whether to load the adapters in the folder.

    Raises:
        FileError: the folder is not an export, or an adapter in it does not fit the graph.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        options: ort.SessionOptions | None = None,
        adapters: bool = True,
    ) -> None:
        self.folder = recover(Path(folder))
        paths = {part: path for part in PARTS if (path := self.folder / f"{part}.onnx").is_file()}
        if not paths:
            raise FileError(f"{self.folder}: there is no model.onnx. A session opens a folder written by export().")
        self._temporary = tempfile.TemporaryDirectory(prefix="graphpeft-")  # for adapters without a file in the folder
        self.graphs = {part: Graph(path, providers, options, self._temporary.name) for part, path in paths.items()}
        self._adapters: dict[str, dict[str, Loaded]] = {}
        self._made: dict[tuple[Any, ...], Loaded] = {}
        for path in self.files if adapters else []:
            self.add(path)
        self.use(None)

    @property
    def inference(self) -> ort.InferenceSession:
        """ONNX Runtime's session; the decoder's if there are two graphs."""
        return self._last.inference

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that `use` accepts."""
        return tuple(sorted(self._adapters))

    @property
    def files(self) -> list[Path]:
        """A file of each adapter in the folder."""
        return list({_stem(path, self.graphs): path for path in sorted(self.folder.glob("*" + SUFFIX))}.values())

    def loaded(self, name: str) -> Mapping[str, Loaded]:
        """A loaded adapter, by graph."""
        return self._adapters[name]

    @property
    def active(self) -> Use:
        """The last argument of `use`."""
        return self._active

    def add(self, path: str | Path, name: str | None = None, *, any_base: bool = False) -> str:
        """Load an adapter from `NAME.onnx_adapter` and its sidecar `NAME.json`; returns its name, `NAME` by default.

        An encoder-decoder model has two files, `NAME.encoder.onnx_adapter` and `NAME.decoder.onnx_adapter`; either path loads
        both, and both must exist. Files from `olive convert-adapters` fit too. They have no sidecar that names their base
        model, so pass `any_base=True` to skip that check, and make sure of the base yourself.

        Raises:
            FileError: it does not fit the graph, was made for another base model, or is not an adapter.
            AdapterError: the session already has an adapter with this name.
        """
        path = Path(path)
        stem = _stem(path, self.graphs)
        name = stem if name is None else name
        if name in self._adapters:
            raise AdapterError(
                f"{path}: this session already has an adapter {name!r}. Choose another name, with name=."
            )
        if not any_base:
            checked_base(path.with_name(f"{stem}.json"), self._last.base)
        loaded = {}
        for part, graph in self.graphs.items():
            file = path if len(self.graphs) == 1 else path.with_name(f"{stem}.{part}{SUFFIX}")
            loaded[part] = graph.load(read(file), file)
        self._adapters[name] = loaded
        return name

    def use(self, adapters: Use) -> None:
        """Choose the adapters for the following runs.

        Args:
            adapters: a name; a blend as strengths by name, such as `{"polite": 0.7, "short": 0.3}`; a list with one of these
                for each row of the batch, if the folder was exported with `per_row=True`; or None for the base.

        Raises:
            AdapterError: there is no such adapter, or the graph has no per-row gates.
        """
        if adapters is None or isinstance(adapters, (str, Mapping)):
            mix = _mix(adapters)
            self._known(mix)
            plain = isinstance(adapters, str)
            for part, graph in self.graphs.items():
                graph.use(self._adapters[adapters].get(part) if plain else self._blend(part, mix))  # type: ignore[index]
        elif isinstance(adapters, Sequence):
            self._use_rows([_mix(row) for row in adapters])
        else:
            raise AdapterError(f"use({adapters!r}): pass a name, strengths by name, a list of these, or None.")
        self._active = adapters

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, for inputs by name (`session.inference.get_inputs()` lists them).

        For a decoder, the KV cache, mask and positions are optional; the defaults are an empty cache, a mask of ones, and
        positions counted from the mask. An encoder-decoder model takes the inputs of both graphs, with the decoder's
        tokens as `decoder_input_ids`.

        Raises:
            AdapterError: an input is a slot, or the batch size differs from the list passed to `use`.
        """
        if len(self.graphs) == 1:
            return self._last.run(inputs)
        given = dict(inputs)
        if "decoder_input_ids" not in given:
            raise AdapterError(
                f"{self.folder}: the decoder's tokens are missing. Pass decoder_input_ids, or call generate()."
            )
        ids = given.pop("decoder_input_ids")
        states = self.graphs["encoder"].run(given)
        return states | self._last.run({"input_ids": ids, **states, **_mask(given)})

    def generate(self, inputs: Mapping[str, np.ndarray], max_new_tokens: int = 20, **options: Any) -> np.ndarray:
        """Token ids (rows, length): the prompt, padded on the left, and up to `max_new_tokens` more.

        Decoding is greedy unless `temperature` is positive; then tokens are sampled, with `seed`, from the `top_k` likeliest
        tokens or those that make up `top_p` of the probability. A row ends at a token in `stop` (default: the model's
        end-of-text tokens) and is then padded. The KV cache stays in ONNX Runtime's memory between tokens.

        Raises:
            AdapterError: the graph has no KV cache.
        """
        given, states = dict(inputs), {}
        if len(self.graphs) > 1:
            states = self.graphs["encoder"].run(given)
            states |= _mask(given)
            rows = next(iter(given.values())).shape[0]
            given = {"input_ids": np.full((rows, 1), self._last.facts.get("decoder_start_token_id", 0), np.int64)}
        return Generator(self._last, given, states, **options).tokens(max_new_tokens)

    def write_bank(self, path: str | Path, names: Sequence[str]) -> None:
        """Concatenate adapters into one `.onnx_adapter` file, to choose an adapter per row in plain onnxruntime.

        An encoder-decoder model gets two files, named like an adapter's. The columns of the input
        `graphpeft.row_weights` (rows, adapters) are in the order of `names`. Raises `AdapterError` if the graph has no
        per-row gates.
        """
        self._known(dict.fromkeys(names, 1.0))
        path = Path(path)
        for part, graph in self.graphs.items():
            graph.require_gates()
            one = path if len(self.graphs) == 1 else path.with_name(f"{path.name.removesuffix(SUFFIX)}.{part}{SUFFIX}")
            write(one, concat_adapters(graph.slots, [self._pairs(part, name) for name in names]), graph.base)

    @property
    def _last(self) -> Graph:
        return list(self.graphs.values())[-1]

    def _pairs(self, part: str, name: str) -> Pairs:
        loaded = self._adapters[name].get(part)
        return loaded.pairs if loaded else {}

    def _known(self, mix: Mix) -> None:
        for name in mix:
            if name not in self._adapters:
                known = ", ".join(self.adapters) or "none; a merged export has its adapter folded in"
                raise AdapterError(f"{self.folder}: there is no adapter {name!r}. Adapters of this folder: {known}.")

    def _blend(self, part: str, mix: Mix) -> Loaded | None:
        if not mix:
            return None
        self._require_pairs()

        def made() -> Arrays:
            pairs = blended([(self._pairs(part, name), strength) for name, strength in mix.items()])
            return filled(self.graphs[part].slots, pairs)

        return self._once((part, *mix.items()), made)

    def _bank(self, part: str, names: tuple[str, ...]) -> Loaded | None:
        if not names:
            return None
        pairs = [self._pairs(part, name) for name in names]
        return self._once((part, *names), lambda: concat_adapters(self.graphs[part].slots, pairs))

    def _once(self, key: tuple[Any, ...], made: Callable[[], Arrays]) -> Loaded:
        """A cached blend or concatenation: building one takes about 50 times as long as using it again."""
        if key not in self._made:
            while len(self._made) >= KEPT:
                del self._made[next(iter(self._made))]
            self._made[key] = self.graphs[key[0]].load(made(), self.folder)
        return self._made[key]

    def _require_pairs(self) -> None:
        if any(isinstance(slot, NativeSlot) for graph in self.graphs.values() for slot in graph.slots):
            raise AdapterError(
                f"{self.folder}: a compact export holds one method's own tensors, which cannot be added or concatenated. "
                "Export without compact, as LoRA pairs, to blend adapters or to mix them in a batch."
            )

    def _use_rows(self, rows: Sequence[Mix]) -> None:
        names = tuple(dict.fromkeys(name for row in rows for name in row))
        self._known(dict.fromkeys(names, 1.0))
        for graph in self.graphs.values():
            graph.require_gates()
        weights = np.array([[row.get(name, 0.0) for name in names] for row in rows])
        for part, graph in self.graphs.items():
            graph.use_rows(self._bank(part, names), weights)


def _stem(path: Path, parts: Mapping[str, Graph]) -> str:
    stem = path.name.removesuffix(SUFFIX)
    return stem if len(parts) == 1 else stem.removesuffix(".encoder").removesuffix(".decoder")


def _mix(row: str | Mix | None) -> Mix:
    mix = {row: 1.0} if isinstance(row, str) else {} if row is None else row
    if wrong := [name for name, strength in mix.items() if not np.isfinite(strength)]:
        raise AdapterError(f"The strength of {wrong[0]!r} is {mix[wrong[0]]}; it must be a finite number.")
    return mix


def _mask(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    if "input_ids" not in inputs:
        return {}
    ids = inputs["input_ids"]
    return {"encoder_attention_mask": inputs.get("attention_mask", np.ones_like(ids))}
