"""Concat pooling: what it computes, that padding never matters, and that others can use what is exported."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from tests.conftest import WORDS, figures
from tests.distributed import ROOT, launch
from tests.worker import carry_out
from train.model import load_model
from train.model_config import ModelConfig

MakeConfig = Callable[..., dict[str, Any]]

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
ENDS = {"bos_token_id": 2, "eos_token_id": 3}
SIZES: dict[str, dict[str, Any]] = {
    "BertForMaskedLM": {**SMALL, "max_position_embeddings": 64},
    "RobertaForMaskedLM": {**SMALL, "max_position_embeddings": 66, "pad_token_id": 0, "type_vocab_size": 1},
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **ENDS},
    "LlamaForCausalLM": {**SMALL, "num_key_value_heads": 2, **ENDS},
    "MambaForCausalLM": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, **ENDS},
}  # fmt: skip
LAST = ("GPT2LMHeadModel", "LlamaForCausalLM", "MambaForCausalLM")
FAMILIES = ("BertForMaskedLM", "GPT2LMHeadModel", "MambaForCausalLM")
NO_DROPOUT = {
    "BertForMaskedLM": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "GPT2LMHeadModel": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "MambaForCausalLM": {},
}


@pytest.fixture(scope="module")
def pretrained(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return a function that gives a tiny language model of a class, as an earlier stage would have left it."""

    @cache
    def make(name: str) -> str:
        import torch
        import transformers

        folder = tmp_path_factory.mktemp(name)
        model = getattr(transformers, name)
        torch.manual_seed(1)
        model(model.config_class(vocab_size=len(WORDS) + 5, **SIZES[name])).save_pretrained(folder)
        for file in Path(tiny_model).glob("tokenizer*"):
            shutil.copy(file, folder)
        return str(folder)

    return make


def load(path: str, labels: int = 3, more: tuple[str, ...] = (), **settings: Any) -> tuple[Any, list[str]]:
    import torch
    from transformers import AutoTokenizer

    from train.concat_pooling import ConcatPoolingForSequenceClassification

    names = {"num_labels": labels, "id2label": {index: f"label {index}" for index in range(labels)}}
    tokenizer = AutoTokenizer.from_pretrained(path)
    known = len(tokenizer)
    tokenizer.add_tokens(list(more))
    model, new = load_model(
        ModelConfig(path=path, **settings), ConcatPoolingForSequenceClassification, names, tokenizer,
        known=known, dtype=torch.float64, seed=0, token=None,
    )  # fmt: skip
    return model.eval(), new


