"""One file per method; importing the package makes all of them known by name."""

from graphpeft.methods.base import Method, Option, Positive, Probability, Rank, Where, get, names, options
from graphpeft.methods.lora import LoRA
from graphpeft.methods.olora import OLoRA
from graphpeft.methods.pissa import PiSSA
from graphpeft.methods.rlora import RLoRA

__all__ = [
    "LoRA",
    "Method",
    "OLoRA",
    "Option",
    "PiSSA",
    "Positive",
    "Probability",
    "RLoRA",
    "Rank",
    "Where",
    "get",
    "names",
    "options",
]
