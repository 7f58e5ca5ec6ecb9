"""graphpeft: adapters for PyTorch models, inserted the way a compiler would. The public names, and nothing else."""

from graphpeft.apply import apply, plan, sites, trainable
from graphpeft.capture import capture
from graphpeft.passes.activate import activate, disabled, remove
from graphpeft.passes.merge import merge, unmerge
from graphpeft.passes.verify import verify

__version__ = "0.1.0"

__all__ = ["activate", "apply", "capture", "disabled", "merge", "plan", "remove", "sites", "trainable", "unmerge", "verify"]