@pytest.mark.parametrize("name", SIZES)
def test_only_the_head_is_new_on_a_language_model(name: str, pretrained: Callable[..., str]) -> None:
    import torch
    import transformers

    model, new = load(pretrained(name))
    assert new == ["classifier.bias", "classifier.weight"]
    assert model.config.token == ("last" if name in LAST else "first")
    assert model.classifier.weight.dtype == torch.float64 and tuple(model.classifier.weight.shape) == (3, 96)
    assert 0.01 < model.classifier.weight.std() < 0.2 and not model.classifier.bias.any()
    before = dict(getattr(transformers, name).from_pretrained(pretrained(name)).base_model.named_parameters())
    after = dict(model.backbone.named_parameters())
    assert {key for key in before if not key.startswith("pooler.")} == set(after)
    assert all(torch.equal(before[key].double(), value) for key, value in after.items())
    again, _ = load(pretrained(name))
    assert torch.equal(again.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize("name", SIZES)
def test_it_is_the_formula(name: str, pretrained: Callable[..., str]) -> None:
    """Row by row, written out with the backbone's states of that row alone."""
    import torch

    model, _ = load(pretrained(name))
    ids = torch.randint(5, 65, (4, 9), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids).logits
    for row in range(4):
        states = model.backbone(input_ids=ids[row : row + 1]).last_hidden_state[0]
        one = states[-1] if name in LAST else states[0]
        pooled = torch.cat([one, torch.stack(list(states)).max(0).values, sum(states) / len(states)])
        expected = model.classifier.weight @ pooled + model.classifier.bias
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SIZES)
def test_padding_changes_neither_logits_nor_gradients(name: str, pretrained: Callable[..., str]) -> None:
    """On the right, on the left, in the middle; whatever token is written there.

    Mamba's code computes its norms and states in float32 whatever it is given: its gradients are no better than that.
    """
    import torch

    model, _ = load(pretrained(name))
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 65, (length,), generator=generator) for length in (1, 2, 7, 12)]
    labels = torch.tensor([0, 1, 2, 0])

    def judged(batches: list[dict[str, Any]]) -> tuple[Any, Any]:
        model.zero_grad()
        logits = torch.cat([model(**batch).logits for batch in batches])
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        return logits.detach(), torch.cat([weight.grad.flatten() for weight in model.parameters()])

    logits, gradients = judged([{"input_ids": row[None]} for row in rows])
    assert len({round(value, 6) for value in logits.flatten().tolist()}) == 12
    for side in ("right", "left", "middle"):
        for width, filler in ((12, 0), (15, 0), (20, 3)):
            ids, mask = torch.full((4, width), filler), torch.zeros(4, width, dtype=torch.long)
            for place, row in enumerate(rows):
                spread = sorted(torch.randperm(width, generator=generator)[: len(row)].tolist())
                at = {"right": range(len(row)), "left": range(width - len(row), width), "middle": spread}[side]
                ids[place, list(at)], mask[place, list(at)] = row, 1
            found = judged([{"input_ids": ids, "attention_mask": mask}])
            torch.testing.assert_close(found[0], logits, rtol=0, atol=1e-9)
            torch.testing.assert_close(found[1], gradients, rtol=0, atol=1e-9 if name != "MambaForCausalLM" else 1e-7)


def test_segments_move_with_their_tokens(pretrained: Callable[..., str]) -> None:
    import torch

    model, _ = load(pretrained("BertForMaskedLM"))
    ids, segments = torch.tensor([[2, 9, 3, 11, 3]]), torch.tensor([[0, 0, 0, 1, 1]])
    expected = model(input_ids=ids, token_type_ids=segments).logits
    assert not torch.allclose(expected, model(input_ids=ids).logits)
    left = {"input_ids": ids, "token_type_ids": segments, "attention_mask": torch.ones_like(ids)}
    left = {name: torch.nn.functional.pad(tensor, (3, 0)) for name, tensor in left.items()}
    torch.testing.assert_close(model(**left).logits, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "settings", "share"),
    [
        ("BertForMaskedLM", {}, 0.1),
        ("BertForMaskedLM", {"hidden_dropout_prob": 0.2}, 0.2),
        ("BertForMaskedLM", {"hidden_dropout_prob": 0.2, "classifier_dropout": 0.3}, 0.3),
        ("BertForMaskedLM", {"hidden_dropout_prob": 0.2, "classifier_dropout": 0.0}, 0.0),
        ("GPT2LMHeadModel", {"resid_pdrop": 0.4}, 0.4),
        ("MambaForCausalLM", {}, 0.0),
    ],
)
def test_dropout_is_the_models(
    name: str, settings: dict[str, Any], share: float, pretrained: Callable[..., str]
) -> None:
    model, _ = load(pretrained(name), config=settings)
    assert model.dropout.p == share


@pytest.mark.parametrize("name", SIZES)
def test_layers_and_embeddings_are_found_as_in_any_model(name: str, pretrained: Callable[..., str]) -> None:
    import torch

    from train.layers import depths

    model, new = load(pretrained(name), more=("<new>", "<newer>"))
    assert new == ["classifier.bias", "classifier.weight", "2 rows of the embedding"]
    table = model.get_input_embeddings().weight
    assert len(table) == len(WORDS) + 7 == model.config.get_text_config().vocab_size
    torch.testing.assert_close(table[-2:], table[:-2].mean(0).expand(2, -1), rtol=0, atol=1e-12)
    found = depths(model, lambda: model(input_ids=torch.tensor([[2, 7, 9, 3]])), new)
    assert found["classifier.weight"] == 0
    assert [found[key] for key, parameter in model.named_parameters() if parameter is table] == [3]
    assert sorted(set(found.values())) == [0, 1, 2, 3]


