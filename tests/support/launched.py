"""What `accelerate launch` starts: the losses of a run that its processes share, printed by the first."""

import os

from trainers import accelerated, pair

if __name__ == "__main__":
    losses = accelerated(pair()[0])
    assert int(os.environ["WORLD_SIZE"]) == 2
    if os.environ["RANK"] == "0":
        print(*losses)
