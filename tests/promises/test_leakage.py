"""What the page about a server's view says is so: the attacks succeed, on fewer digits, and what protects protects."""

from __future__ import annotations

import functools

import pytest
import torch
from benchmarks.leakage import __main__ as page
from benchmarks.leakage import inputs, labels, noise, seeds
from benchmarks.leakage.setting import DEMO, HEAD, Run, Setting, train
from pages import ROOT
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate

from splitfed.cli.demo.data import Digits


@functools.cache
def few() -> Digits:
    """Small digits made large, 400 to train on and 400 of the attacker: they load sooner than MNIST's."""
    loaded = load_digits()
    images = torch.tensor(loaded.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(loaded.target)
    large = interpolate(images, size=28, mode="bilinear")
    return Digits(large[:400], labels[:400], large[400:800], labels[400:800])


@functools.cache
def trained(**settings: object) -> Run:
    """A round of two owners."""
    return train(Setting(owners=2, **settings), few())  # type: ignore[arg-type]


def test_every_label_is_found_from_the_first_round_on() -> None:
    """With the averaged head by trying labels; with a personal one by clusters, up to the classes' names."""
    assert labels.by_known_head(trained().seen, DEMO) == 1.0
    assert labels.by_clusters(trained(personal=(HEAD,)).seen) >= 0.99


def test_a_pushed_gradient_tells_how_many_of_each_label_there_are() -> None:
    """Exactly, of every batch."""
    assert labels.by_histogram(trained(gradients=True).seen) == 1.0


def test_inputs_are_found_among_all() -> None:
    """By the averaged half; without it, by some inputs that are known."""
    found, explained = inputs.by_known_half(trained().seen, few(), DEMO)
    assert found >= 0.97
    assert explained >= 0.75
    assert inputs.by_known_inputs(trained().seen, few(), 0.3)[0] >= 0.5


def test_noise_lowers_what_is_found() -> None:
    """On gradients the labels, on activations the inputs."""
    run = trained(on_gradients=3.0, on_activations=4.0)
    assert labels.by_known_head(run.seen, DEMO) < 0.7
    assert inputs.by_known_half(run.seen, few(), DEMO, 4.0)[0] < 0.5


def test_smoothed_labels_are_found_all_the_same() -> None:
    """It moves all gradients alike."""
    assert labels.by_known_head(trained(smoothing=0.1).seen, DEMO) == 1.0


def test_a_seed_is_found_and_the_noise_subtracted() -> None:
    """What is left is rounding; of noise from the system's randomness nothing is found, and all of it is left."""
    search = seeds.demonstrate(300, space=512, images=few().train_images[:4])
    assert (search.found, search.tried) == (300, 301)
    assert search.residual < 1e-6
    hidden = seeds.demonstrate(300, noise.system_normal, 512, few().train_images[:4])
    assert hidden.found in (None, 300), "the seed itself may be found; it holds no noise"
    assert hidden.residual > 1.0


@pytest.mark.parametrize("high", [1, 7, 2**31])
def test_torch_uses_the_lower_half_of_a_seed(high: int) -> None:
    """So there are 2³² streams; were it otherwise some day, the page would have to say so."""
    one, other = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5 + high * 2**32)
    assert torch.equal(torch.randn(9, generator=one), torch.randn(9, generator=other))
    drawn = torch.Generator()
    drawn.seed()
    low = torch.Generator().manual_seed(drawn.initial_seed() % 2**32)
    assert torch.equal(torch.randn(9, generator=drawn), torch.randn(9, generator=low))


def test_noise_of_the_system_is_normal() -> None:
    """Mean, deviation and tails; never infinite; and torch's generator stays where it was."""
    before = torch.get_rng_state()
    drawn = noise.system_normal(torch.Size([100, 2000]))
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn.shape == (100, 2000)
    assert abs(float(drawn.mean())) < 0.02
    for bound, share in [(1.0, 0.6827), (2.0, 0.9545), (3.0, 0.9973)]:
        assert abs(float((drawn.abs() < bound).double().mean()) - share) < 0.01
    assert drawn.isfinite().all()


def test_rows_are_clipped_before_noise_is_added() -> None:
    """A row of 4 within the bound 0.5 / 2 stays, one above it is scaled to it."""
    rows = torch.tensor([[3.0, 4.0], [0.03, 0.04]])
    assert noise.noisy_gradients(rows, 0.0).tolist() == [pytest.approx([0.15, 0.2]), pytest.approx([0.03, 0.04])]


def test_the_page_has_the_tables_and_the_recipe() -> None:
    """Its marks are those that are filled, and its noise is the one that is tested here."""
    text = (ROOT / "docs/privacy.md").read_text("utf-8")
    for name in ("attacks", "seeds", "protections"):
        filled = page.filled(text, name, page.table(["a", "b"], [["1", "2"]]))
        assert f"<!-- {name} -->\n| a | b |\n| --- | --- |\n| 1 | 2 |\n<!-- end -->" in filled
    for line in ("os.urandom(8 * shape.numel())", "2**52 - 1)).double() + 0.5) / 2**52", "ndtri(uniform).float()"):
        assert line in text
    assert all(f"| {name} |" in text for name in page.PROTECTIONS)