def test_a_new_backbone_is_drawn_whole() -> None:
    import torch
    from transformers import GPT2Config

    from train.concat_pooling import ConcatPoolingForSequenceClassification

    config = GPT2Config(vocab_size=65, **SIZES["GPT2LMHeadModel"], num_labels=4)
    model = ConcatPoolingForSequenceClassification.from_config(config)
    assert 0.01 < model.backbone.h[0].attn.c_attn.weight.std() < 0.03
    assert model.config.num_labels == 4 and model.config.text_config.num_labels == 2
    assert model(input_ids=torch.ones(2, 3, dtype=torch.long)).logits.shape == (2, 4)
    loss = model(input_ids=torch.ones(2, 3, dtype=torch.long), labels=torch.tensor([0, 3])).loss
    assert loss.shape == ()
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.config.get_text_config().vocab_size == 70 == len(model.backbone.wte.weight)


def test_what_cannot_have_it_is_told(tiny_model: str, tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(vocab_size=65, **sizes)).save_pretrained(tmp_path)
    for file in Path(tiny_model).glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    with pytest.raises(UserError, match="concat pooling is not for a t5, which is an encoder and a decoder"):
        load(str(tmp_path))


def config_of(name: str, make_config: MakeConfig, path: str, output: Path, **changes: Any) -> dict[str, Any]:
    settings = {"model__path": path, "model__config": NO_DROPOUT[name], "task__pooling": "concat"}
    return make_config(output=str(output), **{**settings, **changes})


@pytest.mark.whole_run
def test_neither_the_cut_nor_the_processes_matter(
    make_config: MakeConfig, pretrained: Callable[..., str], tmp_path: Path
) -> None:
    """For each family 32 rows at once, 5 at once, and 2 processes: the same losses."""
    shared = []
    for name in FAMILIES:
        for cut, size in {"whole": 32, "cut": 5, "shared": 32}.items():
            config = config_of(
                name,
                make_config,
                pretrained(name),
                tmp_path / f"{name}-{cut}",
                updates=5,
                optim__lr=5e-3,
                micro_batch_size=size,
            )
            if cut == "shared":
                shared.append({"config": config})
            else:
                assert carry_out(config) == 0
    launch(shared, 2, tmp_path)
    for name in FAMILIES:
        exact = 1e-9 if name != "MambaForCausalLM" else 1e-6
        for figure in ("train/loss", "validation/loss"):
            expected = figures(tmp_path / f"{name}-whole", figure)
            for cut in ("cut", "shared"):
                assert figures(tmp_path / f"{name}-{cut}", figure) == pytest.approx(expected, rel=exact)
        losses = figures(tmp_path / f"{name}-whole", "train/loss")
        assert len(losses) == 5 and losses[5] < 0.97 * losses[1], name


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stop_does_not_matter(
    name: str, make_config: MakeConfig, pretrained: Callable[..., str], tmp_path: Path
) -> None:
    """fp32, dropout on: equal to the last bit."""
    digests = []
    for place, stop in enumerate((None, 5)):
        config = config_of(
            name, make_config, pretrained(name), tmp_path / str(place), updates=8, precision="fp32", model__config={},
            micro_batch_size=11,
        )  # fmt: skip
        if stop:
            assert carry_out(config, stop_after=stop) == 0
            assert not (tmp_path / str(place) / "DONE").exists()
        assert carry_out(config) == 0
        digests.append(hashlib.sha256((tmp_path / str(place) / "model" / "model.safetensors").read_bytes()).hexdigest())
    assert digests[0] == digests[1]


