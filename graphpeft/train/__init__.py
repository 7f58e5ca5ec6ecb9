"""What only training needs: noise, penalties of the loss, and parameter groups."""

from graphpeft.train.groups import parameter_groups
from graphpeft.train.pac import PAC
from graphpeft.train.penalty import add_penalties, penalty

__all__ = ["PAC", "add_penalties", "parameter_groups", "penalty"]
