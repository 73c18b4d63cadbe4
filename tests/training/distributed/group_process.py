"""One process of several: runs scenarios, one after the other, and keeps what each of them came to.

python group_process.py DIRECTORY SCENARIO ...     with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set
"""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist


def main() -> None:
    directory, names = Path(sys.argv[1]), sys.argv[2:]
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import group_scenarios

    torch.set_num_threads(1)
    # A run goes through all objects of imported libraries once, half of its time here, unless they are frozen already.
    gc.collect()
    gc.freeze()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for name in names:
        started = time.perf_counter()
        try:
            result = group_scenarios.SCENARIOS[name](directory)
        except Exception as error:
            if "-v" in os.environ.get("GROUP_PROCESS", ""):
                traceback.print_exc()
            result = error
        kept = result if not isinstance(result, Exception) else RuntimeError(f"{type(result).__name__}: {result}")
        torch.save(kept, directory / f"{name}.{rank}.pt")
        if not rank:
            print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
        try:
            dist.barrier()
        except RuntimeError:  # another one has died, which was the scenario
            os._exit(0)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
