"""The processes of one distributed run, joined by Hugging Face Accelerate: data-parallel over images.

Networks, optimiser, controller and generators are the same in all processes. Each one takes its part of every batch.
Sums over the whole batch are sums over all processes, so several processes make the update that one process would make.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokengame.errors import TokenGameError, first_line

ADVICE = "start them with accelerate launch or torchrun, or unset WORLD_SIZE"


@dataclass(frozen=True)
class Processes:
    """How many processes there are and which one this is; alone by default."""

    size: int = 1
    rank: int = 0
    accelerator: Any = None
    """`accelerate.Accelerator`, where there are several"""

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise over all processes."""
        return values if self.size == 1 else self.accelerator.reduce(values, "sum")

    def share(self, number: int, device: torch.device) -> Tensor | float:
        """`number` divided by its sum over all processes."""
        return 1.0 if self.size == 1 else number / self.sum(torch.tensor(float(number), device=device)).clamp(min=1)

    def any(self, flag: bool) -> bool:
        """Whether it is true in some process."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag), device=self.accelerator.device)))

    def mean(self, metrics: dict[str, float]) -> dict[str, float]:
        """The mean over the processes of each value; all have the same names."""
        if self.size == 1:
            return metrics
        values = torch.tensor([metrics[name] for name in sorted(metrics)], device=self.accelerator.device)
        return dict(zip(sorted(metrics), (self.sum(values) / self.size).tolist(), strict=True))

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes, in one message."""
        if self.size == 1:
            return
        used = [p for p in parameters if p.grad is not None]  # the same in all: they run the same network
        flat = self.sum(torch.cat([p.grad.flatten() for p in used if p.grad is not None]))
        for parameter, summed in zip(used, flat.split([p.numel() for p in used]), strict=True):
            parameter.grad = summed.view_as(parameter)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in order."""
        if self.size == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def wait(self) -> None:
        """Block until all processes have reached this call."""
        if self.size > 1:
            self.accelerator.wait_for_everyone()

    def shutdown(self) -> None:
        """End the process group; the last call of a run."""
        if self.size > 1:
            self.accelerator.end_training()

    def local_batch(self, batch_size: int) -> int:
        """How many images of a batch this process takes.

        Raises:
            TokenGameError: the batch cannot be shared evenly.
        """
        if batch_size % self.size:
            raise TokenGameError(f"{batch_size} images a batch cannot be shared evenly by {self.size} processes")
        return batch_size // self.size


def join_processes(device: str) -> Processes:
    """The processes that `accelerate launch` (or torchrun) started with this one; alone without a launcher.

    Raises:
        TokenGameError: what a launcher sets in the environment is not a number, or is not complete; or Accelerate is
            not installed.
    """
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        if not os.environ.get(name, "0").isdecimal():
            raise TokenGameError(f"{name} in the environment must be a number, not {os.environ[name]!r}; {ADVICE}")
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Processes()
    try:
        from accelerate import Accelerator
    except ImportError:
        raise TokenGameError("several processes are joined by Accelerate: pip install 'tokengame[train]'") from None
    try:
        accelerator = Accelerator(cpu=device == "cpu")
    except (ValueError, RuntimeError) as error:
        raise TokenGameError(f"the processes cannot join ({first_line(error)}); {ADVICE}") from None
    return Processes(accelerator.num_processes, accelerator.process_index, accelerator)


def device_of(processes: Processes, device: str) -> str:
    """The device of this process: `device`, or where the launcher put it if that only says which kind."""
    return str(processes.accelerator.device) if processes.size > 1 and device == "cuda" else device
