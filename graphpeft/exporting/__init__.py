"""Export a model to ONNX: as functions of named tensors, with slots for adapters, traced, and checked against PyTorch."""
