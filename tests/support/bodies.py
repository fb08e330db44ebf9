"""Models of many kinds to be cut: small, in float32, with p > 0 wherever there is dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Calls(nn.Module):
    """Submodules, and a function that calls them: a model whose forward stands where it is used."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the function makes of the submodules."""
        return self.run(self, *args, **kwargs)


class Pair(NamedTuple):
    """What a body may return."""

    left: Tensor
    right: Tensor


def with_buffers() -> nn.Module:
    """One buffer that is kept, one that isn't, and one that is None."""
    module = Calls(lambda m, x: x, layer=nn.Linear(2, 2))
    module.register_buffer("kept", torch.ones(2))
    module.register_buffer("scratch", torch.tensor([1.0, 2.0]), persistent=False)
    module.register_buffer("none", None)
    return module


def sandwich(body: nn.Module, width: int = 8) -> nn.Module:
    """`body` `(N, width)` -> `(N, width)` between a bottom and a head."""
    return Calls(
        lambda m, x: m.head(m.body(m.bottom(x))), bottom=nn.Linear(6, width), body=body, head=nn.Linear(width, 3)
    )


def noisy() -> nn.Module:
    """BatchNorm and dropout in the body, dropout at the client too; `(N, 6)` -> `(N, 3)`."""
    model = sandwich(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 8)))
    model.noise = nn.Dropout(0.1)
    model.run = lambda m, x: m.head(m.noise(m.body(m.bottom(x))))
    return model


def conv_block(channels: int) -> nn.Sequential:
    """Convolution, BatchNorm and ReLU `(N, channels, H, W)`."""
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def pooled(*layers: nn.Module) -> nn.Sequential:
    """Layers over images `(N, 2, H, W)` of which the last has 4 channels, and a head `(N, 3)`."""
    return nn.Sequential(nn.Conv2d(2, 4, 3), *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))


def lstm() -> nn.Module:
    """A recurrent body whose state, a tuple, comes from the client and goes back to it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        state = m.start.weight.view(2, 2, 1, 8).expand(2, 2, len(x), 8)
        out, (hidden, cell) = m.body(m.bottom(x), (state[0].contiguous(), state[1].tanh()))
        return m.head(torch.cat([out[:, -1], hidden[-1], cell[0]], dim=1))

    body = nn.LSTM(8, 8, num_layers=2, batch_first=True, dropout=0.3)
    return Calls(forward, bottom=nn.Linear(6, 8), start=nn.Embedding(4, 8), body=body, head=nn.Linear(24, 3))


def transformer() -> nn.Module:
    """A transformer layer that gets its padding mask by keyword."""

    def forward(m: Any, x: Tensor, *, padding: Tensor) -> Tensor:
        return m.head(m.body(m.bottom(x), src_key_padding_mask=padding, is_causal=False))

    body = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.2, batch_first=True)
    return Calls(forward, bottom=nn.Linear(6, 8), body=body, head=nn.Linear(8, 3))


def control_flow() -> nn.Module:
    """A body whose path depends on the data and on a plain integer."""

    def path(m: Any, x: Tensor, times: int, scale: float | None) -> Tensor:
        for _ in range(times):
            x = m.up(x) if bool(x.sum() > 0) else -m.down(x)
        return x if scale is None else x * scale

    body = Calls(path, up=nn.Linear(8, 8), down=nn.Linear(8, 8))

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.body(m.bottom(x), 1 + int(x[0, 0] > 0), scale=0.5 if x[0, 1] > 0 else None))

    return Calls(forward, bottom=nn.Linear(6, 8), body=body, head=nn.Linear(8, 3))


def densenet() -> nn.Module:
    """MONAI's DenseNet121, narrow and with fewer blocks; the first is the body."""
    from monai.networks.nets.densenet import DenseNet121

    narrow = {"init_features": 8, "growth_rate": 4, "block_config": (6, 2)}
    return DenseNet121(spatial_dims=2, in_channels=1, out_channels=3, dropout_prob=0.2, **narrow)


def unet() -> nn.Module:
    """MONAI's UNet; its inner levels are the body."""
    from monai.networks.nets.unet import UNet

    channels, strides = (4, 8, 16), (2, 2)
    return UNet(2, 1, 2, channels=channels, strides=strides, num_res_units=1, norm="batch", dropout=0.2)


def hugging_face(kind: str) -> nn.Module:
    """A tiny BERT or GPT-2 of random weights, from its config alone."""
    if kind == "bert":
        from transformers import BertConfig, BertModel

        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        model: nn.Module = BertModel(BertConfig(vocab_size=20, **sizes, use_cache=False))
    else:
        from transformers import GPT2Config, GPT2Model

        model = GPT2Model(GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2, use_cache=False))
    return Calls(
        lambda m, embedded, mask: m.model(inputs_embeds=embedded, attention_mask=mask).last_hidden_state, model=model
    )


