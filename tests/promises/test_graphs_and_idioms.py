"""Graph networks, PEFT's adapters and timm's idioms, as people write them: the bits of the unsplit model.

timm itself needs torchvision, so its idioms are written out: `forward_features` and `forward_head`, taps at features,
stochastic depth, layer scale, and a classifier that is asked for and exchanged.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bodies import Calls
from cases import Case, Inputs, rand
from harness import Apart, Split, adam, assert_same, assert_step, gradients, replay_rng, scalar
from torch import Tensor, nn

import splitfed

# What torch_geometric does when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script.*` is deprecated:DeprecationWarning")
STEPS = 20
MODES: dict[str, dict[str, Any]] = {
    "graph_kept": {},
    "recomputed": {"keep_graphs": 0},
    "two_replicas": {"wire": Apart, "replicas": 2},
}


def graph_net(convolution: Callable[[int, int], nn.Module], *, pooled: bool) -> nn.Module:
    """Three convolutions over a graph that is an argument of each call; the second is the body."""

    def forward(m: Any, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        from torch_geometric.nn import global_mean_pool

        x = m.first(x, edge_index).relu()
        x = m.body(x, edge_index).relu()
        x = m.last(x, edge_index)
        return m.head(global_mean_pool(x, batch)) if pooled else m.head(x)

    parts = {"first": convolution(6, 8), "body": convolution(8, 8), "last": convolution(8, 8)}
    return Calls(forward, **parts, head=nn.Linear(8, 3))


def pooling_net() -> nn.Module:
    """A body that convolves and pools, and gets the assignment of nodes to graphs."""
    from torch_geometric.nn import GCNConv, global_add_pool, global_max_pool

    def pool(m: Any, x: Tensor, edge_index: Tensor, batch: Tensor, size: int) -> Tensor:
        x = m.conv(x, edge_index).relu()
        return torch.cat([global_add_pool(x, batch, size), global_max_pool(x, batch, size)], dim=1)

    def forward(m: Any, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        return m.head(m.body(m.bottom(x).relu(), edge_index, batch, size=2))

    body = Calls(pool, conv=GCNConv(8, 8))
    return Calls(forward, bottom=nn.Linear(6, 8), body=body, head=nn.Linear(16, 3))


def gcn(width: int, out: int) -> nn.Module:
    """A graph convolution that keeps nothing between calls."""
    from torch_geometric.nn import GCNConv

    return GCNConv(width, out, cached=False)


def gat(width: int, out: int) -> nn.Module:
    """Graph attention with dropout."""
    from torch_geometric.nn import GATConv

    return GATConv(width, out // 2, heads=2, dropout=0.3)


def sage(width: int, out: int) -> nn.Module:
    """GraphSAGE."""
    from torch_geometric.nn import SAGEConv

    return SAGEConv(width, out)


def graph() -> Inputs:
    """Features `(7, 6)` of the nodes of two graphs, edges that are others each time, and which graph a node is of."""
    edges = torch.cat([torch.randint(0, 4, (2, 9)), torch.randint(4, 7, (2, 6))], dim=1)
    return (torch.randn(7, 6), edges, torch.tensor([0, 0, 0, 0, 1, 1, 1])), {}


class DropPath(nn.Module):
    """Stochastic depth, as timm has it: whole samples are dropped, the others scaled."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Some rows of zeros in train mode."""
        if not self.training:
            return x
        kept = x.new_empty((len(x), *[1] * (x.dim() - 1))).bernoulli_(1 - self.rate)
        return x * kept.div_(1 - self.rate)


class LayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """Scaled."""
        return x * self.gamma


