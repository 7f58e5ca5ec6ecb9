"""The data that the other packages exchange: sites, captured programs, and the weight of a site as a matrix."""
