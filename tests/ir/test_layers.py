"""One place knows a layer's number, for weights and for modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphpeft as gp
from graphpeft.ir.layers import any_layer, any_layer_of_module, block_of, layer_of, layer_of_module


@pytest.mark.parametrize(
    ("weight", "module", "layer", "block", "any_weight", "any_module"),
    [
        ("layers.3.mlp.up.weight", "layers.3.mlp.up", 3, "layers.*", "layers.*.mlp.up.weight", "layers.*.mlp.up"),
        ("h.11.weight", "h.11", 11, "h.*", "h.*.weight", "h.*"),
        ("2.weight", "2", 2, "*", "2.weight", "2"),
        ("layers.0.experts.5.w", "layers.0.experts.5", 0, "layers.*", "layers.*.experts.5.w", "layers.*.experts.5"),
        ("lm_head.weight", "lm_head", None, "", "lm_head.weight", "lm_head"),
        ("ws.0", "ws", None, "", "ws.0", "ws"),
    ],
)  # fmt: skip
def test_paths(weight: str, module: str, layer: int | None, block: str, any_weight: str, any_module: str) -> None:
    assert layer_of(weight) == layer_of_module(module) == layer
    assert block_of(module) == block
    assert any_layer(weight) == any_weight
    assert any_layer_of_module(module) == any_module


def test_an_advice_for_a_numbered_root_means_that_layer_alone() -> None:
    model, x = (
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)),
        (torch.randn(3, 8),),
    )
    assert [site.layer for site in gp.sites(model, x)] == [0, 2, 4]
    (reason,) = gp.why(model, "0", inputs=x).reasons
    assert len(gp.plan(model, reason.remedy, inputs=x).entries) == 1


def test_the_members_of_a_parameter_list_are_no_layers() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ws = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(2)])
            self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for w, block in zip(self.ws, self.blocks, strict=True):
                x = block(torch.tanh(x @ w.t()))
            return x

    found = {site.weight: site.layer for site in gp.sites(Listed(), (torch.randn(3, 8),))}
    assert found == {"ws.0": None, "blocks.0.weight": 0, "ws.1": None, "blocks.1.weight": 1}
