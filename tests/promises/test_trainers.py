"""Trainers that are handed a SplitClient as their model: Hugging Face's Trainer, Accelerate, Lightning, Opacus."""

from __future__ import annotations

import copy
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bodies import sandwich
from harness import Split, assert_close, assert_same, gradients
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

import splitfed

STEPS = 3


def sgd(params: Any) -> torch.optim.Optimizer:
    """What both sides step with."""
    return torch.optim.SGD(params, lr=0.5)


def memory(model: nn.Module, at: str, **settings: Any) -> Split:
    """A split model in memory."""
    return Split(model, at, f"memory://{uuid.uuid4()}", optimizer=sgd, **settings)


# ------------------------------------------------------------------------------------------ Hugging Face's Trainer


def language_model() -> Any:
    """A tiny Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 16}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False))


def rows(count: int) -> list[dict[str, Tensor]]:
    """Token ids and their labels, some of which don't count."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        ids = torch.randint(3, 32, (6,), generator=generator)
        labels = ids.clone()
        labels[: number % 3] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def trainer(model: nn.Module, folder: Path, *callbacks: Any, **settings: Any) -> Any:
    """A Trainer with SGD, on the CPU, that reports to nobody."""
    from transformers import Trainer, TrainingArguments

    usual = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
    }
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", "max_grad_norm": 0.0}
    arguments = TrainingArguments(
        output_dir=str(folder), optim="sgd", **{**usual, **quiet, "save_strategy": "no", **settings}
    )
    given = rows(16)
    return Trainer(model=model, args=arguments, train_dataset=given, eval_dataset=given[:4], callbacks=list(callbacks))