FRESH = """
import json, sys
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
folders, texts = json.load(open("given.json"))
try:
    AutoModelForSequenceClassification.from_pretrained(folders[0])
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise AssertionError("another head, in silence")
found = []
for folder in folders:
    classify = pipeline("text-classification", model=folder, top_k=None, trust_remote_code=True)
    found.append([{score["label"]: score["score"] for score in scores} for scores in classify(texts, batch_size=7)])
    AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).save_pretrained("again")
    model = AutoModelForSequenceClassification.from_pretrained("again", trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    scores = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.softmax(1).tolist()
    found.append([{model.config.id2label[place]: score for place, score in enumerate(row)} for row in scores])
assert not any(name == "train" or name.startswith("train.") for name in sys.modules)
json.dump(found, open("found.json", "w"))
"""


@pytest.mark.whole_run
def test_the_exported_model_is_of_use_to_others(
    make_config: MakeConfig, pretrained: Callable[..., str], tmp_path: Path
) -> None:
    """In a fresh process elsewhere, told to trust the code: by pipeline, and saved again and padded left."""
    folders, expected = [], []
    for name in FAMILIES:
        config = config_of(name, make_config, pretrained(name), tmp_path / name, updates=3, precision="fp32")
        assert carry_out(config) == 0
        exported = tmp_path / name / "model"
        assert {file.suffix for file in exported.iterdir()} == {".json", ".md", ".py", ".safetensors"}
        card = (exported / "README.md").read_text()
        assert 'model="path/to/this/folder", trust_remote_code=True)' in card and "Read them first" in card
        assert pretrained(name) not in (exported / "config.json").read_text(), "no path of this machine leaves it"
        lines = (tmp_path / name / "predictions" / "validation.jsonl").read_text().splitlines()
        folders.append(str(exported))
        expected += 2 * [[json.loads(line)["scores"] for line in lines]]
    texts = [json.loads(line)["text"] for line in Path(config["data"]["validation"]).read_text().splitlines()]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "given.json").write_text(json.dumps([folders, texts]))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(elsewhere / "modules")
    done = subprocess.run(
        [sys.executable, "-c", FRESH], cwd=elsewhere, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for found, reference in zip(json.loads((elsewhere / "found.json").read_text()), expected, strict=True):
        assert len(found) == len(reference) == 41
        for scores, known in zip(found, reference, strict=True):
            assert scores == pytest.approx(known, abs=1e-5)


@pytest.mark.parametrize("pooling", ["concat", "model"])
def test_the_next_stage_starts_from_it_and_trusts_nothing(
    pooling: str, make_config: MakeConfig, pretrained: Callable[..., str], tmp_path: Path
) -> None:
    """What runs is our own code, whatever lies in the folder."""
    from train import ingredients
    from train.config import validate

    first = config_of("GPT2LMHeadModel", make_config, pretrained("GPT2LMHeadModel"), tmp_path / "first", updates=3)
    assert carry_out(first) == 0
    folder = tmp_path / "first" / "model"
    (folder / "concat_pooling.py").write_text("raise RuntimeError('run')")
    second = config_of(
        "GPT2LMHeadModel", make_config, str(folder), tmp_path / "second", updates=3, task__pooling=pooling,
        model__config={"resid_pdrop": 0.25, "attn_pdrop": 0.0},
    )  # fmt: skip
    found = ingredients.read(validate(second, "test"))
    assert found.new_parameters == [] and found.max_length == 64
    assert found.model.dropout.p == 0.25 == found.model.backbone.h[0].mlp.dropout.p
    assert carry_out(second, stop_after=2) == 0
    assert carry_out(second) == 0
    assert "raise" not in (tmp_path / "second" / "model" / "concat_pooling.py").read_text()[:500]
    with pytest.raises(UserError, match=r"no such key 'resid_pdrob'; did you mean 'resid_pdrop'"):
        carry_out({**second, "model": {"path": str(folder), "config": {"resid_pdrob": 1}}})


def test_the_file_stands_for_itself() -> None:
    tree = ast.parse((ROOT / "train" / "concat_pooling.py").read_text(encoding="utf-8"))
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in found} <= {"__future__", "typing", "torch", "transformers"}
