"""How many numbers each method trains, against the closed forms of the papers, on shapes that the papers use."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForSequenceClassification

from graphpeft.capturing.survey import find_base_sites
from graphpeft.match.find import SearchResult
from graphpeft.methods import builtin
from graphpeft.planning.plan import make_plan
from graphpeft.rules.rule import coerce

# (rule, RoBERTa-base with 24 sites of 768 × 768, LLaMA-7B with 64 of 4096 × 4096); q and v of both.
COUNTS = [
    ("lora(r=8)", 294_912, 4_194_304),
    ("lora(r=64)", 2_359_296, 33_554_432),
    ("olora(r=8)", 294_912, 4_194_304),
    ("olora(r=64)", 2_359_296, 33_554_432),
    ("pissa(r=8)", 294_912, 4_194_304),
    ("pissa(r=64)", 2_359_296, 33_554_432),
    ("melora(n=8, r=1)", 36_864, 524_288),
    ("melora(n=2, r=8)", 294_912, 4_194_304),
    ("melora(n=16, r=8)", 294_912, 4_194_304),
    ("vera(r=256)", 24_576, 278_528),
    ("vera(r=1024)", 43_008, 327_680),
    ("rlora(r=64)", 19_968, 266_240),
    ("rlora(r=256)", 24_576, 278_528),
    ("rlora(r=256, train=in_out)", 36_864, 524_288),
    ("rlora(r=256, train=in_mid_out)", 43_008, 540_672),
    ("rlora(r=16, train=core)", 6_144, 16_384),
    ("rlora(r=32, train=core)", 24_576, 65_536),
    ("rlora(r=8, train=b_only)", 147_456, 2_097_152),
    ("blora(r=8)", 295_632, 4_196_224),
    ("blora(r=16)", 590_928, 8_391_552),
    ("dora(r=8)", 294_912 + 24 * 768, 4_194_304 + 64 * 4096),
]


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[torch.nn.Module, SearchResult]]:
    """Both models on the meta device, where a 7B shape costs nothing, and their sites."""
    with torch.device("meta"):
        built = {
            "roberta": RobertaForSequenceClassification(RobertaConfig()),
            "llama": LlamaForCausalLM(LlamaConfig()),
        }
    return {name: (model, find_base_sites(model)) for name, model in built.items()}


@pytest.mark.parametrize(("method", "roberta", "llama"), COUNTS)
def test_q_and_v(
    models: dict[str, tuple[torch.nn.Module, SearchResult]], method: str, roberta: int, llama: int
) -> None:
    for name, count in {"roberta": roberta, "llama": llama}.items():
        model, found = models[name]
        assert make_plan(model, found, coerce(f"qv:{method}")).trainable == count, name


@pytest.mark.parametrize(
    ("model", "rule", "count"),
    [
        # What VeRA's paper calls 159.9M, 1.4M and 1.6M, and AdaLoRA's tables 1.33M.
        ("llama", "linear:lora(r=64)", 159_907_840),
        ("llama", "linear:vera(r=256)", 1_417_216),
        ("llama", "linear:vera(r=1024)", 1_589_248),
        ("llama", "linear:rlora(r=256)", 1_417_216),
        ("llama", "linear:rlora(r=1024)", 1_589_248),
        ("roberta", "linear:lora(r=8)", 1_327_104),
        ("roberta", "linear:vera(r=1024)", 156_672),
    ],
)
def test_every_linear_map(
    models: dict[str, tuple[torch.nn.Module, SearchResult]], model: str, rule: str, count: int
) -> None:
    assert make_plan(*models[model], coerce(rule)).trainable == count


def test_every_method_says_what_it_is() -> None:
    for method in builtin():
        assert method.paper, method.name
        assert method.summary.update, method.name
        assert method.summary.trained, method.name
        assert method.examples, method.name
