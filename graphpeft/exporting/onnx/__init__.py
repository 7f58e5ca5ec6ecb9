"""The ONNX side of an export: translation, graph passes, the slot census, and files."""

from graphpeft.exporting.onnx.census import census, used
from graphpeft.exporting.onnx.files import annotate, opset, save, write_adapter
from graphpeft.exporting.onnx.gemm import fuse_sums
from graphpeft.exporting.onnx.pipeline import Slots, listed, pipeline, quantizing, run
from graphpeft.exporting.onnx.quantize import ROUNDED, Bits, rounded
from graphpeft.exporting.onnx.rows import gate_rows
from graphpeft.exporting.onnx.runtimes import oldest
from graphpeft.exporting.onnx.share import share
from graphpeft.exporting.onnx.tags import tag
from graphpeft.exporting.onnx.translate import DEFAULT_OPSET, LOWEST_OPSET, translate

__all__ = [
    "DEFAULT_OPSET",
    "LOWEST_OPSET",
    "ROUNDED",
    "Bits",
    "Slots",
    "annotate",
    "census",
    "fuse_sums",
    "gate_rows",
    "listed",
    "oldest",
    "opset",
    "pipeline",
    "quantizing",
    "rounded",
    "run",
    "save",
    "share",
    "tag",
    "translate",
    "used",
    "write_adapter",
]
