"""Passes over a model: insert, initialize, activate, merge, save, export and others. Each registers where it is defined."""
