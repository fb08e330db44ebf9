"""Language models of Hugging Face, fine-tuned as people do it: twenty steps have the bits of the unsplit model.

`FAMILIES` is the table: a row a family, with what it is trained with. A new family, or a new way to train, is a row.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from cases import Inputs
from harness import Apart, Split, Step, Wire, adam, assert_equal, assert_same, gradients, step
from torch import Tensor, nn

import splitfed

# PEFT asks transformers by a name that it no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
STEPS = 20


class Counting(Wire):
    """Counts requests, and the bytes of the tensors that forwards send."""

    total = 0
    sent = 0

    def send(self, method: str, request: Any) -> Any:
        """Count, then pass on."""
        self.total += 1
        if method == "forward":
            self.sent += sum(tensor.nbytes for tensor in request.tensors())
        return super().send(method, request)


class CountingApart(Counting, Apart):
    """The same, over two replicas."""


MODES: dict[str, dict[str, Any]] = {
    "graph_kept": {},
    "recomputed": {"keep_graphs": 0},
    "two_replicas": {"wire": CountingApart, "replicas": 2},
}
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
WIDTH = {"intermediate_size": 24}
GROUPED = {"num_key_value_heads": 1}  # queries of two heads share a key
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": False}


@dataclass(frozen=True, eq=False)
class Family:
    """A kind of decoder, and how it is trained."""

    name: str
    config: str
    """The class of its config, in transformers."""
    sizes: dict[str, Any]
    at: str | list[str]
    adapter: dict[str, Any] | None = None
    """Settings of a LoRA that PEFT puts on; the rest is frozen."""
    dtype: torch.dtype = torch.float32
    checkpointing: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the config, besides sizes: dropout, tied embeddings."""
    draws: bool = False
    """Whether the model has dropout."""

    def model(self) -> nn.Module:
        """The model, always with the same weights, in train mode."""
        import transformers

        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = getattr(transformers, self.config)(**self.sizes, **TOKENS, **self.settings)
            model: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            if self.checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if self.adapter is not None:
                model = adapted(model, **self.adapter)
        whole: nn.Module = model.to(self.dtype).train()
        return whole


def adapted(model: nn.Module, **settings: Any) -> nn.Module:
    """The model with a LoRA whose second factor isn't zero, as after some steps, so that both have gradients."""
    import peft

    wrapped: nn.Module = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, **settings)
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped


LORA = {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}
DORA = {"target_modules": ["q_proj", "o_proj"], "use_dora": True}
FAMILIES = [
    Family("llama_lora", "LlamaConfig", SIZES | WIDTH | GROUPED, "base_model.model.model.layers.0", LORA, draws=True),
    Family("mistral_dora", "MistralConfig", SIZES | WIDTH | GROUPED, "base_model.model.model.layers.0", DORA),
    Family(
        "qwen3_tied",
        "Qwen3Config",
        SIZES | WIDTH | GROUPED | {"head_dim": 8},
        "model.layers.0",
        settings={"tie_word_embeddings": True},
    ),
    Family(
        "gemma2_bf16",
        "Gemma2Config",
        SIZES | WIDTH | GROUPED | {"head_dim": 8},
        "model.layers.1",
        dtype=torch.bfloat16,
        settings={"tie_word_embeddings": True},
    ),
    Family(
        "phi_checkpointing",
        "PhiConfig",
        SIZES | WIDTH,
        "model.layers.0",
        checkpointing=True,
        settings={"resid_pdrop": 0.1},
        draws=True,
    ),
    Family(
        "gpt2_tied_dropout",
        "GPT2Config",
        {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2},
        "transformer.h.0",
        draws=True,
    ),
    Family(
        "gpt_neox_lora_checkpointing",
        "GPTNeoXConfig",
        SIZES | WIDTH,
        "base_model.model.gpt_neox.layers.0",
        {"target_modules": ["query_key_value"]},
        checkpointing=True,
    ),
    Family(
        "opt_bf16_checkpointing",
        "OPTConfig",
        SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 16},
        "model.decoder.layers.0",
        dtype=torch.bfloat16,
        checkpointing=True,
        settings={"dropout": 0.1},
        draws=True,
    ),
    Family(
        "mixtral_two_cuts",
        "MixtralConfig",
        SIZES | WIDTH | GROUPED | {"num_local_experts": 3, "num_experts_per_tok": 2},
        ["model.layers.0", "model.layers.1.mlp"],
    ),
]
SMALL = {"vocab_size": 32, "hidden_size": 16, "max_position_embeddings": 16, "num_attention_heads": 2}


def in_one_run(family: Family) -> Family:
    """It with four layers, of which all but the first are cut out as one run."""
    first = family.at if isinstance(family.at, str) else family.at[0]
    count = "n_layer" if "n_layer" in family.sizes else "num_hidden_layers"
    run = f"{first.rpartition('.')[0]}.1:4"
    return replace(family, name=f"{family.name}_run", at=run, sizes=family.sizes | {count: 4})


RUNS = [
    *map(in_one_run, FAMILIES),
    # Layers that return tuples, and a mask for each kind of layer.
    Family("bloom_run", "BloomConfig", {"vocab_size": 32, "hidden_size": 16, "n_layer": 4, "n_head": 2},
           "transformer.h.0:4", settings={"hidden_dropout": 0.1}, draws=True),
    Family("falcon_run", "FalconConfig", SMALL | {"num_hidden_layers": 4}, "transformer.h.0:4"),
    Family("gemma3_run", "Gemma3TextConfig", SIZES | WIDTH | GROUPED | {"num_hidden_layers": 4, "head_dim": 8},
           "model.layers.0:4", settings={"sliding_window": 4}),
]  # fmt: skip
FAMILY = pytest.mark.parametrize("family", [pytest.param(family, id=family.name) for family in FAMILIES + RUNS])


