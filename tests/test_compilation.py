"""torch.compile of the layers: the same run but for rounding, compiled a bounded number of times.

Most of it with a backend that leaves out the last and slow step, the compiler's: a graph is a graph. With the real one
where kernels matter: rounding, dropout, resumption.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import UserError
from tests.conftest import checkpoint, figures
from tests.distributed import launch
from tests.every_task._runs import Build, builder, same
from tests.strategies import environment
from tests.test_strategies import check
from tests.train.test_padding_free import learned, make
from tests.worker import carry_out
from train import compilation, padding_free, recomputation, varlen
from train.layers import stacks

pytestmark = pytest.mark.filterwarnings(
    "ignore:::torch", "ignore:The .grad attribute", "ignore:.*torch.jit"
)  # its compiler's own
QUICK = "aot_eager"
LENGTHS = [(2, 5), (1, 5), (4, 4), (8, 8), (3, 9), (16, 3), (1, 30), (7, 2), (30, 7), (5, 31), (9, 9)]
"""Rows and tokens; the first two are all that can make a difference."""
SLOW = pytest.mark.slow
T5 = [SLOW]
"""Layers of four kinds, some of which take a minute to trace on a busy machine."""


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, str]) -> Build:
    return builder(tmp_path_factory.mktemp("compiled"), tiny_models)


@pytest.fixture(autouse=True)
def uncompiled() -> None:
    """Forget what other tests have compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", QUICK)


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def losses(model: Any, *, masked: bool) -> list[float]:
    """Return the loss of each of LENGTHS, after a backward pass; half of the longest row padded away with `masked`."""
    found = []
    for number, (rows, tokens) in enumerate(LENGTHS):
        ids = torch.arange(rows * tokens).reshape(rows, tokens) % 50 + 5
        mask = torch.ones_like(ids)
        if masked and tokens > 1:
            mask[0, (tokens + 1) // 2 :] = 0
        torch.manual_seed(number)
        loss = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
        loss.backward()
        found.append(loss.item())
        LEARNED.append(graphs())
    return found


LEARNED: list[int] = []


@pytest.mark.whole_run
@pytest.mark.parametrize("masked", [True, pytest.param(False, marks=SLOW)])
@pytest.mark.parametrize("kind", ["tiny_model", "tiny_decoder", pytest.param("tiny_encoder_decoder", marks=T5)])
def test_the_number_of_graphs_does_not_grow_with_lengths(
    kind: str, masked: bool, request: pytest.FixtureRequest, quick: None
) -> None:
    from transformers import BertForMaskedLM, GPT2LMHeadModel, T5ForConditionalGeneration

    kinds: dict[str, Any] = {"tiny_model": BertForMaskedLM, "tiny_decoder": GPT2LMHeadModel}
    model = kinds.get(kind, T5ForConditionalGeneration).from_pretrained(request.getfixturevalue(kind)).train()
    expected, names = losses(model, masked=masked), list(model.state_dict())
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    compilation.compile_layers(model)
    assert compilation.describe(model) in ("2 BertLayer", "2 GPT2Block", "4 T5Block")
    LEARNED.clear()
    assert losses(model, masked=masked) == pytest.approx(expected, rel=1e-5)
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(found, gradients, strict=True))
    assert LEARNED[0] >= 1
    assert LEARNED[-1] == LEARNED[1], "lengths that are new have been compiled for"
    assert list(model.state_dict()) == names
    before = graphs()
    with torch.no_grad(), compilation.eager():
        model(input_ids=torch.full((3, 11), 7), labels=torch.full((3, 11), 7))
    assert graphs() == before


@pytest.mark.whole_run
@pytest.mark.parametrize(
    "name", [pytest.param("text_classification", marks=SLOW), "causal_lm", pytest.param("seq2seq", marks=T5)]
)
def test_a_run_is_the_same_run(name: str, build: Build, quick: None) -> None:
    """Its evaluations and the texts that it writes too, also if it was begun without; float64, 1e-9."""
    plain = build(name, "plain", checkpoint={"every": 4})
    compiled = {**plain, "output": plain["output"] + "-compiled", "compile": True}
    assert carry_out(plain) == 0
    assert graphs() == 0
    assert carry_out({**compiled, "compile": False}, stop_after=3) == 0
    assert carry_out(compiled) == 0
    assert 1 <= graphs() <= 24
    same(Path(compiled["output"]), Path(plain["output"]))
    check(Path(compiled["output"]), 1, Path(plain["output"]))
    weights, optimizer = (checkpoint(Path(config["output"]), 8) for config in (plain, compiled))
    assert weights[0].keys() == optimizer[0].keys() and weights[1].keys() == optimizer[1].keys()
    said = (Path(compiled["output"]) / "logs" / "rank-0.log").read_text()
    assert said.count(" compile ") == 1 and "texts are written without" in said


