"""Writing texts: each as if it were alone, drawn from the right chances, stopped where it should."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RwkvConfig,
    RwkvForCausalLM,
)

from data.errors import UserError
from tests.distributed import ROOT
from train.tasks import _generation
from train.tasks._generation import Generation, _Noise, texts

SIZE, PAD, BOS, EOS = 40, 0, 1, 2
PROMPTS = [[1, 5, 6], [1, 7], [1, 9, 10, 11, 12, 13, 14]]
KEYS = torch.tensor([123, 456, -789])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: place for place, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{n}" for n in range(SIZE - 3))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def model(kind: str) -> Any:
    torch.manual_seed(0)
    ends = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3, **ends,
        )  # fmt: skip
        return LlamaForCausalLM(config).double().eval()
    if kind == "gpt2":
        small = GPT2Config(
            vocab_size=SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, **ends
        )
        return GPT2LMHeadModel(small).double().eval()
    if kind == "rwkv":  # takes no notice of an attention mask
        sizes = RwkvConfig(
            vocab_size=SIZE, hidden_size=32, num_hidden_layers=2, rescale_every=0, use_cache=True, **ends
        )
        return RwkvForCausalLM(sizes).double().eval()
    both = BartConfig(
        vocab_size=SIZE, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64, init_std=0.3,
        decoder_start_token_id=EOS, forced_eos_token_id=None, **ends,
    )  # fmt: skip
    return BartForConditionalGeneration(both).double().eval()


def batch(prompts: list[list[int]], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    filled = [([PAD] * (longest - len(p)), p, [1] * len(p)) for p in prompts]
    ids = [gap + p if left else p + gap for gap, p, _ in filled]
    mask = [gap + ones if left else ones + gap for gap, _, ones in filled]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bart", "rwkv"])
@pytest.mark.parametrize(
    "how", [{}, {"beams": 3}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "seed": 5}]
)
def test_a_text_is_written_as_if_alone(kind: str, how: dict[str, Any], tokenizer: Any) -> None:
    """Padded in a batch or by itself: the same tokens; decoders on the left, but for those that would read that."""
    if kind == "rwkv" and "beams" in how:
        pytest.skip("transformers cannot follow beams with this model")
    net, generation = model(kind), Generation(max_new_tokens=12, **how)
    generation.settle(net, tokenizer, 5, inherits=False)
    with torch.no_grad():
        together = generation.write(net, tokenizer, *batch(PROMPTS, left=kind != "bart"), KEYS)
        assert together.shape[0] == 3 and together.shape[1] <= 12
        for place, prompt in enumerate(PROMPTS):
            alone = generation.write(net, tokenizer, *batch([prompt], left=True), KEYS[place : place + 1])[0]
            row = together[place]
            assert torch.equal(alone, row[: len(alone)]) and (row[len(alone) :] == -100).all()
            ended = (row == EOS).nonzero().flatten().tolist()
            assert len(ended) <= 1 and (not ended or (row[ended[0] + 1 :] == -100).all())


@pytest.mark.parametrize(("kind", "adapted"), [("llama", False), ("llama", True), ("rwkv", False)])
def test_what_was_proved_of_the_whole_model_holds_where_it_is_shared_out(
    kind: str, adapted: bool, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There one that would read padding is refused, on all processes, whatever the lengths of their texts."""
    net, generation = model(kind).train(), Generation(max_new_tokens=12)
    generation.settle(net, tokenizer, 5, inherits=False)
    _generation.prove_padding(net)
    assert net.training
    monkeypatch.setattr(_generation, "_is_shared_out", lambda model: True)
    monkeypatch.setattr(_generation._proof, "reads_padded", lambda model: pytest.fail("it would need all processes"))
    if adapted:
        inside, net = net, torch.nn.Module()  # as peft wraps it
        net.config, net.generation_config, net.get_base_model = inside.config, inside.generation_config, lambda: inside
    net.eval()
    net.generate = lambda input_ids, **_: torch.cat([input_ids, input_ids], dim=1)  # it would need the others
    for prompts in (PROMPTS, PROMPTS[:1]):
        with torch.no_grad():
            if kind == "rwkv":
                with pytest.raises(UserError, match="RwkvForCausalLM takes no notice of an attention mask"):
                    generation.write(net, tokenizer, *batch(prompts, left=True), KEYS)
            else:
                assert len(generation.write(net, tokenizer, *batch(prompts, left=True), KEYS)) == len(prompts)


def test_what_is_drawn_is_repeated_by_the_seed_and_changed_by_another(tokenizer: Any) -> None:
    found = []
    for seed in (0, 0, 1):
        net, generation = model("llama"), Generation(max_new_tokens=12, temperature=1.0, seed=seed)
        generation.settle(net, tokenizer, 5, inherits=False)
        torch.manual_seed(len(found))  # the global generator has no part in it
        with torch.no_grad():
            found.append(generation.write(net, tokenizer, *batch(PROMPTS, left=True), KEYS))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_tokens_are_drawn_by_their_chances() -> None:
    """40,000 draws in each of two steps: within five standard deviations, and the steps are independent."""
    logits, count = torch.tensor([0.0, 1.0, 2.0, -1.0], dtype=torch.float64), 40_000
    noise = _Noise(torch.arange(count) * 7919)
    first, second = (noise(torch.empty(0), logits.expand(count, 4)).argmax(1) for _ in range(2))
    chances = logits.softmax(0)
    for drawn in (first, second):
        share = torch.bincount(drawn, minlength=4) / count
        assert ((share - chances).abs() < 5 * (chances * (1 - chances) / count).sqrt()).all()
    both = torch.bincount(first * 4 + second, minlength=16).view(4, 4) / count
    expected = chances[:, None] * chances
    assert ((both - expected).abs() < 5 * (expected / count).sqrt()).all()


