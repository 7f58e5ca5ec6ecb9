"""A home-made model adapted by the roles that bilinear_roles declares. First: pip install examples/own_role"""

from collections import OrderedDict

import torch
from torch import nn

import graphpeft as gp


class Block(nn.Module):
    """x + fold(left(x) * right(x)): two layers to multiply, one to fold the products back, and no activation."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.left, self.right = nn.Linear(width, inner), nn.Linear(width, inner)
        self.fold = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.fold(self.left(y) * self.right(y))


torch.manual_seed(0)
model = nn.Sequential(OrderedDict(blocks=nn.Sequential(Block(16, 24), Block(16, 24)))).eval()
x = torch.randn(2, 5, 16)
before = model(x)

print(gp.sites(model, (x,)), end="\n\n")
gp.apply(model, "factor:lora(r=2); fold:lora(r=4)", inputs=(x,))
print(gp.explain(model), end="\n\n")

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
for _ in range(5):
    loss = (model(x) - x.flip(-1)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

print(f"outputs moved by {float((model(x) - before).detach().abs().max()):.3f}")
with gp.disabled(model):
    print(f"with the adapter off by {float((model(x) - before).detach().abs().max()):.3f}")
