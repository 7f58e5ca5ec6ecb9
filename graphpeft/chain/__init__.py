"""WHAT an adapter is: a chain of linear factors."""

from graphpeft.chain.anchored import Anchored
from graphpeft.chain.bank import Bank, Projection
from graphpeft.chain.blockdiag import BlockDiag, MixedBlocks
from graphpeft.chain.chain import Chain
from graphpeft.chain.decompose import qr, svd
from graphpeft.chain.factor import Factor, Scatter
from graphpeft.chain.factors import Dense, Diag, Weighted
from graphpeft.chain.gates import RankGate
from graphpeft.chain.hadamard import hadamard_factors, hadamard_matrix, hadamard_order
from graphpeft.chain.inits import Init, constant, kaiming, normal, zeros
from graphpeft.chain.ladder import WIDTHS, Coded, Ladder, Observed, Rounded
from graphpeft.chain.noise import Noise
from graphpeft.chain.reweight import Magnitude, Reweight, RoundedBase
from graphpeft.chain.srht import SRHT, AdjointSRHT
from graphpeft.chain.stack import Stack
from graphpeft.chain.transform import Transform

__all__ = [
    "SRHT",
    "WIDTHS",
    "AdjointSRHT",
    "Anchored",
    "Bank",
    "BlockDiag",
    "Chain",
    "Coded",
    "Dense",
    "Diag",
    "Factor",
    "Init",
    "Ladder",
    "Magnitude",
    "MixedBlocks",
    "Noise",
    "Observed",
    "Projection",
    "RankGate",
    "Reweight",
    "Rounded",
    "RoundedBase",
    "Scatter",
    "Stack",
    "Transform",
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
