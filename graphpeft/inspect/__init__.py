"""Inspect a model: sites, plans, graphs, differences and reports. Nothing here changes the model."""
