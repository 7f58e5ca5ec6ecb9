"""Memory and time of merging a checkpoint on disk, beside copying its files, and beside PEFT on a size that it can hold.

A random bfloat16 checkpoint of a Llama is made on the spot, with a random adapter; each case runs in a process of its own,
in turn, and its output is deleted. `python benchmarks/merge_files.py` needs 28 GB of disk; `--small` is for tests, and
`--shape 1b --peft` loads the model in PEFT too. Files are asked out of the cache before every case, on Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "1b": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32),
    "small": dict(hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4, vocab_size=512),
}
SHARD = {"7b": 5 << 30, "1b": 1 << 30, "small": 1 << 19}


def make(folder: Path, shape: str, layers: int | None, rules: str) -> None:
    """A checkpoint, one shard in memory at a time, and adapters for it of both tools."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(**sizes, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder / "base")
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    torch.manual_seed(0)
    shards = [*_shards(model.state_dict(), SHARD[shape])]
    index: dict[str, Any] = {"metadata": {"total_size": 0}, "weight_map": {}}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {n: torch.randn(model.state_dict()[n].shape, dtype=torch.bfloat16) * 0.02 for n in names}
        save_file(tensors, folder / "base" / file, {"format": "pt"})
        index["weight_map"] |= dict.fromkeys(names, file)
        index["metadata"]["total_size"] += sum(t.nbytes for t in tensors.values())
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    _adapter(folder, model, rules)


def _shards(weights: dict[str, Any], most: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, weight in weights.items():
        if names and size + weight.nbytes > most:
            yield names
            names, size = [], 0
        names.append(name)
        size += weight.nbytes
    yield names


def _adapter(folder: Path, model: Any, rules: str) -> None:
    """Random numbers, as if trained on the checkpoint."""
    import torch

    import graphpeft as gp
    from graphpeft.rewrite.state import chains, get_state, saved
    from graphpeft.store.checkpoint import open_checkpoint
    from graphpeft.store.fingerprint import fingerprint
    from graphpeft.store.native import AdapterFile, write_adapter

    gp.apply(model, rules)
    adapter = get_state(model).adapters["default"]
    tensors = {
        key: torch.randn(tensor.shape) * 0.01
        for site, chain in chains(model, "default").items()
        for key, tensor in saved(site, chain)
    }
    where = open_checkpoint(folder / "base").where
    base = fingerprint((e.site.weight for e in adapter.entries), lambda name: where[name].tensor(name))
    write_adapter(folder / "adapter", AdapterFile("default", rules, 0, adapter.entries, tensors, base))


def graphpeft(folder: Path) -> None:
    from graphpeft.cli.main import app

    app(["merge", *(str(folder / name) for name in ("base", "adapter", "out"))], standalone_mode=False)


def copy(folder: Path) -> None:
    """Each file flushed to the disk, as the merge does."""
    (folder / "out").mkdir()
    for path in (folder / "base").iterdir():
        shutil.copyfile(path, folder / "out" / path.name)
        with (folder / "out" / path.name).open("rb") as file:
            os.fsync(file.fileno())


def peft(folder: Path) -> None:
    """LoRA of rank 8 on all linear maps, made anew: PEFT's own way to a merged checkpoint."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    model.merge_and_unload().save_pretrained(folder / "out", max_shard_size="5GB")
    for path in (folder / "out").iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


CASES = {"copy": copy, "graphpeft": graphpeft, "peft": peft}


def cold(folder: Path) -> None:
    if hasattr(os, "posix_fadvise"):
        for path in (path for path in folder.rglob("*") if path.is_file()):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(case: str, folder: Path) -> dict[str, float]:
    start = time.perf_counter()
    CASES[case](folder)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": time.perf_counter() - start,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--small", action="store_const", const="small", dest="shape")
    parser.add_argument("--rules", default="linear:lora(r=8)")
    parser.add_argument("--layers", type=int, help="Fewer than the shape has: memory depends on the largest weight.")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--peft", action="store_true", help="PEFT too, which holds the whole model.")
    parser.add_argument("--folder", type=Path, help="Where to work, on the disk to measure; default: the system's.")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        case, folder = options.case[0], Path(options.case[1])
        if case == "make":
            make(folder, options.shape, options.layers, options.rules)
        print(json.dumps(None if case == "make" else measured(case, folder)))
        return

    def child(case: str) -> Any:
        # This process stays small: a child's peak starts at its parent's.
        command = [sys.executable, __file__, *sys.argv[1:], "--case", case, name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        return json.loads(output.splitlines()[-1])

    cases = ["copy", "graphpeft", *(["peft"] if options.peft else [])]
    runs: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        child("make")
        size = sum(path.stat().st_size for path in (folder / "base").iterdir())
        for case in cases * options.repeats:
            cold(folder)
            runs[case].append(child(case))
            shutil.rmtree(folder / "out")
    layers = f" of {options.layers} layers" if options.layers else ""
    print(f"{options.shape}{layers}, {size / 1e9:.2f} GB, {options.rules}")
    print(f"{'':<10} {'seconds min / max':>18} {'CPU seconds':>12} {'MB/s':>7} {'peak GB':>8}")
    for case, found in runs.items():
        seconds = [run["seconds"] for run in found]
        print(
            f"{case:<10} {min(seconds):>8.1f} / {max(seconds):<7.1f} {min(run['cpu'] for run in found):>12.1f} "
            f"{size / 1e6 / min(seconds):>7.0f} {max(run['peak_gb'] for run in found):>8.2f}"
        )


if __name__ == "__main__":
    main()