def residual() -> nn.Module:
    """A residual block that begins with an in-place ReLU."""

    def block(m: Any, x: Tensor) -> Tensor:
        x = m.relu(x)
        return x + m.convolutions(x)

    return pooled(Calls(block, relu=nn.ReLU(inplace=True), convolutions=conv_block(4)))


def tied() -> nn.Module:
    """Two layers of the body with one weight."""
    body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    body[2].weight = body[0].weight
    return sandwich(body)


def twice(body: nn.Module) -> nn.Module:
    """A body that is called twice in a step."""
    model = sandwich(body)
    model.run = lambda m, x: m.head(m.body(m.body(m.bottom(x)).tanh()))
    return model


def container(make: Callable[[Tensor, Tensor], Any], read: Callable[[Any], Tensor]) -> nn.Module:
    """A body that returns a container of two tensors, of which the head reads what it needs."""
    body = Calls(lambda m, x: make(m.left(x), m.right(x)), left=nn.Linear(8, 8), right=nn.Linear(8, 8))
    model = sandwich(body)
    model.run = lambda m, x: m.head(read(m.body(m.bottom(x))))
    return model


def model_output() -> nn.Module:
    """A body that returns a transformers ModelOutput, one of whose fields is None."""
    from transformers.modeling_outputs import BaseModelOutput

    return container(
        lambda a, b: BaseModelOutput(last_hidden_state=a, hidden_states=(b, a)),
        lambda out: out.last_hidden_state + out["hidden_states"][0],
    )


def memory_order() -> nn.Module:
    """Channels-last convolutions and, at both sides, sums of all elements: their bits depend on the order in memory."""

    def summed(m: Any, x: Tensor) -> Tensor:
        return m.block(x) * x.exp().sum() / x.numel()

    model = pooled(Calls(summed, block=conv_block(4)), Calls(summed, block=nn.Conv2d(4, 4, 1)))
    return model.to(memory_format=torch.channels_last)


def frozen() -> nn.Module:
    """A bottom that doesn't train."""
    model = sandwich(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3)))
    model.bottom.requires_grad_(False)
    return model


def two_cuts() -> nn.Module:
    """Two parts in the body, with the client's layers before, between and after them."""
    parts = {"low": nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3)), "high": nn.Sequential(nn.Linear(8, 8), nn.Tanh())}
    clients = {"bottom": nn.Linear(6, 8), "middle": nn.Linear(8, 8), "head": nn.Linear(8, 3)}
    return Calls(lambda m, x: m.head(m.high(m.middle(m.low(m.bottom(x))).relu())), **parts, **clients)


def attention() -> nn.Module:
    """Attention whose query, key and value are one tensor."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.bottom(x)
        return m.head(m.body(x, x, x, need_weights=False)[0])

    body = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)
    return Calls(forward, bottom=nn.Linear(6, 8), body=body, head=nn.Linear(8, 3))


def fan_out() -> nn.Module:
    """An activation that the body uses twice and the client a third time."""
    model = sandwich(Calls(lambda m, x: m.left(x) * x.tanh(), left=nn.Linear(8, 8)))

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.bottom(x)
        return m.head(m.body(x) + x)

    model.run = forward
    return model


def spectral() -> nn.Module:
    """A body, called twice, whose outputs in train mode depend on buffers that each call moves on."""
    return twice(nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Tanh()))


def odd_outputs() -> nn.Module:
    """Outputs of all kinds: views, one tensor twice, integers, booleans, a scalar, an empty one, an input and None."""

    def body(m: Any, x: Tensor) -> dict[str, Any]:
        h = m.lin(x)
        views = {"transposed": h.t(), "expanded": h[:1].expand(5, 8), "every_other": h[:, ::2], "empty": h[:0]}
        return {"h": (h, h), "best": h.argmax(1), "mask": h > 0, "sum": h.sum(), "input": x, "nothing": None, **views}

    def forward(m: Any, x: Tensor) -> Tensor:
        out = m.body(m.bottom(x))
        h = out["h"][0] + out["transposed"].t() * out["mask"] + out["expanded"][0] + out["input"] * out["sum"]
        return m.head(h.relu_() + out["best"][:, None]) + out["every_other"].sum() + out["empty"].sum()

    model = sandwich(Calls(body, lin=nn.Linear(8, 8)))
    model.run = forward
    return model


def embedding() -> nn.Module:
    """A body that begins with an embedding: the bottom is empty, and its inputs are integers."""
    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def sample(dtype: torch.dtype) -> Tensor:
    """The numbers 0 to 23 as a 2 × 3 × 4 tensor of this type, as far as it can hold them."""
    numbers = torch.arange(24).reshape(2, 3, 4)
    return numbers % 2 == 0 if dtype is torch.bool else numbers.to(torch.float32).to(dtype)