LORA = {"adapter": {"rank": 4}}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("text_classification", "fsdp2", {}), ("causal_lm", "fsdp2", LORA), ("text_classification", "ddp", LORA),
    ("causal_lm", "ddp", {}), ("causal_lm", "fsdp2", {"activation_checkpointing": True}),
    ("text_classification", "ddp", {"activation_checkpointing": True}),
]  # fmt: skip


@pytest.mark.slow
def test_three_processes_compute_compiled_layers_twice(build: Build, tmp_path: Path) -> None:
    """DDP of more than two arranges its buckets first, by a pass that is not compiled. Last run on 2026-11-28."""
    alone = build("causal_lm", "alone-three", micro_batch_size=32)
    assert carry_out(alone) == 0
    config = build("causal_lm", "three", compile=True, activation_checkpointing=True)
    launch([{"config": config, "strategy": environment("ddp"), "backend": QUICK}], 3, tmp_path)
    check(Path(config["output"]), 3, Path(alone["output"]))


@pytest.mark.slow
@pytest.mark.parametrize("cases", [CASES[:1], CASES[1:]])
def test_processes_and_strategies(cases: list[Any], build: Build, tmp_path: Path) -> None:
    """DDP and FSDP2, the whole model and LoRA, an encoder and a decoder: as alone and not compiled, float64, 1e-9.

    Layers that are computed twice too. The whole table was last run on 2026-11-28.
    """
    jobs, pairs = [], []
    for number, (name, how, settings) in enumerate(cases):
        alone = build(name, f"alone-{number}-{len(cases)}", micro_batch_size=32, **settings)
        assert carry_out(alone) == 0
        config = build(name, f"two-{number}-{len(cases)}", compile=True, **settings)
        jobs.append({"config": config, "strategy": environment(how), "backend": QUICK})
        pairs.append((Path(config["output"]), Path(alone["output"])))
    launch(jobs, 2, tmp_path)
    for output, alone in pairs:
        check(output, 2, alone)
        assert " compile 2 " in (output / "logs" / "rank-0.log").read_text()


