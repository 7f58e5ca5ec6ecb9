"""Make the examples of docs/inspect.md and its pictures: `python docs/inspect_examples.py [--text]`.

The texts stand in the page itself, after a line `<!-- example: NAME -->`; a test holds them against what is printed today.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

import graphpeft as gp

HERE = Path(__file__).parent
PAGE = HERE / "inspect.md"
BLOCK = re.compile(r"(<!-- example: ([\w ]+) -->\n```text\n).*?(?=```\n)", re.S)


def llama(layers: int = 4) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=4, n_head=4, n_positions=64)).eval()


def trained(model: nn.Module, rules: str) -> nn.Module:
    """With adapters that training has moved, more in later layers."""
    gp.apply(model, rules)
    torch.manual_seed(1)
    tokens = torch.randint(3, 128, (8, 16))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, fused=True)
    for _ in range(20):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def plan() -> object:
    return gp.plan(gpt2(), "qv[layers=1-3]:rlora; mlp:lora(r=4)")


def why() -> object:
    return gp.why(llama(), "*.q_proj", "qv[layers=0-1]:lora; mlp:lora")


def why_not() -> object:
    config = MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=4, state_size=4)
    return gp.why(MambaForCausalLM(config), "*.x_proj", "qv:lora")


def explain() -> object:
    return gp.explain(trained(llama(), "qv:lora(r=4); mlp:blora"))


def diff() -> object:
    return gp.diff(gp.apply(gpt2(), "v:lora"))


def diff_of_exports() -> object:
    model = trained(llama(), "q:lora")
    with tempfile.TemporaryDirectory() as name:
        merged, slots = Path(name) / "merged", Path(name) / "slots"
        gp.export(model, merged, merged=True, verify="off")
        gp.export(model, slots, verify="off")
        return gp.diff(merged, slots)


def passes() -> object:
    with tempfile.TemporaryDirectory() as name:
        model = llama()
        with gp.watch(dump=Path(name) / "passes"):
            gp.apply(model, "qv:lora")
            gp.merge(model)
        return (Path(name) / "passes" / "steps.txt").read_text(encoding="utf-8")


EXAMPLES: dict[str, Callable[[], object]] = {
    "plan": plan,
    "why": why,
    "why not": why_not,
    "explain": explain,
    "diff": diff,
    "diff of exports": diff_of_exports,
    "passes": passes,
}


def filled(page: str, texts: dict[str, str]) -> str:
    return BLOCK.sub(lambda found: found[1] + texts[found[2]].rstrip() + "\n", page)


def pictures(folder: Path) -> None:
    """Screenshots of a report, by the browser of the machine."""
    from playwright.sync_api import sync_playwright

    report = gp.report(trained(llama(12), "qv:lora(r=4); mlp:blora"), folder / "report.html")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(report.as_uri())
        page.get_by_role("tab", name="Numbers").click()
        page.screenshot(path=HERE / "inspect" / "report_numbers.png")
        page.get_by_role("tab", name="Sites").click()
        page.get_by_role("searchbox", name="Filter").fill("q_proj")
        page.screenshot(path=HERE / "inspect" / "report_sites.png")
        page.locator("#table tbody tr").first.click()
        page.wait_for_timeout(1000)
        page.screenshot(path=HERE / "inspect" / "report.png")
        page.get_by_label("Before and after").check()
        page.get_by_role("tab", name="Sites").click()
        page.locator("#table tbody tr").first.click()
        page.wait_for_timeout(1000)
        page.screenshot(path=HERE / "inspect" / "report_diff.png")
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", action="store_true", help="leave the pictures as they are")
    options = parser.parse_args()
    texts = {name: str(make()) for name, make in EXAMPLES.items()}
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), texts), encoding="utf-8")
    if not options.text:
        with tempfile.TemporaryDirectory() as name:
            pictures(Path(name))


if __name__ == "__main__":
    main()
