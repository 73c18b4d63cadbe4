"""Training in several processes, on one machine or more: torch.distributed's DDP and FSDP2, and the little around them.

`World` is what the loop asks; of one process, it does nothing. `Replicated` has the whole model in every process (DDP),
`Sharded` a part of every parameter (FSDP2).
"""

from __future__ import annotations

from .launch import open_world
from .world import PeerError, World

__all__ = ["PeerError", "World", "open_world"]
