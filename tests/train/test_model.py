"""Models of other families, and what is said of those that cannot be used."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import UserError
from tests.conftest import WORDS
from tests.worker import carry_out
from train.config import validate
from train.limits import longest_input
from train.model import load_model, place
from train.model_config import ModelConfig
from train.tokenizer import ids

MakeConfig = Callable[..., dict[str, Any]]


@pytest.fixture
def family(tiny_model: str, tmp_path: Path) -> Callable[..., str]:
    """Return a function that makes a tiny model of a family, with the tests' tokenizer less some of its keys."""

    def make(name: str, **config: Any) -> str:
        import transformers

        folder = tmp_path / name
        settings = getattr(transformers, f"{name}Config")(vocab_size=len(WORDS) + 5, **config)
        getattr(transformers, f"{name}Model")(settings).save_pretrained(folder)
        for file in Path(tiny_model).glob("tokenizer*"):
            shutil.copy(file, folder)
        if name == "GPT2":  # no padding token of its own
            described = json.loads((folder / "tokenizer_config.json").read_text())
            described.pop("pad_token", None)
            (folder / "tokenizer_config.json").write_text(json.dumps({**described, "eos_token": "[SEP]"}))
        return str(folder)

    return make


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("GPT2", {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "bos_token_id": 2, "eos_token_id": 3}),
        ("Roberta", {**SMALL, "max_position_embeddings": 66, "pad_token_id": 1, "type_vocab_size": 1}),
        ("DistilBert", {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 64}),
    ],
)
def test_other_families_train_and_resume(
    name: str, config: dict[str, Any], family: Callable[..., str], make_config: MakeConfig, tmp_path: Path
) -> None:
    run = make_config(updates=6, model__path=family(name, **config), precision="fp32", model__config={})
    resumed_as_if_never_stopped({**run, "micro_batch_size": 8}, tmp_path)