def batches() -> list[Inputs]:
    """Token ids `(2, 6)` with padding, their mask and their labels."""
    found: list[Inputs] = []
    for number in range(STEPS):
        ids = torch.randint(3, 32, (2, 6))
        mask = torch.ones_like(ids)
        mask[0, 6 - number % 3 :] = 0
        labels = ids.masked_fill(mask == 0, -100)
        found.append(((), {"input_ids": ids, "attention_mask": mask, "labels": labels}))
    return found


def train(
    net: nn.Module, update: Callable[[], None], read: Callable[[], dict[str, Tensor]]
) -> tuple[list[Step], Tensor]:
    """Twenty steps from the same generator: what each computed, and where the generator is at the end."""
    torch.manual_seed(1)
    steps = []
    for _, inputs in batches():
        net.zero_grad()
        outputs = net(**inputs)
        outputs.loss.backward()
        steps.append(Step([outputs.loss.detach(), outputs.logits.detach()], [], read()))
        update()
    return steps, torch.get_rng_state()


@functools.cache
def unsplit(family: Family) -> tuple[list[Step], Tensor, dict[str, Tensor]]:
    """The run of the reference, with an optimizer for each side of the cut; kept for all modes."""
    reference = splitfed.reference(family.model(), family.at)
    own = {name for name, _ in splitfed.split(family.model(), family.at)[0].named_parameters()}
    sides: dict[bool, list[Any]] = {True: [], False: []}
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            sides[name in own].append(parameter)
    optimizers = [adam(side) for side in sides.values()]

    def update() -> None:
        for optimizer in optimizers:
            optimizer.step()

    steps, generator = train(reference, update, lambda: gradients(reference))
    return steps, generator, reference.state_dict()


@FAMILY
@pytest.mark.parametrize("mode", MODES)
def test_twenty_steps_have_the_bits_of_the_reference(family: Family, mode: str) -> None:
    """Loss, logits, all gradients of each step, the last weights, and the generator."""
    split = Split(family.model(), family.at, f"memory://{uuid.uuid4()}", **{"wire": Counting, **MODES[mode]})
    local = adam([p for p in split.client.parameters() if p.requires_grad])

    def update() -> None:
        local.step()
        commit = split.accumulator.step()
        assert commit is not None
        assert commit.num_batches == 1

    steps, generator = train(split.client, update, split.gradients)
    expected, expected_generator, state = unsplit(family)
    for got, wanted in zip(steps, expected, strict=True):
        assert_equal(got, wanted)
    assert split.store.latest_version() == STEPS
    if family in RUNS:
        assert split.wire.total == 2 * STEPS
    assert_same(split.state(), state, "state")
    assert torch.equal(generator, expected_generator)


@pytest.mark.parametrize(
    "family", [pytest.param(family, id=family.name) for family in FAMILIES + RUNS if not family.draws]
)
def test_the_reference_is_the_raw_model(family: Family) -> None:
    """Where nothing is drawn, a step of the reference has the bits of the model itself."""
    raw, reference = family.model(), splitfed.reference(family.model(), family.at)
    given = batches()[0]
    assert_equal(step(reference, given), step(raw, given))


@pytest.mark.parametrize("family", [pytest.param(f, id=f.name) for f in RUNS if not f.checkpointing])
def test_a_run_sends_little_besides_its_activation(family: Family) -> None:
    """Of 128 padded tokens, as wide as small models are: hidden states, and masks and positions once.

    By eager attention, whose masks are floats. That of a sliding window as long is the same mask.
    """
    width, heads, limit = "hidden_size", "num_attention_heads", "max_position_embeddings"
    if family.config in ("GPT2Config", "BloomConfig"):
        width, heads, limit = {
            "GPT2Config": ("n_embd", "n_head", "n_positions"),
            "BloomConfig": ("hidden_size", "n_head", "seq_length"),
        }[family.config]
    sizes = family.sizes | {width: 768, heads: 12, limit: 128}
    sizes |= {"head_dim": 64} if "head_dim" in sizes else {}
    settings = family.settings | ({"sliding_window": 128} if "sliding_window" in family.settings else {})
    wide = replace(family, sizes=sizes, settings=settings)
    split = Split(wide.model(), wide.at, f"memory://{uuid.uuid4()}", wire=Counting)
    ids = torch.randint(3, 32, (8, 128))
    mask = torch.ones_like(ids)
    mask[0, 100:] = 0
    with torch.no_grad():
        split.client(input_ids=ids, attention_mask=mask)
    assert split.wire.total == 1
    assert split.wire.sent <= 1.25 * 8 * 128 * 768 * family.dtype.itemsize


@pytest.mark.parametrize("family", [pytest.param(f, id=f.name) for f in RUNS if not f.draws and not f.checkpointing])
def test_hidden_states_of_a_run_are_those_of_the_model(family: Family) -> None:
    """With as many requests as the model's way to collect them takes; a cache is refused."""
    split = Split(family.model(), family.at, f"memory://{uuid.uuid4()}", wire=Counting)
    _, given = batches()[0]
    given.pop("labels")
    expected = family.model()(**given, output_hidden_states=True).hidden_states
    found = split.client(**given, output_hidden_states=True).hidden_states
    assert len(found) == len(expected)
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)
    with pytest.raises(splitfed.errors.ContainerError, match="use_cache=False"):
        split.client(**given, use_cache=True)
