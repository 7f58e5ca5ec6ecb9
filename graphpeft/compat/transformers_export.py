"""transformers' own exporter, for models that plain `torch.export` refuses.

Vision towers that read images of several sizes in one row split it according to the *values* of an input. transformers
knows its models: it computes such inputs beforehand and replaces the splitting code during the export. The modules that
own the weights are called as usual, so the graph is right about them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.export import ExportedProgram


def known(model: nn.Module) -> bool:
    """Whether transformers made the model."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def export(model: nn.Module, kwargs: dict[str, Any]) -> ExportedProgram:
    """Export by `transformers.exporters`. Raises whatever it raises."""
    from transformers.exporters.configs import DynamoConfig
    from transformers.exporters.exporter_dynamo import DynamoExporter
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it prints a warning at every call
    held = {name: model.__dict__[name] for name in ("forward",) if name in model.__dict__}
    try:
        program, _ = DynamoExporter().export_program(model, dict(kwargs), DynamoConfig(dynamic=False))  # type: ignore[arg-type]
        return program
    finally:  # after a failure it leaves its own `forward` on the model
        logging.set_verbosity(verbosity)
        model.__dict__.pop("forward", None)
        model.__dict__.update(held)


@contextmanager
def translating() -> Iterator[dict[Any, Any]]:
    """Trace and translate to ONNX as transformers does; yields its translations of ATen operators.

    Among other things it replaces attention: a row masked at every key (padding on the left) gives zeros, as in torch's
    kernels, where ONNX Runtime would spread NaN.
    """
    from transformers.exporters.exporter_onnx import _ONNX_TRANSLATION_TABLE
    from transformers.exporters.utils import apply_patches

    with apply_patches("dynamo"), apply_patches("onnx"):
        yield _ONNX_TRANSLATION_TABLE