def resumed_as_if_never_stopped(config: dict[str, Any], folder: Path) -> Path:
    """Carry out a run whole, and again with a stop; compare the exported weights and return where they are."""
    for name in ("whole", "stopped"):
        run = {**config, "output": str(folder / name)}
        assert name == "whole" or carry_out(run, stop_after=3) == 0
        assert carry_out(run) == 0
    exported = [(folder / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert exported[0] == exported[1]
    return folder / "whole"


# From scratch

DEBERTA_V3 = {
    "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "position_biased_input": False,
    "norm_rel_ebd": "layer_norm", "share_att_key": True, "pooler_hidden_size": 32,
}  # fmt: skip
SCRATCH: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("wordpiece", SMALL),
    "roberta": ("bpe", SMALL),
    "deberta-v2": ("unigram", {**SMALL, **DEBERTA_V3}),
    "modernbert": ("bpe", {**SMALL, "local_attention": 16, "global_attn_every_n_layers": 2, "num_hidden_layers": 2}),
    "gpt2": ("char", {"n_embd": 32, "n_layer": 1, "n_head": 2}),
    "llama": ("bpe", {**SMALL, "num_key_value_heads": 1}),
    "qwen3": ("unigram", {**SMALL, "num_key_value_heads": 1, "head_dim": 16}),
}
SEQUENCES, MASKED, CAUSAL = (f"AutoModelFor{head}" for head in ("SequenceClassification", "MaskedLM", "CausalLM"))


def scratch(name: str, /, positions: int = 64, **changes: Any) -> dict[str, Any]:
    """Return the section `model` of a config that makes a tiny model of a kind, and its tokenizer, from scratch."""
    kind, sizes = SCRATCH[name]
    limit = "n_positions" if name == "gpt2" else "max_position_embeddings"
    return {
        "tokenizer": {"train": {"kind": kind, "column": "text"}},
        "config": {"model_type": name, limit: positions, **sizes, **changes},
    }


@pytest.mark.parametrize("model_type", SCRATCH)
def test_families_from_scratch_train_resume_and_load_again(
    model_type: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoTokenizer, pipeline

    run = make_config(updates=6, precision="fp32", model=scratch(model_type), data__max_length=60, micro_batch_size=8)
    output = resumed_as_if_never_stopped(run, tmp_path)
    classify = pipeline("text-classification", model=str(output / "model"), top_k=None)
    texts = [json.loads(line)["text"] for line in Path(run["data"]["validation"]).read_text().splitlines()]
    records = [json.loads(line) for line in (output / "predictions" / "validation.jsonl").read_text().splitlines()]
    for scores, record in zip(classify(texts, truncation=True, max_length=60), records, strict=True):
        assert {each["label"]: each["score"] for each in scores} == pytest.approx(record["scores"], abs=2e-6)
    config, tokenizer = (kind.from_pretrained(output / "model") for kind in (AutoConfig, AutoTokenizer))
    assert config.vocab_size == ids(tokenizer) == len(tokenizer)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 2, 3)
    card = (output / "model" / "README.md").read_text()
    assert f"from scratch ({model_type})" in card and "base_model" not in card and "Trained with" in card


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen3"])
def test_decoders_from_scratch_learn_to_write_resume_and_load_again(
    model_type: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task = {"name": "causal_lm"}
    run = make_config(updates=6, precision="fp32", model=scratch(model_type), task=task, data__max_length=60)
    output = resumed_as_if_never_stopped(run, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(output / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    texts = [json.loads(line)["text"] for line in Path(run["data"]["validation"]).read_text().splitlines()]
    records = [json.loads(line) for line in (output / "predictions" / "validation.jsonl").read_text().splitlines()]
    for text, record in zip(texts, records, strict=True):
        ids = torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
        if len(ids) <= 61:  # else it was cut, and what stands before the cut is not seen behind it
            with torch.no_grad():
                chances = model(ids[None, :-1]).logits[0].log_softmax(1)
            loss = -chances[range(len(ids) - 1), ids[1:]].sum().item()
            assert (record["loss"], record["tokens"]) == (pytest.approx(loss, rel=1e-4), len(ids) - 1)


def loaded(path: str | None, tokenizer: Any, model_class: str, known: int | None = None, **options: Any) -> Any:
    """Return a model as a run gets it."""
    settings = ModelConfig(path=path, config=options.pop("config", {}))
    options = {"known": known or ids(tokenizer), "dtype": torch.float32, "seed": 0, "token": None, **options}
    return load_model(settings, model_class, options.pop("from_task", {}), tokenizer, **options)[0]


@pytest.fixture
def words(tiny_model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.parametrize("model_type", SCRATCH)
def test_weights_from_scratch_are_drawn_from_the_seed_alone(model_type: str, words: Any) -> None:
    config = scratch(model_type)["config"]
    models = []
    for seed, dtype in ((0, torch.float32), (0, torch.float64), (1, torch.float32)):
        torch.manual_seed(len(models))
        models.append(loaded(None, words, SEQUENCES, config=config, seed=seed, dtype=dtype).state_dict())
    one, wide, other = models
    assert all(torch.equal(one[name].double(), wide[name]) for name in one)
    assert {tensor.dtype for tensor in wide.values() if tensor.is_floating_point()} == {torch.float64}
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("model_type", "changes", "limit"),
    [
        ("bert", {}, 20),
        ("roberta", {}, 19),  # positions begin after that of the padding token, whose id is 0 here
        ("deberta-v2", {}, 10**9),
        ("deberta-v2", {"position_biased_input": True}, 20),
        ("modernbert", {}, 20),
        ("gpt2", {}, 20),
        ("llama", {}, 20),
        ("qwen3", {}, 20),
    ],
)
def test_the_longest_input_is_known(model_type: str, changes: dict[str, Any], limit: int, words: Any) -> None:
    def fits(length: int) -> bool:
        try:
            return bool(model(input_ids=torch.full((2, length), 7)).logits.isfinite().all())
        except (IndexError, RuntimeError):
            return False

    words.model_max_length = 10**30
    model = loaded(None, words, SEQUENCES, config=scratch(model_type, positions=20, **changes)["config"]).eval()
    assert longest_input(model, words) == limit
    assert fits(min(limit, 100))
    if limit == 20 and model_type not in ("modernbert", "llama", "qwen3"):  # those compute more than they were made for
        assert not fits(21)


def test_a_model_without_positions_has_no_longest_input(words: Any) -> None:
    words.model_max_length = 10**30
    config = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1}
    model = loaded(None, words, CAUSAL, config=config)
    assert longest_input(model, words) == 10**9


def test_the_padding_offset_of_pretrained_positions_counts(family: Callable[..., str], words: Any) -> None:
    path = family("Roberta", **SMALL, max_position_embeddings=20, pad_token_id=1, type_vocab_size=1)
    words.pad_token = "[UNK]"  # its id is 1, as RoBERTa's
    model, new = load_model(
        ModelConfig(path=path), SEQUENCES, {}, words, known=65, dtype=torch.float32, seed=0, token=None
    )
    assert longest_input(model, words) == 18
    assert all(name.startswith("classifier.") for name in new)


# Added tokens


@pytest.mark.parametrize(
    ("model_type", "spare", "tied"),
    [*((name, 0, tied) for name in SCRATCH for tied in (True, False)), ("bert", 7, True), ("llama", 7, False)],
)
def test_new_rows_are_the_mean_and_the_others_stay(
    model_type: str, spare: int, tied: bool, words: Any, tmp_path: Path
) -> None:
    head = CAUSAL if model_type in ("gpt2", "llama", "qwen3") else MASKED
    config = {**scratch(model_type)["config"], "vocab_size": 65 + spare, "tie_word_embeddings": tied}
    before = loaded(None, words, head, config=config).double().eval()
    for parameter in before.parameters():
        parameter.data.normal_()
    before.save_pretrained(tmp_path / "before")
    longer = copy.deepcopy(words)
    longer.add_tokens(["new", "newer", "newest"])
    options = {"known": 65, "dtype": torch.float64}
    model, again = (loaded(str(tmp_path / "before"), longer, head, **options).eval() for _ in range(2))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert model.config.vocab_size == max(65 + spare, 68)
    for table in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, table)().weight, getattr(model, table)().weight
        assert torch.equal(new[:65], old[:65]) and torch.equal(new[68:], old[68:])
        assert (new[65:68] - old[:65].mean(0)).abs().max() < 1e-12
    text = torch.tensor([[2, 7, 9, 11, 3]])
    old, new = before(input_ids=text).logits, model(input_ids=text).logits
    # Products are summed in another order if they have more columns, or if the weights lie elsewhere in memory (seen on
    # a processor without AVX-512): the tables are compared bit by bit, what is computed from them to 1e-12.
    rounding = 1e-12 * old.abs().max()
    assert (new[..., :65] - old[..., :65]).abs().max() < rounding
    assert (new[..., 65:68] - old[..., :65].mean(-1, keepdim=True)).abs().max() < 1e-9
    model.save_pretrained(tmp_path / "after")
    after = loaded(str(tmp_path / "after"), longer, head, dtype=torch.float64).eval()
    assert all(torch.equal(tensor, after.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert (after(text).logits - new).abs().max() < rounding


def test_a_tokenizer_from_elsewhere_gets_its_rows_and_a_smaller_one_changes_nothing(words: Any, tmp_path: Path) -> None:
    loaded(None, words, MASKED, config=scratch("bert")["config"]).save_pretrained(tmp_path / "model")
    shorter, longer = copy.deepcopy(words), copy.deepcopy(words)
    longer.add_tokens(["new", "newer"])
    model = loaded(str(tmp_path / "model"), longer, MASKED)
    table = model.get_input_embeddings().weight
    assert len(table) == ids(longer) == 67
    assert (table[65:] - table[:65].mean(0)).abs().max() < 1e-7
    model.save_pretrained(tmp_path / "larger")
    same = loaded(str(tmp_path / "larger"), shorter, MASKED).get_input_embeddings().weight
    assert torch.equal(same, table)


def test_added_tokens_are_trained_resumed_and_exported(make_config: MakeConfig, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    run = make_config(updates=6, precision="fp32", model__config={}, model__add_tokens=["w1 w2", "#"])
    output = resumed_as_if_never_stopped(run, tmp_path)
    model, tokenizer = (kind.from_pretrained(output / "model") for kind in (AutoModel, AutoTokenizer))
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == ids(tokenizer) == 67
    assert {65, 66} <= {*tokenizer("w5 w1 w2 # w3").input_ids}


def test_an_embedding_that_cannot_grow_is_refused(words: Any, tmp_path: Path) -> None:
    config = {"model_type": "mobilebert", "num_hidden_layers": 1, "intra_bottleneck_size": 16}
    config |= {"hidden_size": 32, "embedding_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    loaded(None, words, MASKED, config=config).save_pretrained(tmp_path)
    longer = copy.deepcopy(words)
    longer.add_tokens(["new"])
    with pytest.raises(UserError, match="66 tokens, the model's embedding 65, and that of a mobilebert"):
        loaded(str(tmp_path), longer, MASKED)


# What cannot be


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, r"model.path: must be given: .* model.config.model_type"),
        ({"config": {"n_layer": 2}}, r"model.path: must be given"),
        ({"path": "x", "config": {"model_type": "gpt2"}}, "give one of them"),
        ({"config": {"model_type": "gpt2"}}, r"model.tokenizer: must be given for a model from scratch"),
        ({**scratch("gpt2"), "sha256": "0" * 64}, "model.sha256: cannot take effect"),
        ({"path": "x", "tokenizer": {"train": {"kind": "bpe"}}}, "model.tokenizer: cannot be made for model.path"),
        ({"path": "x", "tokenizer": {"train": {"kind": "bep"}}}, "tokenizer.train.kind: must be .*did you mean 'bpe'"),
        ({"path": "x", "tokenizer": {"train": {"kind": "bpe", "siez": 1}}}, "did you mean model.tokenizer.train.size"),
        ({"path": "x", "tokenizer": {"train": {"kind": "char", "size": 9}}}, "size cannot take effect"),
        ({"path": "x", "tokenizer": {"train": {"kind": "bpe", "size": 9}}}, "at least 261"),
        ({"path": "x", "add_tokens": ["a", "b", "a"]}, "model.add_tokens: 'a' is there twice"),
        ({"path": "x", "add_tokens": [""]}, "model.add_tokens.0: must be a text of at least 1 character"),
    ],
)
def test_keys_that_do_not_go_together_are_found_in_the_config(
    model: dict[str, Any], message: str, make_config: MakeConfig
) -> None:
    with pytest.raises(UserError, match=message):
        validate(make_config(model=model), "run.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt22"}, r"model.config.model_type: transformers has no 'gpt22'; did you mean 'gpt2'"),
        ({"n_layers": 2}, r"model.config: gpt2 has no such key 'n_layers'; did you mean 'n_layer'"),
        ({"save_pretrained": 2}, "has no such key"),
        ({"n_embd": "wide"}, "model.config: no gpt2 can be made from this"),
        ({"n_head": 3}, "model.config: no AutoModelForSequenceClassification from scratch"),
        ({"model_type": "resnet"}, "has no such key 'n_positions'"),
        ({"vocab_size": 10}, r"model.config.vocab_size: must be at least 17"),
        ({"pad_token_id": 7}, "pad_token_id cannot take effect: task and tokenizer say that it is 0"),
        ({"num_labels": 7}, "num_labels"),
    ],
)
def test_what_cannot_be_made_from_scratch_is_named(
    changes: dict[str, Any], message: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        carry_out(make_config(model=scratch("gpt2", **changes)))
    assert not (tmp_path / "out").exists()


def test_a_wrong_kind_is_found_before_a_tokenizer_is_made(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'bert'"):
        carry_out(make_config(model=scratch("bert", model_type="brt")))
    assert not list(tmp_path.rglob("tokenizers"))


def test_labels_in_another_order_are_refused_and_other_labels_get_a_new_head(words: Any, tmp_path: Path) -> None:
    sizes = {"model_type": "bert", **SMALL}
    trained = loaded(None, words, SEQUENCES, config=sizes, from_task=labelled("neg", "pos"))
    trained.save_pretrained(tmp_path)

    def load(*names: str, model_class: str = SEQUENCES) -> tuple[Any, list[str]]:
        options: dict[str, Any] = {"known": ids(words), "dtype": torch.float32, "seed": 0, "token": None}
        return load_model(ModelConfig(path=str(tmp_path)), model_class, labelled(*names), words, **options)

    model, new = load("neg", "pos")
    assert new == [] and torch.equal(model.classifier.weight, trained.classifier.weight)
    with pytest.raises(UserError, match="learned the labels in the order neg, pos, the task has pos, neg; set"):
        load("pos", "neg")
    model, new = load("a", "b", "c")
    assert new == ["classifier.bias", "classifier.weight"] and model.classifier.weight.shape[0] == 3
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, trained.bert.embeddings.word_embeddings.weight)
    assert torch.equal(load("a", "b", "c")[0].classifier.weight, model.classifier.weight)
    with pytest.raises(UserError, match=r"bert\.\S+ is \(.*\) in the file and \(.*\) by the config"):
        loaded(str(tmp_path), words, SEQUENCES, config={"intermediate_size": 8}, from_task=labelled("neg", "pos"))


def labelled(*names: str) -> dict[str, Any]:
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {n: i for i, n in enumerate(names)},
    }


