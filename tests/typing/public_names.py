"""What type checkers see of the public names. `.ci/run` checks this file; nothing runs it.

With `warn_unused_ignores`, a line that should be an error and is none fails the check as well.
"""

from typing import assert_type

import torch

import graphpeft as gp


class Net(torch.nn.Module):
    def score(self) -> int:
        return 1


adapted = gp.apply(Net(), {"qv": gp.LoRA(r=4)})
assert_type(adapted, Net)
assert_type(adapted.score(), int)

planned: gp.Plan = gp.plan(adapted, "qv:lora")
entry: gp.Entry = planned.entries[0]
site: gp.Site = entry.site
rule: gp.Rule = planned.rules[0]
error: type[gp.GraphPeftError] = gp.RuleError

gp.plann(adapted, "qv:lora")  # type: ignore[attr-defined]
gp.LoRA(rank=4)  # type: ignore[call-arg]
