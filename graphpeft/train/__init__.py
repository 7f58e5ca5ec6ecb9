"""What only training needs: penalties of the loss."""

from graphpeft.train.penalty import add_penalties, penalty

__all__ = ["add_penalties", "penalty"]
