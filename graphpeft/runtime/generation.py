"""Generate text token by token, with a graph that has the KV cache as inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort

from graphpeft.errors import AdapterError
from graphpeft.runtime.layout import Arrays
from graphpeft.runtime.serving import Graph


class Generator:
    """Generates the tokens of one batch. IO binding passes the cache on in place, so it is not copied between tokens."""

    def __init__(
        self,
        graph: Graph,
        inputs: Mapping[str, np.ndarray],
        constant: Mapping[str, np.ndarray] | None = None,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[int] | None = None,
    ) -> None:
        self.graph, self.temperature, self.top_k, self.top_p = graph, temperature, top_k, top_p
        if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
            raise AdapterError(f"top_k={top_k}, top_p={top_p}: top_k must be at least 1, and top_p in (0, 1].")
        if not (temperature >= 0 and np.isfinite(temperature)) or (seed is not None and seed < 0):
            raise AdapterError(f"temperature={temperature}, seed={seed}: both must be finite and at least 0.")
        self.past = [name for name in graph.inputs if name.startswith("past_key_values.")]
        if not self.past:
            raise AdapterError(
                f"{graph.path}: this graph has no KV cache; export the model with cache=True to generate."
            )
        if "logits" not in graph.outputs:
            raise AdapterError(
                f"{graph.path}: this graph outputs {graph.outputs[0]!r}, and no logits to choose tokens from."
            )
        if strange := [name for name in inputs if name not in graph.inputs]:
            raise AdapterError(f"{strange[0]!r} is not an input of this model. Inputs: {', '.join(graph.inputs)}.")
        self.ids = np.asarray(inputs["input_ids"], np.int64)
        if self.ids.ndim != 2 or not self.ids.size:
            raise AdapterError(
                f"input_ids has shape {self.ids.shape}; it must be (rows, length), with at least one token per row."
            )
        self.mask = np.asarray(inputs.get("attention_mask", np.ones_like(self.ids)), np.int64)
        if (self.mask[:, -1] == 0).any():
            raise AdapterError("The prompt is padded on the right, so it ends in padding. Pad it on the left.")
        self.random = np.random.default_rng(seed)
        self.stop = set(graph.facts.get("eos_token_id", []) if stop is None else stop)
        self.pad = graph.facts.get("pad_token_id", 0)
        self.binding = graph.inference.io_binding()
        # Under IO binding ONNX Runtime ignores the active adapter, so bind its tensors like other inputs.
        self._bind(graph.loaded.tensors if graph.loaded else {})
        self._bind(graph.extra(len(self.ids)))
        self._bind({name: value for name, value in (constant or {}).items() if name in graph.inputs})

    def tokens(self, count: int) -> np.ndarray:
        """Prompt and generated tokens (rows, length)."""
        done = np.zeros(len(self.ids), bool)
        first = self.graph.completed({"input_ids": self.ids, "attention_mask": self.mask})
        step = {name: value for name, value in first.items() if name in self.graph.inputs}
        for _ in range(count):
            logits = self._forward(step)
            chosen = np.where(done, self.pad, self._chosen(logits))
            done |= np.isin(chosen, list(self.stop))
            self.ids = np.concatenate([self.ids, chosen[:, None]], 1)
            self.mask = np.concatenate([self.mask, np.ones_like(chosen)[:, None]], 1)
            if done.all():
                break
            following = {"input_ids": chosen[:, None], "attention_mask": self.mask}
            following["position_ids"] = self.mask.sum(1, keepdims=True) - 1
            step = {name: value for name, value in following.items() if name in self.graph.inputs}
        return self.ids

    def _forward(self, step: Mapping[str, np.ndarray]) -> np.ndarray:
        """Logits (rows, vocabulary) of the last position; rebinds the output cache as the next input."""
        self._bind(step)
        for name in self.graph.outputs:
            self.binding.bind_output(name, "cpu")
        self.graph.inference.run_with_iobinding(self.binding)
        found = dict(zip(self.graph.outputs, self.binding.get_outputs(), strict=True))
        for name in self.past:
            self.binding.bind_ortvalue_input(name, found[name.replace("past_key_values", "present")])
        return found["logits"].numpy()[:, -1].astype(np.float64)

    def _bind(self, tensors: Arrays | Mapping[str, np.ndarray]) -> None:
        for name, value in tensors.items():
            self.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value)))

    def _chosen(self, logits: np.ndarray) -> np.ndarray:
        if self.temperature <= 0:
            return logits.argmax(-1)
        # Gumbel-max trick: the argmax of logits plus Gumbel noise is a sample from their softmax.
        return (
            _kept(logits / self.temperature, self.top_k, self.top_p) + self.random.gumbel(size=logits.shape)
        ).argmax(-1)


def _kept(logits: np.ndarray, top_k: int | None, top_p: float | None) -> np.ndarray:
    """Logits with all tokens outside of top-k and top-p set to minus infinity."""
    order = np.argsort(-logits, -1)
    ranked = np.take_along_axis(logits, order, -1)
    drop = np.zeros(logits.shape, bool)
    if top_k is not None:
        drop[:, top_k:] = True
    if top_p is not None:
        share = np.exp(ranked - ranked[:, :1])
        share /= share.sum(-1, keepdims=True)
        drop |= share.cumsum(-1) - share >= top_p
    kept = logits.copy()
    np.put_along_axis(kept, order, np.where(drop, -np.inf, ranked), -1)
    return kept
