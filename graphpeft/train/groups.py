"""Parameter groups for an optimizer: LoRA+ learning rates, and separate rates for noise, gates and ranges."""

from __future__ import annotations

from typing import Any

from torch import nn

from graphpeft.chain import Noise, Transform
from graphpeft.errors import RuleError
from graphpeft.rewrite.entry import on_model
from graphpeft.rewrite.state import chains, find_state


@on_model()
def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    lora_plus: float = 1.0,
    noise_lr: float = 1e-2,
    gate_lr: float = 1e-2,
) -> list[dict[str, Any]]:
    """Every parameter that trains, exactly once, in groups for `torch.optim`; empty groups are left out.

    `lora_plus` multiplies the learning rate of each chain's leftmost trained factor, LoRA's B (LoRA+: Hayou et al., 2024,
    arXiv:2402.12354, who use 16). Standard deviations of noise use `noise_lr`; gates and ranges use `gate_lr`; none of
    these has weight decay. Raises `RuleError` for rates that are not above 0.
    """
    for name, value in {"lr": lr, "lora_plus": lora_plus, "noise_lr": noise_lr, "gate_lr": gate_lr}.items():
        if not value > 0:
            raise RuleError(f"parameter_groups: {name} = {value} is not > 0.")
    noise = {p for m in model.modules() if isinstance(m, Noise) for p in m.parameters()}
    gates = {p for m in model.modules() if isinstance(m, Transform) for p in m.parameters()} - noise
    fast: set[nn.Parameter] = set()
    state = find_state(model)
    for adapter in state.active if state else ():
        for chain in chains(model, adapter).values():
            trained = [tuple(p for p in factor.parameters() if p not in noise | gates) for factor in chain.factors]
            held = [parameters for parameters in trained if parameters]
            fast.update(held[0] if len(held) > 1 else ())
    every = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in every if p not in fast | noise | gates], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in every if p in fast], "lr": lr * lora_plus, "weight_decay": weight_decay},
        {"params": [p for p in every if p in noise], "lr": noise_lr, "weight_decay": 0.0},
        {"params": [p for p in every if p in gates], "lr": gate_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
