"""What Hugging Face's hooks collect: right where it crosses the cut, refused by its flag where it is within."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import torch
from torch import nn

import splitfed
from splitfed.errors import AbsentError

transformers = pytest.importorskip("transformers")
TINY: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8}


def model(kind: str) -> Any:
    """A tiny model of random weights."""
    few = {"vocab_size": 20, "attn_implementation": "eager", "use_cache": False, **TINY}
    if kind == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**few)).eval()
    if kind == "mixtral":
        few = {**few, "num_key_value_heads": 1, "num_local_experts": 2}
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**few)).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=1, **few)).eval()


def client(net: nn.Module, at: str) -> splitfed.SplitClient:
    """A client of a half of it."""
    half, body = splitfed.split(net, at)
    store = splitfed.GradientStore(f"memory://{uuid.uuid4().hex}", sync="process")
    return splitfed.SplitClient(half, splitfed.SplitServer(body, store), "a")


@pytest.fixture
def ids() -> torch.Tensor:
    """Tokens `(N, L)`."""
    return torch.randint(3, 20, (2, 4))


@pytest.mark.parametrize(
    ("kind", "at", "flag"),
    [
        ("llama", "model.layers.1", "hidden_states"),
        ("llama", "model.layers.0", "hidden_states"),
        ("llama", "model.layers.1.self_attn", "attentions"),
        ("mixtral", "model.layers.1", "hidden_states"),
        ("mixtral", "model.layers.1.self_attn", "router_logits"),
        ("mixtral", "model.layers.1.mlp.gate", "router_logits"),
        ("bert", "bert.encoder.layer.2", "hidden_states"),
        ("bert", "bert.encoder.layer.0.attention.self", "attentions"),
        ("bert", "bert", "attentions"),
    ],
)
def test_what_crosses_the_cut_is_collected(kind: str, at: str, flag: str, ids: torch.Tensor) -> None:
    """As many as in the unsplit model, each equal at its index."""
    net = model(kind)
    with torch.no_grad():
        got, expected = (found(ids, **{f"output_{flag}": True})[flag] for found in (client(net, at), net))
    assert len(got) == len(expected) >= 3
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("kind", "at", "flag", "path"),
    [
        ("llama", "model.layers.1", "attentions", "self_attn"),
        ("mixtral", "model.layers.1", "router_logits", "mlp.gate"),
        ("bert", "bert.encoder.layer.1", "attentions", "attention.self"),
        ("bert", "bert.encoder", "hidden_states", "layer.0"),
    ],
)
def test_a_flag_for_what_is_within_is_refused(kind: str, at: str, flag: str, path: str, ids: torch.Tensor) -> None:
    """By its name, as an argument or in the config; without it, the model computes what it did."""
    net = model(kind)
    split = client(net, at)
    with torch.no_grad():
        with pytest.raises(AbsentError, match=f"output_{flag} asks for what '{path}' gives.*output_{flag}=False"):
            split(ids, **{f"output_{flag}": True})
        assert torch.equal(split(ids).logits, net(ids).logits)
        setattr(split.config, f"output_{flag}", True)
        with pytest.raises(AbsentError, match=f"output_{flag}"):
            split(ids)


def test_a_config_is_shared_by_half_and_part(ids: torch.Tensor) -> None:
    """A change that the part reads is refused; what a model notes in it, or the part doesn't read, isn't."""
    split = client(model("bert"), "bert.encoder.layer.1")
    part: Any = split.bert.encoder.layer[1]
    assert part.attention.self.config is split.config
    assert split(ids, labels=torch.tensor([0, 1])).loss > 0
    assert split.config.problem_type == "single_label_classification"
    split.config.use_cache = True
    split(ids)
    split.client_half.set_attn_implementation("sdpa")
    with pytest.raises(AbsentError, match=r"config._attn_implementation_internal' has changed since split"):
        split(ids)


def test_checkpointing_of_the_half_leaves_the_part_alone(ids: torch.Tensor) -> None:
    """Which layers save memory on the server is its own affair."""
    net = model("llama").train()
    split = client(net, "model.layers.1")
    for found in (split, net):
        getattr(found, "activation_checkpointing_enable", found.gradient_checkpointing_enable)()
        found(ids, labels=ids).loss.backward()
    assert torch.equal(split.model.embed_tokens.weight.grad, net.model.embed_tokens.weight.grad)
