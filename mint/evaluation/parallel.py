"""Several processes, on one machine or more, sharing one evaluation.

`accelerate launch --multi_gpu --num_processes N -m mint evaluate ...` starts them, without GPUs too, and so do
`torchrun --nproc-per-node N -m mint evaluate ...` and MPI. `accelerate launch` without `--multi_gpu` starts a single process
on CPUs unless MPI is there, whatever N says. Without a launcher everything here is one process and costs nothing.
Knows nothing about cases.
"""

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

_WAIT = timedelta(days=30)
"""How long processes wait for the slowest: an evaluation may take days, and the default is 10 minutes."""
_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes they started: torch's and accelerate's, Open MPI, Intel MPI and MPICH, MVAPICH2
(those that accelerate knows)."""


@dataclass(frozen=True)
class Team:
    """Who this process is among those that share the work."""

    index: int = 0
    size: int = 1
    local: int = 0
    """Number of this process on its own machine."""

    @property
    def main(self) -> bool:
        """Whether this process writes the summary."""
        return self.index == 0

    def device(self, wanted: str) -> str:
        """The device for this process: `cuda` becomes `cuda:N`, one GPU a process; anything else stays as it is."""
        return f"cuda:{self.local}" if wanted == "cuda" and self.size > 1 else wanted

    def share(self, items: list) -> list:
        """Every size-th item, from this process's own: the shares of all processes together are all items, once."""
        return items[self.index :: self.size]

    def gather(self, items: list) -> list:
        """All processes' items, on all processes; blocks until everyone is here. Items must pickle."""
        if self.size == 1:
            return list(items)
        from accelerate.utils import gather_object

        return gather_object(list(items))

    def share_result(self, value: Any) -> Any:
        """The main process's value, on all processes."""
        if self.size == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return any(int(os.environ.get(name) or 1) > 1 for name in _SIZES)


def team() -> Team:
    """This process's place. Joins the others on first use, if a launcher started several."""
    if not launched():
        return Team()
    import torch
    from accelerate import PartialState

    wanted = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    # Processes exchange rows, not tensors: gloo does that with and without GPUs.
    cpu = wanted or not torch.cuda.is_available()
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    state = PartialState(cpu=cpu, backend="gloo", timeout=_WAIT)
    if not joined:
        # A thread of gloo's that is still at work while the interpreter shuts down aborts the process, after its last row.
        atexit.register(state.destroy_process_group)
    return Team(state.process_index, state.num_processes, state.local_process_index)
