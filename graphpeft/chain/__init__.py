"""The algebra of adapters: an adapter is a chain of linear factors."""

import warnings
from typing import Any

from graphpeft.chain.blockdiag import BlockDiag, MixedBlocks
from graphpeft.chain.chain import Chain
from graphpeft.chain.decompose import qr, svd
from graphpeft.chain.delta_from_init import DeltaFromInit
from graphpeft.chain.factor import Factor, Scatter
from graphpeft.chain.factors import Dense, Diag, Weighted
from graphpeft.chain.gates import RankGate
from graphpeft.chain.hadamard import hadamard_factors, hadamard_matrix, hadamard_order
from graphpeft.chain.inits import Init, constant, kaiming, normal, zeros
from graphpeft.chain.noise import Noise
from graphpeft.chain.quantizers import WIDTHS, ActivationQuantizer, FakeQuantizer, IntCodes, LearnedQuantizer
from graphpeft.chain.shared_projections import Projection, SharedProjections
from graphpeft.chain.srht import SRHT, AdjointSRHT
from graphpeft.chain.stack import Stack
from graphpeft.chain.transform import Transform
from graphpeft.chain.weight_rules import Magnitude, QuantizedBase, WeightRule

_RENAMED = {
    "Anchored": "DeltaFromInit",
    "Bank": "SharedProjections",
    "Coded": "IntCodes",
    "Ladder": "LearnedQuantizer",
    "Observed": "ActivationQuantizer",
    "Reweight": "WeightRule",
    "Rounded": "FakeQuantizer",
    "RoundedBase": "QuantizedBase",
}
"""Class names of version 0.1, which methods in other packages may still use."""


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"graphpeft.chain.{name} was renamed to {_RENAMED[name]}.", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]


__all__ = [
    "SRHT",
    "WIDTHS",
    "ActivationQuantizer",
    "AdjointSRHT",
    "BlockDiag",
    "Chain",
    "DeltaFromInit",
    "Dense",
    "Diag",
    "Factor",
    "FakeQuantizer",
    "Init",
    "IntCodes",
    "LearnedQuantizer",
    "Magnitude",
    "MixedBlocks",
    "Noise",
    "Projection",
    "QuantizedBase",
    "RankGate",
    "Scatter",
    "SharedProjections",
    "Stack",
    "Transform",
    "WeightRule",
    "Weighted",
    "constant",
    "hadamard_factors",
    "hadamard_matrix",
    "hadamard_order",
    "kaiming",
    "normal",
    "qr",
    "svd",
    "zeros",
]
