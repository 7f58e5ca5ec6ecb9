"""What one process does of a run that several share; process 0 writes what it found: `processes.py FOLDER KIND...`."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import runs
import sharded
import torch
import transformers as tf
from torch import distributed as dist

if __name__ == "__main__":
    tf.logging.disable_progress_bar()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder, place = Path(sys.argv[1]), (dist.get_world_size(), dist.get_rank())
    content = {"whole": runs.everything(*place), "sharded": sharded.everything(folder, sys.argv[2:], *place)}
    if dist.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(content))
    gc.collect()  # FSDP1 holds groups in cycles, and a group that outlives the end of the process aborts it
    dist.barrier()
    dist.destroy_process_group()
