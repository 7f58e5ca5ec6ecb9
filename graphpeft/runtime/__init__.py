"""Exported folders and ONNX Runtime: the folder's files, sessions with adapters, and text generation, without torch."""
