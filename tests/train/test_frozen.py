"""Frozen weights in the precision of computation: nothing that is computed or exported differs in a single bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import figures
from tests.distributed import launch
from tests.every_task._runs import builder, records
from tests.strategies import environment
from tests.train.test_adapter import FROM, tiny
from tests.worker import carry_out
from train import frozen
from train.adapter import attach
from train.adapter_config import AdapterConfig

IDS = torch.arange(24).reshape(3, 8) % 50 + 5


def adapted(family: str, **settings: Any) -> Any:
    """Return an adapted model in training, whose adapters say something."""
    model = attach(tiny(family).train(), AdapterConfig(rank=2, **settings), [], 63, 0, FROM)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def loss(model: Any) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        found: torch.Tensor = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    return found


def held(model: Any, *, merges: bool = False) -> set[str]:
    """Hold what can be; return the names of weights that are held now."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    frozen.hold(model, lambda: loss(model), accelerator, "bf16", merges=merges)
    return {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}


class Casts(TorchDispatchMode):
    """Counts casts of parameters that do not learn, and looks which of their gradients are computed."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.weights = {each.data_ptr() for each in model.parameters() if not each.requires_grad}
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function == torch.ops.aten._to_copy.default and args[0].data_ptr() in self.weights:
            self.count += 1
        return function(*args, **(kwargs or {}))


def learned(model: Any) -> tuple[torch.Tensor, list[torch.Tensor], int, int]:
    """Return loss, gradients, casts of frozen weights, and the bytes that wait for the backward pass."""
    model.zero_grad()
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    torch.manual_seed(5)
    with Casts(model) as casts, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = loss(model)
        found.backward()
    assert all(each.grad is None for each in model.parameters() if not each.requires_grad)
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    own = sum(each.numel() * each.element_size() for each in model.parameters() if each.data_ptr() in saved)
    return found.detach(), gradients, casts.count, sum(saved.values()) - own


LINEAR = {"Llama": 15, "Qwen3": 14, "GPT2": 2 * 4, "T5": 2 * 5 + 6 * 9, "Bart": 2 * 6 + 2 * 10}
"""How many frozen layers each of them has: of Llama the output layer too, which has its own weights;
of T5 not those of which it asks the dtype."""


@pytest.mark.parametrize("family, dropout", [*((family, 0.0) for family in LINEAR), ("Qwen3", 0.1)])
def test_losses_and_gradients_are_the_same_bits(family: str, dropout: float) -> None:
    """With dropout, of weights that bf16 rounds; no cast is left, and less is kept for the backward pass."""
    model = adapted(family, dropout=dropout)
    expected, slopes, casts, kept = learned(model)
    names = held(model)
    assert len({name for name in names if name.endswith(".weight")}) == LINEAR[family] <= casts
    assert all("lora_" not in name and "embed" not in name and "norm" not in name for name in names)
    found, gradients, left, less = learned(model)
    assert torch.equal(found, expected)
    assert len(gradients) == len(slopes) > 0 and all(map(torch.equal, gradients, slopes))
    assert left == (0 if family == "Llama" else casts - len(names)) and less < kept
    assert "are held in bfloat16, which saves" in frozen.describe(model)


@pytest.mark.slow
def test_dora() -> None:
    """It measures its weights, in fp32. PEFT's own forward pass takes 25 s in bf16 on a CPU. Last run on 2026-11-26."""
    assert not any("base_layer" in name for name in held(adapted("Qwen3", kind="dora")))


def test_what_is_not_held() -> None:
    """A layer that is read otherwise too; weights whose cast changes the loss."""
    model = adapted("Qwen3")
    layer = model.get_base_model().model.layers[0].mlp
    real = layer.forward
    layer.forward = lambda given: real(given) + layer.gate_proj.weight.mean()
    names = held(model)
    assert len(names) == 13 and not any("layers.0.mlp.gate_proj" in name for name in names)
    model = adapted("Qwen3")
    layer = model.get_base_model().model.layers[0].mlp
    real = layer.forward
    layer.forward = lambda given: real(given) * layer.up_proj.weight.element_size()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert held(model) == set() and frozen.describe(model) == ""
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_an_adapter_is_merged_into_the_weights_as_they_were(family: str) -> None:
    """On a CPU those are held that bf16 does not round; elsewhere the host keeps what they were."""
    models = [adapted(family) for _ in range(3)]
    for model in models:
        for name, parameter in model.named_parameters():
            if "layers.0" in name or "h.0" in name:
                parameter.data = parameter.data.bfloat16().float()
    names = {name for name in held(models[1], merges=True) if name.endswith("weight")}  # biases begin as 0
    assert names and all("layers.0" in name or "h.0" in name for name in names)
    frozen.restore(models[1])
    fixed = [each for each in models[2].parameters() if not each.requires_grad]
    frozen._give_back(frozen._cast(fixed, torch.bfloat16, leave_rounded=False))
    expected, *others = (model.merge_and_unload().state_dict() for model in models)
    assert all(torch.equal(other[name], tensor) for other in others for name, tensor in expected.items())


