"""On a real GPU: what an update computes by ways that are there only, and that it never waits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import figures
from tests.every_task._runs import TASKS, UPDATES, Build, builder
from tests.train.test_documents import PIECES, WIDTH, build, rows
from tests.worker import carry_out
from train import chunked_loss, documents, update
from train.tasks import _packed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"hidden_size": 64}),
        ("qwen3", {"head_dim": 16}),
        ("mistral", {"sliding_window": 3, "head_dim": 16}),
        ("llama", {"hidden_size": 64, "num_key_value_heads": 4}),
    ],
)
def test_attention_by_documents(kind: str, settings: dict[str, Any]) -> None:
    """As with masks: in bf16, within its rounding; of tokens and gradients."""
    model = build(kind, **settings).float().cuda()
    given = {name: tensor.cuda() for name, tensor in rows().items()}
    real = (torch.arange(WIDTH)[None] < PIECES.sum(1)[:, None]).cuda()

    def learned() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16), documents.known(PIECES.cuda()):
            logits = model(**given, use_cache=False).logits[real].float()
        logits.square().mean().backward()
        return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected, slopes = learned()
    with torch.autocast("cuda", torch.bfloat16):
        assert documents.enable(model)
        _packed.check(model, isolated=True)
    found, others = learned()
    assert (found - expected).norm() <= 2e-2 * expected.norm()
    for name, slope in slopes.items():
        assert (others[name] - slope).norm() <= 3e-2 * slope.norm(), name


@pytest.fixture
def make(tmp_path: Path, tiny_models: dict[str, str]) -> Build:
    return builder(tmp_path, tiny_models)


def test_output_layer() -> None:
    """Sums of products in half precision are made without rounding in between: closer than one product."""
    torch.manual_seed(0)
    one, other = (torch.randn(300, size, device="cuda", dtype=torch.bfloat16) for size in (64, 32))
    total = torch.zeros(64, 32, device="cuda")
    for part in (slice(0, 100), slice(100, 300)):
        chunked_loss._add_product(total, one[part], other[part])
    exact = one.double().T @ other.double()
    assert (total - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize(
    ("name", "streaming"), [*((name, False) for name in TASKS), ("causal_lm", True), ("masked_lm", True)]
)
def test_no_update_waits(name: str, streaming: bool, make: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the end of the second to the beginning of the last, with all that comes between updates."""
    real: Callable[..., Any] = update.Learner.update

    def watched(self: update.Learner, number: int, batch: Any) -> update.Report:
        if number == UPDATES:
            torch.cuda.set_sync_debug_mode("default")
        report: update.Report = real(self, number, batch)
        if number == 2:
            torch.cuda.set_sync_debug_mode("error")
        return report

    monkeypatch.setattr(update.Learner, "update", watched)
    config = make(
        name, "run", precision="bf16", tracking={"log_every": 100}, evaluate={"every": 100}, checkpoint={"every": 100}
    )
    config["data"]["streaming"] = streaming
    try:
        assert carry_out(config) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_batches_made_ahead(make: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made ahead or not, they are the same; also where the memory does not suffice in the middle."""

    losses = []
    for ahead in (True, False):
        if not ahead:
            monkeypatch.setattr("train.run.prefetch", lambda batches, numbered, device: numbered)
        config = make("causal_lm", f"ahead-{ahead}", precision="fp64")
        real, short = update.Learner.update, [3]

        def scarcely(self: update.Learner, number: int, batch: Any, real: Any = real, short: Any = short) -> Any:
            healthy = self.loss

            def scarce(model: Any, tensors: Any) -> Any:
                if number in short and len(tensors["input_ids"]) > 16:
                    raise torch.OutOfMemoryError("as if")
                return healthy(model, tensors)

            self.loss = scarce
            try:
                return real(self, number, batch)
            finally:
                self.loss = healthy

        with monkeypatch.context() as patch:
            patch.setattr(update.Learner, "update", scarcely)
            assert carry_out(config) == 0
        assert json.loads((Path(config["output"]) / "memory.json").read_text())["halved"][0]["update"] == 3
        losses.append(figures(Path(config["output"]), "train/loss"))
    assert len(losses[0]) == UPDATES and losses[0] == losses[1]
