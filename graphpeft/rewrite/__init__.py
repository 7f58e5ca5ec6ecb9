"""How the modules that use adapted weights are rewritten: adapters on them, their graphs, the record on the model."""