class Block(nn.Module):
    """A transformer block of timm's: attention and MLP, each with layer scale and stochastic depth."""

    def __init__(self, width: int, rate: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))
        self.ls1, self.ls2 = LayerScale(width), LayerScale(width)
        self.drop_path = DropPath(rate) if rate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, C) -> (N, L, C)."""
        normed = self.norm1(x)
        x = x + self.drop_path(self.ls1(self.attn(normed, normed, normed, need_weights=False)[0]))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class VisionTransformer(nn.Module):
    """timm's interface around three blocks."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.num_features = 8
        self.patch_embed = nn.Conv2d(2, 8, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.blocks = nn.Sequential(*(Block(8, rate * i / 2) for i in range(3)))
        self.norm, self.head_drop, self.head = nn.LayerNorm(8), nn.Dropout(rate), nn.Linear(8, 3)

    def embed(self, x: Tensor) -> Tensor:
        """Patches and the class token `(N, L, C)`."""
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)

    def forward_features(self, x: Tensor) -> Tensor:
        """The tokens before the head."""
        return self.norm(self.blocks(self.embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The class token's logits, or what they are made of."""
        x = self.head_drop(x[:, 0])
        return x if pre_logits else self.head(x)

    def forward_taps(self, x: Tensor) -> list[Tensor]:
        """The tokens after each block."""
        taps = [self.embed(x)]
        for block in self.blocks:
            taps.append(block(taps[-1]))
        return taps[1:]

    def forward(self, x: Tensor) -> Tensor:
        """Images `(N, 2, H, W)` -> logits `(N, 3)`."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Another head."""
        self.head = nn.Linear(self.num_features, num_classes)


def taps() -> nn.Module:
    """A loss over features of several depths."""
    return Calls(lambda m, x: torch.cat(m.net.forward_taps(x), dim=2), net=VisionTransformer())


def lora(**settings: Any) -> nn.Module:
    """An MLP with two adapters of PEFT, of which the second is active."""
    import peft

    base = Calls(lambda m, x: m.head(m.body(m.bottom(x)).relu()), bottom=nn.Linear(6, 8), body=nn.Linear(8, 8))
    base.add_module("head", nn.Linear(8, 3))
    config = peft.LoraConfig(target_modules=["bottom", "body"], r=2, lora_dropout=0.2, init_lora_weights=False)
    model: Any = peft.get_peft_model(base, config)
    model.add_adapter("other", peft.LoraConfig(target_modules=["body"], r=3, init_lora_weights=False, **settings))
    model.set_adapter("other")
    whole: nn.Module = model
    return whole


CASES = [
    Case("gcn", lambda: graph_net(gcn, pooled=True), "body", graph),
    Case("gat", lambda: graph_net(gat, pooled=False), "body", graph, draws=True),
    Case("sage", lambda: graph_net(sage, pooled=True), "body", graph),
    Case("pooling", pooling_net, "body", graph),
    Case("timm", VisionTransformer, "blocks.1", rand(2, 2, 8, 8)),
    Case("timm_drop_path", lambda: VisionTransformer(0.3), "blocks.1:3", rand(2, 2, 8, 8), draws=True),
    Case("timm_taps", taps, "net.blocks.1", rand(2, 2, 8, 8), grouped=True),
    Case("peft_second_adapter", lora, "base_model.model.body", rand(4, 6)),
    Case("peft_dora", lambda: lora(use_dora=True), "base_model.model.body", rand(4, 6)),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_twenty_steps_have_the_bits_of_the_reference(case: Case, mode: str) -> None:
    """Outputs, gradients, generator and weights, with a commit at each step."""
    split = Split(case.model(), case.at, f"memory://{uuid.uuid4()}", **MODES[mode])
    reference = splitfed.reference(case.model(), case.at)
    own = {name for name, _ in split.client.named_parameters()}
    sides: dict[bool, list[Any]] = {True: [], False: []}
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            sides[name in own].append(parameter)
    local = [adam(side) for side in (list(filter(lambda p: p.requires_grad, split.client.parameters())),) if side]
    plain = [adam(side) for side in sides.values() if side]
    for _ in range(STEPS):
        assert_step(split, reference, case.inputs())
        for optimizer in (*local, *plain):
            optimizer.step()
        assert split.accumulator.step() is not None
    assert split.store.latest_version() == STEPS
    assert_same(split.state(), reference.state_dict(), "state")


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if case.raw])
def test_the_reference_is_the_raw_model(case: Case) -> None:
    """Where nothing is drawn and no sum grouped, a step has the bits of the model itself."""
    found = []
    inputs, _ = case.inputs()
    for net in (splitfed.reference(case.model(), case.at), case.model()):
        scalar(net(*inputs)).backward()
        found.append(gradients(net))
    assert_same(*found)


def test_forward_in_two_steps() -> None:
    """client.forward_features, then client.forward_head, as feature extractors do: one batch, the reference's bits."""
    net = VisionTransformer(0.2)
    split, reference = Split(net, "blocks.1", f"memory://{uuid.uuid4()}"), splitfed.reference(net, "blocks.1")
    x = torch.randn(3, 2, 8, 8)
    rewind = replay_rng()
    for model in (split.client, reference):
        features = model.forward_features(x)
        scalar((features, model.forward_head(features, pre_logits=True), model.forward_head(features))).backward()
        if model is split.client:
            rewind()
    assert_same(split.gradients(), gradients(reference))
    assert [record.num_samples for record in split.waiting()] == [3]


def test_another_classifier() -> None:
    """client.reset_classifier exchanges the half's head, which optimizer and joined model have then."""
    split = Split(VisionTransformer(), "blocks.1", f"memory://{uuid.uuid4()}")
    assert split.client.get_classifier() is split.half.head
    split.client.reset_classifier(5)
    assert split.client.head is split.half.head
    local = adam(split.client.parameters())
    whole = splitfed.reference(splitfed.join(split.client, split.store.load_weights()), "blocks.1")
    assert_step(split, whole, ((torch.randn(2, 2, 8, 8),), {}))
    before = split.half.head.weight.clone()
    local.step()
    assert before.shape == (5, 8)
    assert not torch.equal(before, split.half.head.weight)


def test_adapters_are_merged_after_the_join() -> None:
    """The joined model is PEFT's own: merged, it computes what the client does up to rounding."""
    split = Split(lora(), "base_model.model.body", f"memory://{uuid.uuid4()}")
    x = torch.randn(4, 6)
    split.client.eval()
    joined: Any = splitfed.join(split.client, split.store.load_weights())
    with torch.no_grad():
        expected = split.client(x)
        assert torch.equal(joined(x), expected)
        merged = joined.merge_and_unload()
        assert torch.allclose(merged(x), expected, rtol=0, atol=1e-5)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]


def test_adapters_for_the_client_are_warned_of() -> None:
    """PEFT puts them on the half alone, where the unsplit model would have some in the body too."""
    import peft

    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    split = Split(model, "1", f"memory://{uuid.uuid4()}")
    with pytest.warns(UserWarning, match="put on the half alone.*before split"):
        peft.get_peft_model(split.client, peft.LoraConfig(target_modules="all-linear", r=2))
