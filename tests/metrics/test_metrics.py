"""Metrics against closed forms and on data whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, precision_score, recall_score
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from mmdiff.errors import InputError
from mmdiff.metrics.bootstrap import interval, scored, statistic_interval
from mmdiff.metrics.classification import class_shares, classification, retrieval
from mmdiff.metrics.image import PSNR_OF_EQUAL, psnr, spread, ssim
from mmdiff.metrics.neighbours import MEMORISED_EXPECTED, Judge, MemorisationTest
from mmdiff.metrics.segmentation import confusions, segmentation


def images(count: int, seed: int, scale: float = 1.0) -> np.ndarray:
    """(n, 1, 4, 4), correlated pixels."""
    mixing = np.random.default_rng(99).standard_normal((16, 16)) / 4
    return (scale * np.random.default_rng(seed).standard_normal((count, 16)) @ mixing).reshape(-1, 1, 4, 4)


def test_fresh_rows_are_memorised_by_half_and_copies_entirely() -> None:
    train, held_out, fresh = images(500, 0), images(500, 1), images(500, 2)
    memory = MemorisationTest(train, held_out)
    share = memory.share(fresh)
    # a share of 500 against a median of 500: both vary with variance ¼ / 500
    assert abs(share - MEMORISED_EXPECTED) < 4 * math.sqrt(2 * 0.25 / 500)
    assert memory.share(train[:100]) == 1.0
    assert memory.share(held_out) == 0.5
    assert memory.share(images(500, 2, scale=10.0)) == 0.0


def test_the_judge_is_right_on_separable_classes() -> None:
    labels = np.arange(300) % 3
    pixels = images(300, 0, scale=0.1) + labels[:, None, None, None]  # classes are 1 apart in each pixel, noise is 0.1
    judge = Judge(pixels[:150], labels[:150])
    assert (judge(pixels[150:]) == labels[150:]).all()
    assert (Judge(pixels[:150], labels[:150], neighbours=1)(pixels[:150]) == labels[:150]).all()


def test_the_judge_is_at_chance_without_a_signal() -> None:
    labels = np.random.default_rng(3).integers(2, size=2000)
    correct = Judge(images(1000, 0), labels[:1000])(images(1000, 1)) == labels[1000:]
    assert abs(correct.mean() - 0.5) < 4 * math.sqrt(0.25 / 1000)


def test_intervals_cover_the_mean() -> None:
    """At n = 100 a percentile interval covers about 0.94; 300 repetitions have a standard error of 0.014."""
    rng = np.random.default_rng(0)
    covered = [low <= 0.7 <= high for low, high in (interval(rng.random(100) < 0.7, k, draws=300) for k in range(300))]
    assert abs(np.mean(covered) - 0.94) < 4 * 0.014


def test_intervals_have_the_width_of_the_normal_law() -> None:
    low, high = interval(np.arange(400) % 2 == 0)
    assert (high - low) / 2 == pytest.approx(1.96 * 0.5 / math.sqrt(400), rel=0.1)  # 2000 draws: quantiles to 5 %
    assert (low + high) / 2 == pytest.approx(0.5, abs=0.01)
    assert interval(np.ones(10)) == (1.0, 1.0)
    assert interval(np.arange(5), seed=1) == interval(np.arange(5), seed=1)


def test_class_shares_are_a_histogram() -> None:
    assert class_shares(np.array([0, 2, 2, 2]), num_classes=4) == [0.25, 0.0, 0.75, 0.0]


def test_scores_carry_their_interval() -> None:
    values = np.random.default_rng(0).random(50)
    assert scored("dB", values) == {"dB": values.mean(), "dB, 95 %": list(interval(values))}


def test_the_interval_of_a_mean_as_a_statistic_is_that_of_the_mean() -> None:
    values = np.random.default_rng(0).standard_normal(300)
    assert statistic_interval(np.mean, values, draws=2000) == pytest.approx(interval(values), abs=1e-12)


def test_a_draw_takes_the_same_rows_of_all_arrays() -> None:
    one = np.random.default_rng(0).standard_normal(200)
    assert statistic_interval(lambda x, y: np.corrcoef(x, y)[0, 1], one, 3 * one, draws=20) == pytest.approx((1, 1))
    # Fisher: atanh of a correlation is normal with variance 1 / (n − 3)
    other = one + np.random.default_rng(1).standard_normal(200)
    low, high = statistic_interval(lambda x, y: np.arctanh(np.corrcoef(x, y)[0, 1]), one, other)
    assert (high - low) / 2 == pytest.approx(1.96 / math.sqrt(197), rel=0.2)


def guesses(count: int, num_classes: int, right: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(predicted, truth): right with a probability, otherwise any class; class 0 is rare and the last never true."""
    rng = np.random.default_rng(seed)
    truth = np.minimum(rng.integers(1, 4 * num_classes, size=count) // 4, num_classes - 2)
    return np.where(rng.random(count) < right, truth, rng.integers(num_classes, size=count)), truth


def test_classification_is_that_of_sklearn() -> None:
    predicted, truth = guesses(300, 5, right=0.6)
    scores = classification(predicted, truth, num_classes=6)  # class 5 never occurs and counts as 0
    assert scores["accuracy"] == (predicted == truth).mean()
    of_five = {"labels": range(5), "average": "macro", "zero_division": 0}
    assert scores["macro precision"] == pytest.approx(precision_score(truth, predicted, **of_five) * 5 / 6)
    assert scores["macro recall"] == pytest.approx(recall_score(truth, predicted, **of_five) * 5 / 6)


def test_intervals_of_macro_means_are_those_of_their_statistics() -> None:
    predicted, truth = guesses(200, 4, right=0.6)
    scores = classification(predicted, truth, num_classes=4)

    def macro(of: np.ndarray, hit: np.ndarray) -> float:
        return float(np.mean([hit[of == k].mean() if (of == k).any() else 0.0 for k in range(4)]))

    for name, of in (("macro precision", predicted), ("macro recall", truth)):
        assert macro(of, predicted == truth) == pytest.approx(scores[name])
        found = statistic_interval(macro, of, predicted == truth)
        assert scores[f"{name}, 95 %"] == pytest.approx(list(found), abs=1e-12)


def test_macro_means_treat_classes_alike() -> None:
    """9 of 10 rows are of class 0, and everything is called class 0."""
    scores = classification(np.zeros(100), np.arange(100) % 10 == 0, num_classes=2)
    assert (scores["accuracy"], scores["macro precision"], scores["macro recall"]) == (0.9, 0.45, 0.5)


def maps(count: int, num_classes: int, void: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(predicted, truth), (n, 6, 5) each; a quarter of the truth is void."""
    predicted, truth = guesses(count * 30, num_classes, right=0.5)
    if void is not None:
        truth[np.random.default_rng(9).random(len(truth)) < 0.25] = void
    return predicted.reshape(count, 6, 5), truth.reshape(count, 6, 5)


@pytest.mark.parametrize("ignore", [None, 255, 2])
def test_miou_is_that_of_torchmetrics(ignore: int | None) -> None:
    predicted, truth = maps(20, 5, void=ignore)
    scores = segmentation(predicted, truth, 7, ignore)  # classes 5 and 6 do not occur
    guess, real = torch.from_numpy(predicted), torch.from_numpy(truth)
    kept = real != (-1 if ignore is None else ignore)
    expected = MulticlassJaccardIndex(7, average="macro", ignore_index=ignore)(guess, real)
    assert scores["mIoU"] == pytest.approx(float(expected), abs=1e-6)
    assert scores["pixel accuracy"] == pytest.approx(float((guess == real)[kept].double().mean()))
    f1 = f1_score(real[kept], guess[kept], labels=range(5), average=None, zero_division=0)
    per_class = [f / (2 - f) for f in f1]  # IoU = tp / (tp + fp + fn), F1 = 2 tp / (2 tp + fp + fn)
    if ignore == 2:
        assert scores["IoU per class"][2] is None
        per_class[2] = None
    assert scores["IoU per class"] == [*(x if x is None else pytest.approx(x) for x in per_class), None, None]


def test_intervals_of_miou_are_over_images() -> None:
    predicted, truth = maps(40, 4, void=255)
    scores = segmentation(predicted, truth, 4, ignore=255)
    low, high = scores["mIoU, 95 %"]

    def slow(p: np.ndarray, t: np.ndarray) -> float:
        return float(
            np.mean(
                [(p[t != 255] == k)[t[t != 255] == k].sum() / ((p == k) | (t == k))[t != 255].sum() for k in range(4)]
            )
        )

    assert slow(predicted, truth) == pytest.approx(scores["mIoU"])
    assert statistic_interval(slow, predicted, truth) == pytest.approx((low, high), abs=1e-12)
    low, high = scores["pixel accuracy, 95 %"]
    assert low < scores["pixel accuracy"] < high
    # the same image again and again: no draw differs
    same = segmentation(predicted[[0] * 5], truth[[0] * 5], 4, ignore=255)
    assert same["mIoU, 95 %"] == pytest.approx([same["mIoU"]] * 2)


def test_confusions_count_every_pixel_that_is_not_void() -> None:
    predicted, truth = maps(3, 4, void=255)
    found = confusions(predicted, truth, 4, ignore=255)
    assert found.dtype == np.int64
    assert (found.sum((1, 2)) == (truth != 255).sum((1, 2))).all()
    for real, guess in np.ndindex(4, 4):
        assert (found[:, real, guess] == ((truth == real) & (predicted == guess)).sum((1, 2))).all()
    assert (confusions(torch.from_numpy(predicted), torch.from_numpy(truth), 4, 255) == found).all()


def test_ids_outside_the_classes_are_named() -> None:
    predicted, truth = maps(3, 4, void=255)
    with pytest.raises(InputError, match="truth = 255: class ids are 0 … 3"):
        segmentation(predicted, truth, 4)
    with pytest.raises(InputError, match="predicted = -1"):
        classification(np.array([0, -1]), np.array([0, 1]), 2)
    with pytest.raises(InputError, match="every pixel"):
        segmentation(predicted, np.full_like(truth, 255), 4, ignore=255)


def test_retrieval_finds_what_is_near_and_is_at_chance_otherwise() -> None:
    rng = np.random.default_rng(0)
    rows, noise = rng.standard_normal((2, 1000, 32))
    near = retrieval(rows, 5 * rows + 0.1 * noise)
    assert near["retrieval@1 among 64"] == 1.0
    assert near["cosine"] > 0.99
    chance = retrieval(rows, noise, among=10)
    assert abs(chance["retrieval@1 among 10"] - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 1000)
    assert abs(chance["cosine"]) < 4 / math.sqrt(1000 * 32)  # the variance of a cosine of random directions is 1 / d
    assert chance["cosine, 95 %"][0] < chance["cosine"] < chance["cosine, 95 %"][1]


def test_retrieval_leaves_out_the_incomplete_group() -> None:
    rows = np.eye(10)
    other = rows.copy()
    other[8:] = rows[[9, 8]]  # wrong, but in the incomplete group of 2
    assert retrieval(rows, other, among=4)["retrieval@1 among 4"] == 1.0
    assert retrieval(rows, other, among=4)["cosine"] == 0.8
    assert retrieval(rows, other, among=64)["retrieval@1 among 10"] == 0.8
    assert retrieval(rows, rows[::-1], among=5)["retrieval@1 among 5"] == 0.2  # own rows elsewhere, all tie: chance


def pictures(size: int = 24, channels: int = 3, noise: float = 0.2) -> tuple[Tensor, Tensor]:
    """(images, truth), (5, C, size, size + 3) each, smooth and in [−1, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = 2 * torch.rand(5, channels, 6, 6, generator=generator) - 1
    truth = torch.nn.functional.interpolate(coarse, (size, size + 3), mode="bilinear")
    return (truth + noise * torch.randn(truth.shape, generator=generator)).clamp(-1, 1), truth


def test_psnr_is_that_of_torchmetrics() -> None:
    images, truth = pictures()
    expected = peak_signal_noise_ratio(images, truth, data_range=2.0, reduction="none", dim=(1, 2, 3))
    assert psnr(images, truth).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert psnr(truth, truth).tolist() == [PSNR_OF_EQUAL] * 5
    assert psnr(torch.ones(1, 1, 4, 4), -torch.ones(1, 1, 4, 4)).tolist() == [0.0]  # the error is the whole range


def test_ssim_is_that_of_torchmetrics_on_intensities() -> None:
    images, truth = pictures()
    expected = structural_similarity_index_measure(
        (images.double() + 1) / 2, (truth.double() + 1) / 2, data_range=1.0, reduction="none"
    )
    assert ssim(images, truth).tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert ssim(truth, truth).tolist() == pytest.approx([1.0] * 5)
    # flat images: the luminance term is left, of means 0.25 and 0.5, with c = 0.01²
    flat = torch.zeros(1, 1, 16, 16)
    assert float(ssim(flat - 0.5, flat)) == pytest.approx((2 * 0.25 * 0.5 + 1e-4) / (0.25**2 + 0.5**2 + 1e-4), abs=2e-4)


@pytest.mark.parametrize("size", [3, 4, 5, 8, 9, 11])
def test_ssim_of_small_images_has_a_window_that_fits(size: int) -> None:
    images, truth = pictures(size, channels=1)
    values = ssim(images, truth)
    assert values.isfinite().all()
    assert (values < 0.99).all()
    # a pixel farther than the window's radius does not count: of an 11 it would
    radius = min(5, (size - 1) // 2)
    changed = truth.clone()
    changed[..., 0] += 0.5
    near, far = (torch.zeros(5, 1, size, size + 3) for _ in range(2))
    near[..., radius], far[..., radius + 1] = 1, 1
    assert (ssim(changed, truth, near) < 1 - 1e-4).all()
    assert ssim(changed, truth, far).tolist() == pytest.approx([1.0] * 5, abs=1e-6)


@pytest.mark.parametrize("score", [psnr, ssim])
def test_a_hole_scores_its_own_pixels(score: type) -> None:
    images, truth = pictures()
    assert torch.allclose(score(images, truth, torch.ones(5, 1, 24, 27)), score(images, truth), atol=1e-5)
    left = torch.zeros(5, 1, 24, 27)
    left[..., :8] = 1
    damaged = images.clone()
    damaged[..., 14:] = 1.0  # farther from the hole than a window's radius
    assert torch.allclose(score(damaged, truth, left), score(images, truth, left), atol=1e-6)
    assert (score(damaged, truth) < score(images, truth)).all()
    with pytest.raises(InputError, match="mask"):
        score(images, truth, left * torch.tensor([1, 1, 0, 1, 1]).reshape(5, 1, 1, 1))


def test_psnr_of_a_hole_is_that_of_its_pixels() -> None:
    images, truth = pictures()
    left = torch.zeros(5, 1, 24, 27, dtype=torch.bool)
    left[..., :8] = True
    assert torch.allclose(psnr(images, truth, left), psnr(images[..., :8], truth[..., :8]))


@pytest.mark.parametrize("score", [psnr, ssim])
def test_more_noise_scores_less(score: type) -> None:
    values = torch.stack([score(*pictures(noise=noise)) for noise in (0.05, 0.1, 0.2, 0.4)])
    assert (values.diff(dim=0) < 0).all()


def test_ssim_refuses_images_of_two_pixels() -> None:
    with pytest.raises(InputError, match=r"evaluate.ssim = \(2, 8\)"):
        ssim(torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8))


def test_the_spread_of_images_is_over_samples_pixel_by_pixel() -> None:
    """Two images ±a: √2 a. Images that differ from pixel to pixel alone have none."""
    ramp = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(1, 3, 2, 2)
    assert spread(torch.cat([ramp, -ramp])) == pytest.approx(2**0.5 * float(ramp.abs().mean()))
    assert spread(ramp.repeat(4, 1, 1, 1)) == 0
