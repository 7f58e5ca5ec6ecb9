"""Exported folders, and ONNX Runtime on them: what is in a folder, sessions, their adapters, and text."""