@pytest.mark.parametrize("name, merge", [("causal_lm", False), ("causal_lm", True), ("seq2seq", False)])
def test_a_run_is_the_same_run(
    name: str, merge: bool, tmp_path: Path, tiny_models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, norms, evaluations, checkpoints, what is exported; texts too, which have the run's precision."""
    from transformers import AutoModelForCausalLM

    rounded = AutoModelForCausalLM.from_pretrained(tiny_models["gpt2"], dtype=torch.bfloat16).float()
    rounded.save_pretrained(tmp_path / "model")
    build, hold, outputs = builder(tmp_path, tiny_models), frozen.hold, []
    for how in ("plain", "held"):
        monkeypatch.setattr(frozen, "hold", (lambda *_, **__: None) if how == "plain" else hold)
        config = build(
            name, how, precision="bf16", adapter={"rank": 4, "dropout": 0.1, "merge": merge}, optim__lr=1e-2,
            optim__max_grad_norm=0.05, model__config={}, **({"model__path": str(tmp_path / "model")} if merge else {}),
        )  # fmt: skip
        if merge:
            config["model"]["tokenizer"] = tiny_models["gpt2"]
        assert carry_out(config) == 0
        outputs.append(Path(config["output"]))
    said = (outputs[1] / "logs" / "rank-0.log").read_text()
    assert "weights that do not learn are held in bfloat16" in said
    for figure in ("train/loss", "train/grad_norm", "validation/loss"):
        assert len(found := figures(outputs[1], figure)) >= 2 and found == figures(outputs[0], figure)
    exported = [{file.name: file.read_bytes() for file in (output / "model").iterdir()} for output in outputs]
    weights = [file for file in exported[0] if file.endswith(".safetensors")]
    assert weights and all(exported[0][file] == exported[1][file] for file in weights)
    assert len(records(outputs[1])) == len(records(outputs[0]))


@pytest.mark.whole_run
def test_on_two_processes(tmp_path: Path, tiny_models: dict[str, str]) -> None:
    """DDP holds them; FSDP2, which casts its shares itself, is left alone. Losses as on one process, in bf16."""
    build, settings = builder(tmp_path, tiny_models), {"precision": "bf16", "adapter": {"rank": 4}, "optim__lr": 1e-2}
    alone = build("causal_lm", "alone", **settings)
    assert carry_out(alone) == 0
    configs = {how: build("causal_lm", how, **settings) for how in ("ddp", "fsdp2")}
    launch([{"config": config, "strategy": environment(how)} for how, config in configs.items()], 2, tmp_path)
    expected = figures(Path(alone["output"]), "train/loss")
    for how, config in configs.items():
        assert figures(Path(config["output"]), "train/loss") == pytest.approx(expected, rel=2e-2)
        said = (Path(config["output"]) / "logs" / "rank-0.log").read_text()
        assert ("are held in bfloat16" in said) == (how == "ddp")


def test_the_backward_pass_ends_below_the_first_layer_that_learns() -> None:
    """Not for fp32 alone: nothing beneath requires a gradient, and no product makes one of a frozen weight."""
    model = adapted("Llama", target_modules=["layers.1.self_attn.q_proj"])
    layers, below = model.get_base_model().model.layers, []
    hooks = [layer.register_forward_hook(lambda *given: below.append(given[2].requires_grad)) for layer in layers]
    found = loss(model)
    assert below == [False, True]
    made: list[tuple[int, ...]] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                made.append(tuple(result.shape))
            return result

    with Products():
        found.backward()
    for hook in hooks:
        hook.remove()
    matrices = {tuple(each.shape) for each in model.parameters() if each.ndim == 2 and not each.requires_grad}
    assert made and not matrices.intersection({*made, *(shape[::-1] for shape in made)}), made