def committing(split: Split) -> Any:
    """A callback that commits after each step, which is one batch."""
    from transformers import TrainerCallback

    class Commits(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            commit = split.accumulator.step()
            assert commit is not None
            assert commit.num_batches == 1

    return Commits()


@pytest.fixture(autouse=True)
def accelerate_reset() -> Iterator[None]:
    """Forget the process-wide state that an Accelerator leaves behind."""
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_trainer_has_the_weights_of_the_unsplit_model(accumulation: int, tmp_path: Path) -> None:
    """Without settings of ours each step is one batch, also where it accumulates: the bits of the whole model."""
    model = language_model()
    split = memory(model, "model.layers.0")
    reference = splitfed.reference(model, "model.layers.0")
    settings = {"gradient_accumulation_steps": accumulation}
    trainer(split.client, tmp_path, committing(split), **settings).train()
    trainer(reference, tmp_path, **settings).train()
    assert split.store.latest_version() == STEPS
    assert_same(split.state(), reference.state_dict())


def test_trainer_evaluates_and_loads_the_best_without_settings(tmp_path: Path) -> None:
    """It finds the labels in the class, so there is an eval_loss, by which it finds the best half and loads it."""
    split = memory(language_model(), "model.layers.0")
    made = trainer(
        split.client,
        tmp_path,
        committing(split),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        label_smoothing_factor=0.0,
    )
    assert made.label_names == ["labels"]
    made.train()
    losses = {row["step"]: row["eval_loss"] for row in made.state.log_history if "eval_loss" in row}
    assert list(losses) == [1, 2, 3]
    best = min(losses, key=lambda step: losses[step])
    assert made.state.best_metric == losses[best]
    from safetensors.torch import load_file

    assert_same(split.half.state_dict(), load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors"))
    with split.client.at(best):
        assert made.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-6)


def test_trainer_smooths_labels_as_of_the_unsplit_model(tmp_path: Path) -> None:
    """It shifts the labels of causal models, which it tells by the name of the model."""
    model = language_model()
    split = memory(model, "model.layers.0")
    for net in (split.client, model):
        made = trainer(net, tmp_path, *([committing(split)] if net is split.client else []), label_smoothing_factor=0.1)
        made.train()
    assert_close(split.state(), model.state_dict(), 1e-6)


# ------------------------------------------------------------------------------------------------------ Accelerate


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs `(4, 6)` and targets."""
    return [(torch.randn(4, 6), torch.randn(4, 3)) for _ in range(count)]


def net() -> nn.Module:
    """A bottom, a body without draws, and a head."""
    torch.manual_seed(1)
    return sandwich(nn.Sequential(nn.Linear(8, 8), nn.Tanh()))


@pytest.mark.parametrize("loss_scale", [1.0, 1 / 2], ids=["nothing_said", "loss_scale"])
def test_accelerate_accumulates(loss_scale: float) -> None:
    """The plain loop's weights, with nothing said (one batch a step), and with loss_scale=1/k (k batches a commit)."""
    from accelerate import Accelerator

    model = net()
    split = memory(model, "body", loss_scale=loss_scale, min_batches=1 if loss_scale == 1 else 2)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    client, optimizer = accelerator.prepare(split.client, sgd(split.client.parameters()))
    plain = sgd(model.parameters())
    for number, (x, y) in enumerate(batches(6)):
        with accelerator.accumulate(client):
            accelerator.backward(mse_loss(client(x), y))
            optimizer.step()
            optimizer.zero_grad()
        (mse_loss(model(x), y) / 2).backward()
        if number % 2:
            plain.step()
            plain.zero_grad()
            commit = split.accumulator.step()
            assert commit is not None
            assert commit.num_samples == 8
    assert_close(split.state(), model.state_dict(), 1e-6)


def test_accelerate_saves_and_loads_the_half(tmp_path: Path) -> None:
    """save_state and load_state take the client for a model of the half's parameters."""
    from accelerate import Accelerator

    split = memory(net(), "body")
    accelerator = Accelerator(cpu=True)
    client, optimizer = accelerator.prepare(split.client, sgd(split.client.parameters()))
    accelerator.save_state(str(tmp_path))
    saved = copy.deepcopy(split.half.state_dict())
    (x, y), *_ = batches(1)
    accelerator.backward(mse_loss(client(x), y))
    optimizer.step()
    assert not torch.equal(saved["head.weight"], split.half.head.weight)
    accelerator.load_state(str(tmp_path))
    assert_same(split.half.state_dict(), saved)
    assert accelerator.unwrap_model(client) is split.client


# ------------------------------------------------------------------------------------------------------- Lightning


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_lightning_has_the_weights_of_the_unsplit_model(tmp_path: Path) -> None:
    """A LightningModule that holds a client: the loop, its checkpoint, and a commit a step in a hook."""
    pytest.importorskip("pytorch_lightning")
    import logging

    import pytorch_lightning as lightning

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self, inner: nn.Module, commit: Callable[[], Any]) -> None:
            super().__init__()
            self.inner, self.commit = inner, commit

        def training_step(self, batch: list[Tensor], number: int) -> Tensor:
            x, y = batch
            return mse_loss(self.inner(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self.parameters())

        def on_train_batch_end(self, *args: Any) -> None:
            self.commit()

    model = net()
    split = memory(model, "body")
    x, y = torch.randn(12, 6), torch.randn(12, 3)
    for inner, commit in ((split.client, split.accumulator.step), (model, lambda: None)):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        made = lightning.Trainer(
            max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, enable_checkpointing=False, **quiet
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning")
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            made.fit(Module(inner, commit), DataLoader(TensorDataset(x, y), batch_size=4))
    assert split.store.latest_version() == 3
    assert_close(split.state(), model.state_dict(), 1e-6)


# ---------------------------------------------------------------------------------------------------------- Opacus


@pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning", "ignore:Full backward hook is firing")
def test_opacus_in_the_half() -> None:
    """Per-sample gradients of the half are the unsplit model's; the rest is said once; empty batches step by noise."""
    pytest.importorskip("opacus")
    from opacus import PrivacyEngine
    from opacus.optimizers import DPOptimizer

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))
    split = memory(model, "1:3")
    data = TensorDataset(torch.randn(12, 6), torch.randint(0, 3, (12,)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        private, optimizer, loader = PrivacyEngine().make_private(
            module=split.client,
            optimizer=sgd(split.client.parameters()),
            data_loader=DataLoader(data, batch_size=2),
            noise_multiplier=0.5,
            max_grad_norm=1.0,
        )
    assert isinstance(optimizer, DPOptimizer)
    assert len([w for w in caught if "taken in the half alone" in str(w.message)]) == 1
    assert split.client.pull() == 0
    sizes = []
    for x, y in [*loader, (torch.empty(0, 6), torch.empty(0, dtype=torch.long))]:
        before = split.half[0].weight.clone()
        optimizer.zero_grad()
        cross_entropy(private(x), y).backward()
        optimizer.step()
        assert not torch.equal(before, split.half[0].weight)
        assert split.half[0].weight.isfinite().all()
        assert (split.accumulator.step() is None) is (len(x) == 0)
        sizes.append(len(x))
    assert 0 in sizes
    split.client.push(num_samples=12)
    assert len(split.store.waiting("client")) == 1


@pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning", "ignore:Full backward hook is firing")
def test_per_sample_gradients_are_those_of_the_unsplit_model() -> None:
    """As Opacus computes them in either, from the gradients that cross the cut."""
    pytest.importorskip("opacus")
    from opacus import GradSampleModule

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))
    split = memory(model, "1:3")
    x, y = torch.randn(5, 6), torch.randint(0, 3, (5,))
    with pytest.warns(UserWarning, match="taken in the half alone"):
        private = GradSampleModule(split.client)
    found = []
    for net_ in (private, GradSampleModule(model)):
        cross_entropy(net_(x), y).backward()
        found.append({n.removeprefix("_module."): p.grad_sample for n, p in net_.named_parameters()})
    assert_same(found[0], {name: found[1][name] for name in found[0]})
    assert gradients(split.client).keys() == found[0].keys()