@pytest.mark.whole_run
def test_with_the_real_compiler_and_dropout(make_config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """fp32: losses to 1e-5 as not compiled, and to the last bit where it was stopped and went on."""
    outputs = {}
    for how, settings in {
        "plain": {"padding_free": False},
        "whole": {"compile": True},
        "stopped": {"compile": True},
    }.items():
        outputs[how] = tmp_path / how
        config = make_config(
            output=str(tmp_path / how), updates=4, precision="fp32", checkpoint__every=1, data__validation=None,
            model__config={"num_hidden_layers": 1}, **settings,
        )  # fmt: skip
        if how == "stopped":
            assert carry_out(config, stop_after=2) == 0
            torch._dynamo.reset()
        assert carry_out(config) == 0
    plain, whole, stopped = (figures(outputs[how], "train/loss") for how in outputs)
    assert len(plain) == 4
    assert whole == pytest.approx(plain, rel=1e-5)
    assert stopped == whole
    weights = [checkpoint(outputs[how], 4)[0] for how in ("whole", "stopped")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_without_a_compiler(
    make_config: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config, "fx_graph_cache", False)  # what it has compiled before takes no compiler
    monkeypatch.setattr(config.cpp, "cxx", (str(tmp_path / "g++"),))

    with pytest.raises(UserError, match=r"compile: the layers .* cannot .* C\+\+ compiler .* leave compile"):
        carry_out(make_config(updates=2, compile=True))
    assert not (tmp_path / "out").exists()


def test_a_model_that_names_no_layers() -> None:
    with pytest.raises(UserError, match="compile: Linear does not name its layers"):
        compilation.compile_layers(torch.nn.Linear(2, 2))


def test_a_layer_with_a_forward_of_its_own_is_left_as_it_is(quick: None, caplog: pytest.LogCaptureFixture) -> None:
    """And it is said: what hangs on a layer itself comes before its class's."""
    model = make("Bert")
    layers = list(next(stacks(model.base_model))[1])
    layers[0].forward = layers[0].forward
    with caplog.at_level(logging.WARNING, "train"):
        compilation.compile_layers(model)
    said = [record.getMessage() for record in caplog.records if record.name == "train"]
    assert said == [
        f"compile: 1 of {len(layers)} layers (BertLayer) are computed without: somebody has given each a `forward` of "
        "its own"
    ]
    assert compilation.describe(model) == f"{len(layers) - 1} BertLayer"


def kernel(
    query: Any, key: Any, value: Any, starts: Any, _: Any, most: int, mosts: int, **options: Any
) -> torch.Tensor:
    """What `varlen_attn` promises, of operators that a compiler knows. (tokens, heads, d) → the same."""
    place = torch.arange(len(query), dtype=torch.int32)
    own, apart = torch.searchsorted(starts[1:].contiguous(), place, right=True), place[:, None] - place[None]
    back, ahead = options["window_size"]
    mask = own[:, None] == own[None]
    mask = mask & (apart <= back) & (apart >= -ahead) if back >= 0 else mask
    rows = (each.transpose(0, 1)[None] for each in (query, key, value))
    found = torch.nn.functional.scaled_dot_product_attention(*rows, attn_mask=mask, scale=options["scale"])
    return found[0].transpose(0, 1)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize(
    ("kind", "ways", "settings"),
    [("Bert", 2, {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}), ("ModernBert", 3, {})],
)
def test_padding_is_left_out_as_on_a_gpu(
    kind: str, ways: int, settings: dict[str, Any], twice: bool, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without what leaves padding out, float64 to 1e-9; a graph for each kind of layer, whatever the sizes.

    The first layer's is another than that of those above it; ModernBERT has two kinds of these. Layers that are
    computed twice know the batch the second time too.
    """
    monkeypatch.setattr(varlen, "available", lambda model: True)
    monkeypatch.setattr(varlen, "_kernel", kernel)
    model = make(kind, **settings).train()
    batches = [torch.tensor(each)[:, None] for each in ((7, 2, 11, 5), (3, 9), (8, 8, 8), (12, 1, 30, 4, 2, 9))]
    masks = [(torch.arange(int(lengths.max()))[None] < lengths).long() for lengths in batches]
    given = [{"input_ids": torch.arange(mask.numel()).view_as(mask) % 50 + 5, "attention_mask": mask} for mask in masks]
    expected = [learned(model, each) for each in given]
    assert padding_free.enable(model)
    assert recomputation.choose(model, twice, memory=0, needed=None) == twice
    compilation.compile_layers(model)
    counted, seen, last = [], list[tuple[int, ...]](), next(stacks(model.base_model))[1][-1]
    last.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[:2])))
    for each, (logits, gradients) in zip(given, expected, strict=True):
        found, others = learned(model, each)
        assert torch.allclose(found, logits, rtol=1e-9, atol=1e-12) and len(others) == len(gradients)
        assert all(
            torch.allclose(one, other, rtol=1e-9, atol=1e-12) for one, other in zip(others, gradients, strict=True)
        )
        counted.append(graphs())
    assert counted == [ways] * len(given)
    assert list(dict.fromkeys(seen)) == [(1, int(mask.sum())) for mask in masks], "once or, of some versions, twice"


def test_it_is_said_when_nothing_more_is_compiled(
    tiny_model: str, quick: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import BertForMaskedLM

    monkeypatch.setattr(compilation, "VARIANTS", 1)
    model = BertForMaskedLM.from_pretrained(tiny_model)
    compilation.compile_layers(model)
    with caplog.at_level(logging.WARNING, "train"):
        losses(model, masked=True)
    said = [record.getMessage() for record in caplog.records if record.name == "train"]
    assert len(said) >= 1 and "has been compiled 1 times; whatever is new is computed without" in said[0]
    assert "the layers' 'forward' (" in said[0] and "modeling_bert.py:" in said[0], "which layers"
    compilation.compile_layers(model)
    assert json.dumps(compilation.describe(model)) == '"2 BertLayer"'