def test_an_exported_tokenizer_does_not_tell_whether_rows_were_encoded(make_config: MakeConfig, tmp_path: Path) -> None:
    """What was cut, and where, stays in a fast tokenizer; the second run finds the rows in the cache."""
    written = []
    for name in ("cold", "warm"):
        assert carry_out(make_config(updates=1, output=str(tmp_path / name), data__max_length=8)) == 0
        written.append((tmp_path / name / "model" / "tokenizer.json").read_bytes())
    assert written[0] == written[1] and json.loads(written[0])["truncation"] is None


def test_evaluation_leaves_the_weights_of_rwkv_alone(words: Any) -> None:
    """transformers would halve those of the seventh block in place, and what is saved then loads as another model."""
    sizes = {"hidden_size": 16, "attention_hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 8}
    model = loaded(None, words, "AutoModelForCausalLM", config={"model_type": "rwkv", **sizes}).train()
    ids = torch.arange(5, 11)[None]
    before, learning = {name: value.clone() for name, value in model.state_dict().items()}, model(ids).logits
    assert torch.allclose(model.eval()(ids).logits, learning, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_kind_without_the_head_is_named(words: Any) -> None:
    with pytest.raises(UserError, match=r"^model.config: gpt2: transformers has no AutoModelForMaskedLM for .* Bert, "):
        loaded(None, words, MASKED, config=scratch("gpt2")["config"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__config": {"hidden_dropout": 0.1}}, r"model.config: .* did you mean 'hidden_dropout_prob'"),
        ({"model__config": {"hidden_size": 64}}, "cannot load the model"),
        ({"model__sha256": "0" * 64}, "is not the model that the config names"),
        ({"data__max_length": 65}, "65 is more than the 64 tokens"),
        ({"model__path": "no/such-model"}, "a Hub name needs the network"),
    ],
)
def test_what_cannot_be_used_is_named_and_nothing_is_written(
    changes: dict[str, Any], message: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        carry_out(make_config(**changes))
    assert not (tmp_path / "out").exists()


def test_a_right_hash_is_accepted_and_a_damaged_file_is_named(
    tiny_model: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    digest = hashlib.sha256((copy / "model.safetensors").read_bytes()).hexdigest()
    assert carry_out(make_config(updates=1, model__path=str(copy), model__sha256=digest)) == 0
    (copy / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="cannot load the model"):
        carry_out(make_config(updates=1, model__path=str(copy), output=str(tmp_path / "other")))


def test_the_header_of_a_file_does_not_matter(family: Callable[..., str], words: Any) -> None:
    """A mapped file's weights begin where its header ends: the product with a single row depends on that (MKL)."""
    from safetensors.torch import load_file, save_file

    folder = family("Bert", **SMALL, max_position_embeddings=64)
    file, found, begins = Path(folder) / "model.safetensors", [], set()
    tensors = load_file(file)
    for filling in range(0, 64, 8):
        save_file(tensors, file, metadata={"format": "pt", "filling": "x" * filling})
        model, _ = load_model(
            ModelConfig(path=folder), "AutoModel", {}, words, known=ids(words), dtype=torch.float32, seed=0, token=None
        )
        weight = model.encoder.layer[0].output.dense.weight
        begins.add(weight.data_ptr() % 64)
        place(model, torch.device("cpu"))
        assert all(tensor.data_ptr() % 64 == 0 for tensor in (*model.parameters(), *model.buffers()))
        assert model.encoder.layer[0].output.dense.weight is weight, "an optimizer may hold it already"
        with torch.no_grad():
            found.append(model(torch.arange(9)[None]).pooler_output)
    assert len(begins) > 4, "the files would not show anything"
    assert all(torch.equal(found[0], other) for other in found)
