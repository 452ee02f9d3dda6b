"""The batches to come, made and sent to a GPU while it computes those before."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from queue import Empty, Full, Queue
from typing import Any

import torch

from data.batches import Batch, Batches, Feed
from train import documents
from train.memory import is_lacking
from train.padding_free import COUNT

DEPTH = 2
"""Batches that wait: one would do if all took equally long to make."""

Numbered = tuple[int, Batch]


def prefetch(batches: Feed, numbered: Iterator[Numbered], device: torch.device) -> Iterator[Numbered]:
    """Return what `numbered` yields, for a GPU of NVIDIA sent to it; made ahead too, where `batches` are memory-mapped.

    A stream's processes talk to each other, which only one thread can do; and a CPU has no core to spare.
    """
    if device.type != "cuda":
        return numbered
    return _ahead(batches, numbered, device) if isinstance(batches, Batches) else _at_once(numbered, device)


def _at_once(numbered: Iterator[Numbered], device: torch.device) -> Iterator[Numbered]:
    """Yield what `numbered` yields, on its way to `device`: it is made when it is asked for."""
    for number, batch in numbered:
        yield number, _all_sent(batch, device)[0]


def _ahead(batches: Batches, numbered: Iterator[Numbered], device: torch.device) -> Iterator[Numbered]:
    """Yield what `numbered` yields, its tensors on `device`: a thread makes and copies them, on a stream of its own.

    `batches` is what cuts them: a batch that was made before the memory turned out too small is cut again. Nothing else
    depends on when a batch is made, and nothing that it is made from on what is computed. The copies are from pinned
    memory: from any other the host would wait until all that was asked of the GPU before is done.
    """
    queue: Queue[Any] = Queue(DEPTH)
    over = threading.Event()
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    thread = threading.Thread(target=_fill, args=(queue, over, batches, numbered, device, stream), daemon=True)
    thread.start()
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            (number, batch), cuts, copied = item
            if cuts != len(batches.smaller):
                batch = batch.recut()
            elif copied is not None:
                _take_over(batch, copied, device)
            yield number, batch
    finally:
        over.set()
        with suppress(Empty):
            while True:
                queue.get_nowait()
        thread.join()


def _fill(
    queue: Queue[Any], over: threading.Event, batches: Batches, numbered: Iterator[Numbered], device: Any, stream: Any
) -> None:
    """Put batches into the queue until there are no more, or nobody wants them; and None, or what went wrong."""
    last: BaseException | None = None
    try:
        torch.cuda.set_device(stream.device)  # a thread begins with the first GPU, and would leave a context there
        while not over.is_set():
            cuts = len(batches.smaller)  # before it is cut, which may change meanwhile
            found = next(numbered, None)
            if found is None:
                break
            number, batch = found
            with torch.cuda.stream(stream):
                batch, there = _all_sent(batch, device)
            copied = stream.record_event() if there else None
            if not _put(queue, ((number, batch), cuts, copied), over):
                return
    except BaseException as error:  # it is the other thread's to raise
        last = error
    _put(queue, last, over)


def _put(queue: Queue[Any], item: Any, over: threading.Event) -> bool:
    while not over.is_set():
        with suppress(Full):
            queue.put(item, timeout=0.1)
            return True
    return False


def _all_sent(batch: Batch, device: torch.device) -> tuple[Batch, bool]:
    """Return a batch on its way to the device, and True; or as it is, and False, where there is no memory for it: the
    update sends it then, and knows what to do."""
    try:
        return replace(batch, parts=[replace(part, tensors=sent(part.tensors, device)) for part in batch.parts]), True
    except RuntimeError as error:
        if not is_lacking(error):
            raise
        return batch, False


def sent(tensors: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Return tensors on their way to a GPU of NVIDIA, from pinned memory, so that nothing is waited for."""
    sent = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
    if "attention_mask" in sent:
        setattr(sent["attention_mask"], COUNT, int(tensors["attention_mask"].sum()))
    if "pieces" in sent:
        longest = documents.longest(tensors["pieces"], tensors["input_ids"].shape[1])
        setattr(sent["pieces"], documents.LONGEST, longest)
    return sent


def _take_over(batch: Batch, copied: Any, device: torch.device) -> None:
    """Let what is asked of the GPU from here on wait for the copies, and their memory for all that reads them."""
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for part in batch.parts:
        for tensor in part.tensors.values():
            tensor.record_stream(current)
