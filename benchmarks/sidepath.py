"""What an adapter's side path costs beside the frozen layer it adapts, forward and backward, at d = 768 and 4096.

`python benchmarks/sidepath.py` prints process CPU time on one thread for 512 tokens in float32, medians over rounds, and
ratios to the frozen layer. Every round times each contender once, in turn. A side path is timed as y + ΔW x on its own;
DoRA, which looks at the layer's weight and output, and what PEFT does are the time of the whole adapted layer less that of
the frozen one, measured in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import peft
import torch
from torch import Tensor, nn

import graphpeft as gp
from graphpeft.ir.site import Site
from graphpeft.methods import Method
from graphpeft.rules.rule import parse

TOKENS = 512
PATHS = ["lora(r=8)", "vera(r=256)", "rlora(r=256)", "rlora(r=256, rows=uniform)", "melora(n=8, r=8)", "olora(r=8)"]
Step = Callable[[], None]


def step(compute: Callable[[Tensor], Tensor], d: int, backward: bool) -> Step:
    """One call of a layer; backward reaches its input, as inside a deep model, and whatever it trains."""
    x, gradient = torch.randn(TOKENS, d, requires_grad=backward), torch.randn(TOKENS, d)

    def run() -> None:
        if backward:
            compute(x).backward(gradient)
        else:
            with torch.no_grad():
                compute(x)

    return run


def side(method: Method, d: int) -> Callable[[Tensor], Tensor]:
    """y + ΔW x for a y that is there already."""
    chain = method.chain(Site("q", "q.weight", None, False, 0, (d, d)))
    chain.reset(0, "q")
    for parameter in chain.parameters():
        nn.init.normal_(parameter, std=0.1)
    y = torch.randn(TOKENS, d)
    return lambda x: chain.accumulate(y, x)


def contenders(d: int) -> dict[str, Callable[[Tensor], Tensor]]:
    frozen = nn.Linear(d, d).requires_grad_(False)
    sides = {name: side(parse(f"q:{name}")[0].method, d) for name in PATHS}
    dora = gp.apply(nn.Sequential(nn.Linear(d, d)), "path(0.weight):dora(r=8)", inputs=(torch.randn(2, d),))
    configs = {
        "vera(r=256) in PEFT": peft.VeraConfig(r=256, target_modules=["0"]),
        "dora(r=8) in PEFT": peft.LoraConfig(r=8, use_dora=True, target_modules=["0"]),
    }
    theirs = {n: peft.get_peft_model(nn.Sequential(nn.Linear(d, d)), c).base_model.model for n, c in configs.items()}
    return {"frozen layer": frozen, **sides, "dora(r=8)": dora, **theirs}


def measure(d: int, backward: bool, rounds: int) -> dict[str, list[float]]:
    steps = {name: step(compute, d, backward) for name, compute in contenders(d).items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):  # the first warms up
        for name, run in steps.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    for name in [name for name in times if name.startswith("dora") or "PEFT" in name]:
        times[name] = [t - f for t, f in zip(times[name], times["frozen layer"], strict=True)]
    return {name: taken[1:] for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for d in (768, 4096):
        for backward in (False, True):
            times = measure(d, backward, options.rounds)
            frozen = statistics.median(times["frozen layer"])
            print(f"d = {d}, {'forward and backward' if backward else 'forward'}")
            for name, taken in times.items():
                typical = statistics.median(taken)
                print(f"  {name:<28} {1e3 * typical:>8.2f} ms {typical / frozen:>7.3f} of the frozen layer")


if __name__ == "__main__":
    main()
