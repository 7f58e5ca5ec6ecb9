"""What an export makes of a model: functions of named tensors, opened for adapters, traced and checked."""
