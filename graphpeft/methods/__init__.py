"""One file per method; importing the package makes all of them known by name."""

from graphpeft.methods.base import Method, NotNegative, Option, Positive, Probability, Rank, Where, get, names, options
from graphpeft.methods.blora import BLoRA
from graphpeft.methods.dora import DoRA
from graphpeft.methods.lora import LoRA
from graphpeft.methods.melora import MELoRA
from graphpeft.methods.olora import OLoRA
from graphpeft.methods.pissa import PiSSA
from graphpeft.methods.rlora import RLoRA
from graphpeft.methods.vera import VeRA

__all__ = [
    "BLoRA",
    "DoRA",
    "LoRA",
    "MELoRA",
    "Method",
    "NotNegative",
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
