"""Looking at a model: sites, plans, graphs, differences, reports. Nothing here changes one."""
