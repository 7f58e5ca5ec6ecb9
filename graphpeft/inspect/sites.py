"""`gp.sites`: list every projection of a model with its role."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from torch import nn
from torch.export import ExportedProgram

from graphpeft.ambient import plain
from graphpeft.capturing.capture import Inputs, as_module
from graphpeft.capturing.survey import find_base_sites
from graphpeft.ir.site import Site
from graphpeft.rewrite.entry import on_model
from graphpeft.show.sites import SiteRow, headings, site_dict, site_row
from graphpeft.show.view import Grid, View


@dataclass(frozen=True)
class Sites(View, Sequence[Site]):
    """Sites in graph order; prints as a table."""

    items: tuple[Site, ...]
    unreached: Mapping[str, str] = field(default_factory=dict)
    """Parts of the model that no example call ran, and why. Their sites are unknown."""

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> Sites: ...
    def __getitem__(self, index: int | slice) -> Site | Sites:
        return Sites(self.items[index], self.unreached) if isinstance(index, slice) else self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.items)

    def blocks(self) -> Iterator[Grid | str]:
        yield Grid.of(headings(*SiteRow._fields), map(site_row, self.items))
        yield from (f"not reached: {path or 'the whole'}: {why}" for path, why in self.unreached.items())

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for `json.dumps`."""
        return {"sites": [site_dict(site) for site in self.items], "unreached": dict(self.unreached)}


@plain()
@on_model()
def sites(model: nn.Module | ExportedProgram, inputs: Inputs = None) -> Sites:
    """Every projection of the model, with the role that dataflow assigns to it. Raises `CaptureError`."""
    module = as_module(model)
    found = find_base_sites(module, inputs)
    return Sites(found.sites, found.unreached)
