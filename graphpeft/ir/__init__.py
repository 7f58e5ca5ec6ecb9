"""What the rooms hand each other: sites, captured programs, and how the weight of a site is read."""
