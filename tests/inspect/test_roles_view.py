"""The roles of a model at a glance: what is folded, what is told of parts that no call ran."""

from __future__ import annotations

import torch
from torch import nn
from zoo import ZOO

from graphpeft.capturing.survey import find_base_sites
from graphpeft.inspect.roles import overview
from graphpeft.match.find import SearchResult


class Half(nn.Module):
    """A model of which a call runs one part."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(8, 4), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.table = nn.Parameter(torch.zeros(8, 8))
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(run=nn.Linear(4, 4), rest=nn.Linear(4, 4))) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.used(x)
        for block in self.blocks:
            x = torch.relu(block["run"](x))
        return x


def test_parts_that_no_call_ran_are_counted_by_their_outermost_module() -> None:
    model = Half().eval()
    view = overview(model, find_base_sites(model, (torch.randn(2, 8),)))
    told = {u.path: (u.weights, u.reason) for u in view.unseen}
    why = "no example call runs it"
    assert told == {"table": (1, why), "idle": (2, why), "blocks.*.rest": (3, why)}
    assert str(view).endswith("Not reached\n  table  1 weights: " + why + "\n  idle  2 weights: " + why
                              + "\n  blocks.*.rest  3 weights: " + why)  # fmt: skip


def test_the_reason_of_a_part_that_could_not_be_captured() -> None:
    model = Half()
    found = SearchResult((), {}, frozenset({"used.weight"}), {"idle": "Sequential cannot be captured: why\nand more"})
    told = {u.path: u.reason for u in overview(model, found).unseen}
    assert told == {
        "table": "no example call runs it",
        "idle": "Sequential cannot be captured: why",
        "blocks": "no example call runs it",
    }
    view = overview(model, SearchResult((), {}, frozenset(), {"": "Half cannot be captured"}))
    assert [(u.path, u.weights, u.reason) for u in view.unseen] == [("", 10, "Half cannot be captured")]
    assert "(all)  10 weights: Half cannot be captured" in str(view)


def test_tied_and_cross_sites_have_lines_of_their_own() -> None:
    t5 = ZOO["t5"]("sdpa").eval()
    roles = {r.role: r for r in overview(t5, find_base_sites(t5)).roles}
    assert (roles["q"].sites, roles["q"].layers, roles["q cross"].sites) == (4, 4, 2)
    assert roles["q"].others == ("decoder.block.*.layer.0.SelfAttention.q.weight",)
    gpt2 = ZOO["gpt2"]("sdpa").eval()
    view = overview(gpt2, find_base_sites(gpt2))
    assert view.roles[0].role == "embed+head"
    assert not {"embed", "head"} & {role for absence in view.absent for role in absence.roles}
