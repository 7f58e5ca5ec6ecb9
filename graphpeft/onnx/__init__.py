"""The ONNX side of an export: translation, passes over the graph, the census of its slots, files."""

from graphpeft.onnx.census import attach_defaults, census, used
from graphpeft.onnx.files import annotate, opset, save, write_adapter
from graphpeft.onnx.gemm import fuse_sums
from graphpeft.onnx.quantize import ROUNDED, Bits, quantize, rounded
from graphpeft.onnx.rows import gate_rows
from graphpeft.onnx.runtimes import oldest
from graphpeft.onnx.share import share
from graphpeft.onnx.tags import tag
from graphpeft.onnx.translate import DEFAULT_OPSET, LOWEST_OPSET, translate

__all__ = [
    "DEFAULT_OPSET", "LOWEST_OPSET", "ROUNDED", "Bits", "annotate", "attach_defaults", "census", "fuse_sums", "gate_rows",
    "oldest", "opset", "quantize", "rounded", "save", "share", "tag", "translate", "used", "write_adapter",
]  # fmt: skip
