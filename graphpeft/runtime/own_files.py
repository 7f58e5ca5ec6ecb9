"""The names that files of an export can have. An export replaces these alone, whatever a report lists."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from graphpeft.errors import FileError
from graphpeft.files.foreign import read_json
from graphpeft.runtime.adapter_file import SUFFIX

REPORT = "graphpeft.json"
GRAPHS = ("model", "encoder", "decoder")
TEMPLATES = "additional_chat_templates"
"""The one folder in an export: the templates of a tokenizer that has several."""
TOKENIZER = {
    "added_tokens.json", "bpe.codes", "byte_maps.json", "chat_template.jinja", "chat_template.json", "dict.txt", "emoji.json",
    "entity_vocab.json", "merges.txt", "normalizer.json", "prophetnet.tokenizer", "sentencepiece.bpe.model",
    "sentencepiece.model", "source.spm", "special_tokens_map.json", "spiece.model", "spm.model", "spm_char.model",
    "target.spm", "target_vocab.json", "tekken.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "vocab-src.json", "vocab-tgt.json", "vocab.bpe", "vocab.json", "vocab.spm", "vocab.txt",
    "word_pronunciation.json", "word_shape.json",
}  # fmt: skip
"""The files that tokenizers of transformers write."""
FIXED = {REPORT, "genai_config.json", *TOKENIZER, *(f"{g}.onnx{end}" for g in GRAPHS for end in ("", ".data"))}


def is_ours(path: Path, adapters: Collection[str]) -> bool:
    """Whether an export with these adapters can have written a file. A sidecar must be one: its name can be anybody's."""
    if path.is_dir() and not path.is_symlink():
        return path.name == TEMPLATES and all(p.suffix == ".jinja" and p.is_file() for p in path.iterdir())
    stem = path.name.removesuffix(".json")
    if stem != path.name and stem in adapters and path.name not in FIXED:
        return _is_sidecar(path)
    files = (f"{name}{part}{SUFFIX}" for name in adapters for part in ("", *(f".{graph}" for graph in GRAPHS)))
    return path.name in FIXED or path.name in files


def _is_sidecar(path: Path) -> bool:
    try:
        told = read_json(path, free={"rules", "ranks"})
    except FileError:
        return False
    return isinstance(told, dict) and {"schema", "adapter", "base"} <= told.keys()