def test_writing_stops_at_a_stop_string_and_leaves_it_out(tokenizer: Any) -> None:
    net = model("llama")
    greedy = Generation(max_new_tokens=12)
    greedy.settle(net, tokenizer, 5, inherits=False)
    given = batch(PROMPTS, left=True)
    whole = texts(greedy.write(net, tokenizer, *given).numpy(), tokenizer)
    stop = whole[0].split()[3]
    stopped = Generation(max_new_tokens=12, stop=(stop, "never"))
    found = stopped.write(net, tokenizer, *given)
    assert (found[0] != -100).sum() < 12, "nothing was saved"
    assert texts(found.numpy(), tokenizer, stopped.stop)[0] == whole[0][: whole[0].find(stop)]


def test_further_ends_of_a_pretrained_model_end_texts_too(tokenizer: Any) -> None:
    net = model("llama")
    greedy = Generation(max_new_tokens=12)
    greedy.settle(net, tokenizer, 5, inherits=False)
    whole = greedy.write(net, tokenizer, *batch(PROMPTS[:1], left=True))[0].tolist()
    net.generation_config.eos_token_id = [EOS, whole[4]]
    greedy.settle(net, tokenizer, 5, inherits=True)
    found = greedy.write(net, tokenizer, *batch(PROMPTS, left=True))[0].tolist()
    end = whole.index(whole[4]) + 1
    assert found[:end] == whole[:end] and set(found[end:]) <= {-100}


@pytest.mark.parametrize(
    "how, said",
    [
        ({"top_k": 5}, "top_k is for texts that are drawn"),
        ({"seed": 5}, "seed is for texts that are drawn"),
        ({"temperature": 1.0, "beams": 2}, "beams and temperature: give one of them"),
        ({"length_penalty": 2.0}, "length_penalty is for beams"),
        ({"temperature": 0.0}, "greater than 0"),
        ({"stop": [""]}, "at least 1 character"),
        ({"min_new_tokens": 9, "max_new_tokens": 5}, "min_new_tokens must not be more"),
    ],
)
def test_keys_that_cannot_take_effect(how: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Generation(**how)


def test_only_what_texts_are_made_of_is_inherited(tokenizer: Any) -> None:
    """A pretrained model's own ways would change what the config says: the likeliest token each, one text."""
    net = model("llama")
    net.generation_config.update(repetition_penalty=50.0, suppress_tokens=[7])
    net.generation_config.num_return_sequences = 2
    Generation(max_new_tokens=12).settle(net, tokenizer, 5, inherits=True)
    assert net.generation_config.suppress_tokens == [7]
    found = net.generation_config.to_diff_dict()
    assert "repetition_penalty" not in found and "num_return_sequences" not in found


def test_a_tokenizer_without_an_end(tokenizer: Any) -> None:
    class Endless:
        pad_token_id, eos_token_id = 0, None

    net = model("llama")
    greedy = Generation(max_new_tokens=6)
    greedy.settle(net, Endless, 5, inherits=False)
    found = greedy.write(net, Endless, *batch(PROMPTS, left=True))
    assert found.shape == (3, 6) and (found >= 0).all()


SHARED_OUT = """
import os, sys, torch
import torch.distributed as dist
sys.path.insert(0, ".")
from tests.train.tasks.test_generation import PROMPTS, batch, model
from train.tasks._generation import Generation
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh

class Words:
    pad_token_id, eos_token_id = 0, 2

dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = init_device_mesh("cpu", (2,))
prompts, limits = [PROMPTS[:1], PROMPTS[1:]][rank], [3, 12]
for kind in ("llama", "bart"):
    for how in ({}, {"beams": 2}):
        whole, net = model(kind), model(kind)
        for net_ in (whole, net):
            Generation(max_new_tokens=limits[rank], **how).settle(net_, Words, 5, inherits=False)
        layers = net.model.layers if kind == "llama" else [*net.model.encoder.layers, *net.model.decoder.layers]
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
        given = batch(prompts, left=kind == "llama")
        with torch.no_grad():
            found = Generation(**how).write(net, Words, *given)
            expected = whole.generate(input_ids=given[0], attention_mask=given[1])
        expected = expected[:, given[0].shape[1] if kind == "llama" else 1:]
        real = found != -100
        assert real.any() and torch.equal(found[real], expected[:, : found.shape[1]][real]), (kind, how, found)
print("the same", rank, flush=True)
dist.barrier()
os._exit(0)
"""


@pytest.mark.whole_run
def test_weights_that_are_shared_out(tmp_path: Any) -> None:
    """FSDP2 on two processes whose texts have different lengths: no hang, and what one process would write."""
    (tmp_path / "shared.py").write_text(SHARED_OUT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "shared.py")], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.count("the same") == 2, done.stderr[-3000:]
