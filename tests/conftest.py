"""One thread per worker and quiet libraries, for every test."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers

pytest_plugins = ["browser"]  # one browser for all tests of pages

torch.set_num_threads(1)
gc.set_threshold(20_000, 20, 50)  # millions of objects of libraries live on: looking through them often is slow
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
