"""Adapters as starting models: what of the base may be gone, and bases of the Hub that are not here yet."""

from __future__ import annotations

import json
import logging
import logging.handlers
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data.errors import UserError
from train.adapter import attach, quiet
from train.adapter_config import AdapterConfig
from train.adapter_files import finished, whole
from train.model import load_model
from train.model_config import ModelConfig
from train.tokenizer import ids, load_tokenizer
from train.weights import fingerprint

HUB = "someone/tiny"


def exported(folder: Path, base: str, auto: str, *, origin: str | None = None, **changes: Any) -> Any:
    """Export an adapter on `base` that has learned something, as a run does; return the adapted model, in eval mode."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.manual_seed(1)
    builder = getattr(transformers, auto)
    model, report = builder.from_pretrained(base, dtype=torch.float64, output_loading_info=True, **changes)
    new = sorted(report["missing_keys"])
    settings = AdapterConfig(rank=2)
    adapted = attach(model, settings, new, 65, 0, SimpleNamespace(path=origin or base, revision=None))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    export, state = finished(adapted, adapted.state_dict(), settings, str(fingerprint(base)))
    export.save_pretrained(folder, state_dict=state)
    return adapted.eval()


def without(file: Path, *names: str) -> None:
    """Take tensors out of a file of safetensors."""
    from safetensors.torch import load_file, save_file

    kept = load_file(file)
    for name in names:
        del kept[name]
    save_file(kept, file, metadata={"format": "pt"})


def vectors(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([[2, 9, 30, 3]]))[0]


def test_of_tied_tensors_one_name_is_enough(tiny_model: str, tmp_path: Path) -> None:
    """BERT's bias over the vocabulary has two names, and is saved under one. With neither, it is missed."""
    import torch
    from transformers import AutoModelForMaskedLM

    folder = tmp_path / "adapter"
    expected = vectors(exported(folder, tiny_model, "AutoModelForMaskedLM"))
    with whole(str(folder), None, torch.float64, None) as place:
        model = AutoModelForMaskedLM.from_pretrained(place, dtype=torch.float64)
    assert torch.allclose(vectors(model), expected, atol=1e-12)
    without(folder / "adapter_model.safetensors", "base_model.model.cls.predictions.bias")
    with pytest.raises(UserError, match=r"neither the base nor the adapter has cls\.predictions\.bias"):
        whole(str(folder), None, torch.float64, None).__enter__()


def test_a_model_without_head_may_lack_its_pooler(tiny_model: str, tmp_path: Path) -> None:
    """What no vector depends on does not matter, and is not made up: a classifier of it would take it for learned."""
    import torch
    from safetensors import safe_open
    from transformers import AutoModel

    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    without(base / "model.safetensors", "pooler.dense.weight", "pooler.dense.bias")
    folder = tmp_path / "adapter"
    expected = vectors(exported(folder, str(base), "AutoModel", add_pooling_layer=False))
    with whole(str(folder), None, torch.float64, None) as place:
        with safe_open(Path(place) / "model.safetensors", "pt") as stored:
            assert not [name for name in stored.keys() if "pooler" in name]  # noqa: SIM118  # no mapping
        model = AutoModel.from_pretrained(place, dtype=torch.float64, add_pooling_layer=False)
    assert torch.allclose(vectors(model), expected, atol=1e-12)
    without(base / "model.safetensors", "encoder.layer.1.output.dense.bias")
    note = json.loads((folder / "lockstep.json").read_text())
    note["base"]["sha256"] = fingerprint(str(base))
    (folder / "lockstep.json").write_text(json.dumps(note))
    with pytest.raises(UserError, match=r"neither the base nor the adapter has encoder\.layer\.1\.output\.dense\.bias"):
        whole(str(folder), None, torch.float64, None).__enter__()


def test_a_base_of_the_hub_is_fetched_and_then_checked(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the token and revision; the commit that was checked is the one that is loaded."""
    import huggingface_hub
    import torch
    from transformers import AutoModelForSequenceClassification

    folder, asked = tmp_path / "adapter", []
    expected = vectors(exported(folder, tiny_model, "AutoModelForSequenceClassification", origin=HUB))
    there = tmp_path / "hub" / "models--someone--tiny"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def fetch(name: str, *, revision: str | None, token: str | None, allow_patterns: list[str]) -> str:
        assert "model.safetensors" in allow_patterns
        asked.append((name, revision, token))
        commit = there / "snapshots" / ("a" * 40)
        shutil.copytree(tiny_model, commit)
        (there / "refs").mkdir()
        (there / "refs" / "main").write_text("a" * 40)
        return str(commit)

    with pytest.raises(
        UserError, match=r"someone/tiny, which is not there .*neither in the Hub's cache nor reachable: "
    ):
        whole(str(folder), None, torch.float64, "secret").__enter__()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    for _ in range(2):  # what the cache has is not fetched again
        with whole(str(folder), None, torch.float64, "secret") as place:
            model = AutoModelForSequenceClassification.from_pretrained(place, dtype=torch.float64)
        assert torch.allclose(vectors(model), expected, atol=1e-12)
    assert asked == [(HUB, None, "secret")]
    note = json.loads((folder / "lockstep.json").read_text())
    note["base"]["sha256"] = "0" * 64
    (folder / "lockstep.json").write_text(json.dumps(note))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: asked.append("again"))
    with pytest.raises(UserError, match="whose weights have changed"):
        whole(str(folder), None, torch.float64, "secret").__enter__()
    assert asked[-1] == "again"


def test_added_tokens_are_no_reason_for_a_warning(tiny_model: str, tmp_path: Path) -> None:
    """The config beside an adapter is as large as its base: that the new tokens are beyond it is as it should be."""
    import torch
    import transformers
    from transformers.utils import logging as said

    folder, heard = tmp_path / "adapter", logging.handlers.BufferingHandler(10_000)
    with quiet():
        exported(folder, tiny_model, "AutoModelForSequenceClassification")
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, "eos_token_id": 65}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(folder)
    said.warning_once.cache_clear()
    root, level = logging.getLogger("transformers"), transformers.logging.get_verbosity()  # type: ignore[no-untyped-call]
    transformers.logging.set_verbosity_warning()  # type: ignore[no-untyped-call]
    root.addHandler(heard)
    try:
        settings = ModelConfig(path=str(folder))
        found, known = load_tokenizer(settings, (), tmp_path, None)
        name = "AutoModelForSequenceClassification"
        load_model(settings, name, {}, found, known=known, dtype=torch.float64, seed=0, token=None)
    finally:
        root.removeHandler(heard)
        transformers.logging.set_verbosity(level)  # type: ignore[no-untyped-call]
    assert ids(found) == 66
    assert [record.getMessage() for record in heard.buffer] == []
