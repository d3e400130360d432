"""Labels: what is refused, in which words; the learned table and the draws."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from mmdiff.errors import InputError
from mmdiff.modalities import Label, Shape

SHAPE = Shape((2, 4, 4), 4, 4)


@pytest.mark.parametrize(
    ("raw", "remedy"),
    [
        (5, "is outside 0 … 4; check num_classes, or set unknown: 5 where it means missing"),
        (-1, "is outside 0 … 4; check num_classes, or set unknown: -1 where it means missing"),
        (True, "is no integer class id; check data.columns"),
        (2.5, "is no integer class id; check data.columns"),
        ("2", "is no integer class id; check data.columns"),
        (None, "is no integer class id; check data.columns"),
    ],
)
def test_unusable_values_are_refused_in_one_line(raw: Any, remedy: str) -> None:
    with pytest.raises(InputError) as caught:
        Label(SHAPE, 5).preprocess(raw)
    assert str(caught.value) == f"label = {raw!r}: {remedy}"


@pytest.mark.parametrize("text", ["three", "2.5", ""])
def test_text_that_is_no_class_id_is_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        Label(SHAPE, 5).parse(text)
    assert str(caught.value) == f"label = {text!r}: write a class id, 0 … 4"


def test_a_class_can_be_read_from_a_text_file(tmp_path: Path) -> None:
    label, plain = Label(SHAPE, 3, names=["cat", "7", "a.txt"]), Label(SHAPE, 20)
    for shown, written in enumerate(["cat\n", "7\n", "a.txt\n"]):
        path = label.save(shown, tmp_path / f"{shown}.of 3")
        assert path == tmp_path / f"{shown}.of 3.txt" and path.read_text() == written
        assert label.parse(str(path)) == shown
    assert plain.parse(str(plain.save(12, tmp_path / "plain"))) == 12
    assert label.parse("a.txt") == 2  # a name comes first
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    for text, remedy in (("none.txt", "no such file"), ("binary.txt", "is no text file"), ("0.of 3.txt", "write a cl")):
        with pytest.raises(InputError) as caught:
            plain.parse(str(tmp_path / text))
        assert remedy in str(caught.value) and "\n" not in str(caught.value)


def test_a_class_can_be_written_by_its_name() -> None:
    label = Label(SHAPE, 3, names=["cat", "7", "dog"])
    assert [label.parse(text) for text in ("cat", "dog", "1", "7")] == [0, 2, 1, 1]  # a name comes first
    with pytest.raises(InputError, match="label = 'cow': write a class id, 0 … 2, or a name: cat, 7, dog"):
        label.parse("cow")
    with pytest.raises(InputError, match=r"names = \['cat'\]: needs 3 entries"):
        Label(SHAPE, 3, names=["cat"])


@pytest.mark.parametrize("value", [[5], [0, -1]])
def test_batches_outside_the_classes_are_refused(value: list[int]) -> None:
    with pytest.raises(InputError, match=f"label = {value[-1]}: is outside 0 … 4"):
        Label(SHAPE, 5).check(torch.tensor(value))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_batches_that_would_index_as_masks_are_refused(dtype: torch.dtype) -> None:
    """torch reads such an index as a mask: another table, of another shape."""
    with pytest.raises(InputError, match="int64"):
        Label(SHAPE, 5).check(torch.ones(5, dtype=dtype))


def test_one_class_is_no_label() -> None:
    with pytest.raises(InputError, match="num_classes = 1: "):
        Label(SHAPE, 1)


@pytest.mark.parametrize("values", [[], [None], [1, 0.5], [1, "a"], [[1]], [float("nan")]])
def test_columns_without_classes_are_refused(values: list[Any]) -> None:
    with pytest.raises(InputError, match="^label = "):
        Label.settings_from_data(datasets.Value("int64"), values)


NAMED = datasets.ClassLabel(names=["a", "b", "c"])
COLUMNS = {
    "ids": (datasets.Value("int64"), [0, 1, 2] * 4, {"num_classes": 3}),
    "declared": (NAMED, [0, 1, 2] * 4, {"num_classes": 3, "names": ["a", "b", "c"], "unknown": -1}),
    "declared, some unknown": (NAMED, [0, 1, 2, -1] * 3, {"num_classes": 3, "names": ["a", "b", "c"], "unknown": -1}),
    "text": (datasets.Value("string"), ["dog", "cat"] * 6, {"num_classes": 2, "names": ["cat", "dog"], "show": "name"}),
    "bool": (datasets.Value("bool"), [True, False] * 6, {"num_classes": 2, "names": ["false", "true"]}),
    "floats": (datasets.Value("float64"), [0.0, 1.0, float("nan")] * 4, {"num_classes": 2}),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_settings_are_read_off_every_kind_of_column(name: str) -> None:
    feature, values, expected = COLUMNS[name]
    settings = Label.settings_from_data(feature, values)
    assert settings == expected
    label = Label(SHAPE, **settings)
    present = [value for value in values if not label.is_missing(value)]
    classes = torch.stack([label.preprocess(value) for value in present])
    assert classes.unique().tolist() == list(range(label.num_classes))
    shown = label.postprocess(classes)
    assert torch.equal(torch.stack([label.preprocess(one) for one in shown]), classes)  # they come back as given


@pytest.mark.parametrize(
    ("feature", "values", "found"),
    [
        (NAMED, [0, 1] * 6, "no row has these classes"),
        (datasets.Value("int64"), [0, 2] * 6, "no row has these classes"),
        (datasets.Value("int64"), list(range(12)), "more than half of the 12 rows"),
        (datasets.Value("string"), [f"name {k}" for k in range(12)], "more than half of the 12 rows"),
        (datasets.Value("int64"), [-1, 0, 1] * 4, "set unknown: -1"),
    ],
)
def test_classes_that_make_no_sense_are_refused_with_a_remedy(feature: Any, values: list[Any], found: str) -> None:
    with pytest.raises(InputError, match=found):
        Label.settings_from_data(feature, values)
    compact = Label.settings_from_data(feature, values, classes="compact")
    assert compact["num_classes"] == len(set(values))
    unknown = Label.settings_from_data(feature, [*values, 99], classes="compact", unknown=99)
    assert unknown["num_classes"] == len(set(values))


def test_compact_classes_keep_their_ids_and_names() -> None:
    label = Label(SHAPE, **{**Label.settings_from_data(NAMED, [0, 2] * 6, classes="compact"), "classes": "compact"})
    assert label.names == ["a", "c"] and label.preprocess(2).item() == label.preprocess("c").item() == 1
    assert label.postprocess(torch.tensor([0, 1])) == [0, 2]


def test_names_are_classes_in_python_too() -> None:
    label = Label(SHAPE, 3, names=["a", "b", "c"], show="name")
    assert label.preprocess("b").item() == 1 and label.postprocess(torch.tensor([1])) == ["b"]
    with pytest.raises(InputError, match="'d': is no class; write a name: a, b, c"):
        label.preprocess("d")


@pytest.mark.parametrize("name", ["red\x1b[31m", "two\nlines", "\u202egnirts", ""])
def test_a_class_name_holds_nothing_that_a_terminal_obeys(name: str) -> None:
    with pytest.raises(InputError, match="^names = ") as refusal:
        Label(SHAPE, 2, names=["a", name])
    assert "\x1b" not in str(refusal.value) and "\u202e" not in str(refusal.value)


@pytest.mark.parametrize("growth", [1e-2, 1e3])
def test_a_growing_table_encodes_the_same(growth: float) -> None:
    label = Label(SHAPE, 5)
    before = label.encode(torch.arange(5))
    torch.testing.assert_close(before.square().mean(dim=(1, 2, 3)), torch.ones(5), rtol=1e-5, atol=0)
    with torch.no_grad():
        label.table *= growth
    torch.testing.assert_close(label.encode(torch.arange(5)), before, rtol=1e-5, atol=1e-6)


def test_a_coarse_table_is_a_pattern_of_blocks() -> None:
    label = Label(SHAPE, 5, table_size=2)
    encoding = label.encode(torch.arange(5))  # (5, 2, 4, 4): every number fills 2×2 pixels
    assert label.table.shape == (5, 2, 2, 2)
    assert torch.equal(encoding, encoding[..., ::2, ::2].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    assert len(encoding[0, 0].unique()) == 4


@pytest.mark.parametrize("table_size", [-1, 0, 5])
def test_impossible_table_sizes_are_refused(table_size: int) -> None:
    """Finer than the 4×4 space some entries would never be seen; 0 would mean the default."""
    with pytest.raises(InputError, match=f"table_size = {table_size}: "):
        Label(SHAPE, 5, table_size=table_size)


def test_draws_have_the_probabilities_of_the_head() -> None:
    """Also at probability 0 and where float32 sums to less than 1."""
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3 - 1e-6, 1e-6])
    count = 20_000
    noise = torch.randn(count, 1, generator=torch.Generator().manual_seed(0))
    drawn = Label(SHAPE, 5).sample(probabilities.log().expand(count, 5), noise)
    shares = torch.bincount(drawn, minlength=5) / count
    error = 4 * (probabilities * (1 - probabilities) / count).sqrt()
    assert ((shares - probabilities).abs() <= error + 1 / count).all()
    assert not (drawn == 1).any()


@pytest.mark.parametrize(("noise", "expected"), [(-math.inf, 0), (-9.0, 0), (9.0, 4), (math.inf, 4)])
def test_extreme_noise_draws_a_class(noise: float, expected: int) -> None:
    """In float32 Φ(9) = 1, while the probabilities of some rows sum to less."""
    logits = torch.randn(1000, 5, generator=torch.Generator().manual_seed(0))
    assert float(logits.softmax(dim=1).cumsum(dim=1)[:, -1].min()) < 1.0
    assert set(Label(SHAPE, 5).sample(logits, torch.full((1000, 1), noise)).tolist()) == {expected}


def test_the_gallery_shows_at_most_ten_classes() -> None:
    assert Label(SHAPE, 3).gallery().tolist() == [0, 1, 2]
    assert Label(SHAPE, 100).gallery().tolist() == list(range(10))
