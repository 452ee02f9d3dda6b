"""Count what DDP sends: the bytes of gradients that each update reduces over all processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from train import update


@contextmanager
def counted(file: Path) -> Iterator[None]:
    """While this lasts, append [number, micro-batches, bytes, settings of DDP] of every update to `file`, on the
    main process."""
    from torch import Tensor
    from torch.distributed import GradBucket
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.futures import Future
    from torch.nn.parallel import DistributedDataParallel

    sent, how = [0], dict[str, bool]()
    begin, real = DistributedDataParallel.__init__, update.Learner.update

    def reduce(group: Any, bucket: Any) -> Any:
        sent[0] += bucket.buffer().nbytes
        return allreduce_hook(group, bucket)

    # DDP compares annotations with the classes themselves, and here they would be strings
    reduce.__annotations__ = {"bucket": GradBucket, "return": Future[Tensor]}

    def hooked(self: Any, *arguments: Any, **settings: Any) -> None:
        begin(self, *arguments, **settings)
        self.register_comm_hook(None, reduce)
        how.update({name: getattr(self, name) for name in ("static_graph", "gradient_as_bucket_view")})

    def noted(self: update.Learner, number: int, batch: Any) -> update.Report:
        sent[0] = 0
        report = real(self, number, batch)
        if self.accelerator.is_main_process:
            with file.open("a") as stream:
                stream.write(json.dumps([number, len(batch.parts), sent[0], how]) + "\n")
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistributedDataParallel, "__init__", hooked)
        patch.setattr(update.Learner, "update", noted)
        yield
