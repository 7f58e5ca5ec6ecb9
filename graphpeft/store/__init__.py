"""Adapter files: our own, those of PEFT, and checkpoints on disk."""
