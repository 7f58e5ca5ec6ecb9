"""One file per method; importing the package makes all of them known by name."""

from graphpeft.methods.base import Method, Option, Positive, Probability, Rank, Where, get, names, options
from graphpeft.methods.lora import LoRA
from graphpeft.methods.melora import MELoRA
from graphpeft.methods.olora import OLoRA
from graphpeft.methods.pissa import PiSSA
from graphpeft.methods.rlora import RLoRA
from graphpeft.methods.vera import VeRA

__all__ = [
    "LoRA",
    "MELoRA",
    "Method",
    "OLoRA",
    "Option",
    "PiSSA",
    "Positive",
    "Probability",
    "RLoRA",
    "Rank",
    "VeRA",
    "Where",
    "get",
    "names",
    "options",
]
