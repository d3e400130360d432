"""`mmdiff evaluate`: every direction that a model was trained for is scored, repeatably, and the file says how."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from mmdiff.build import Experiment, build, build_table, open_rows
from mmdiff.config import load_config, parse_config
from mmdiff.data.shapes.readers import read_label
from mmdiff.errors import InputError
from mmdiff.evaluation import evaluate as evaluators
from mmdiff.evaluation import report as records
from mmdiff.evaluation.draws import PICTURED, draw
from mmdiff.evaluation.evaluator import Evaluator
from mmdiff.evaluation.report import Evaluation, Row
from mmdiff.grids import FONT_SIZE
from mmdiff.metrics.neighbours import Judge
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.training import train

Cli = Callable[..., Any]
Tree = dict[str, Any]
BACKBONE = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "patch_size": 2,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
MASKS = {"few": {"pattern": "squares", "ratio": 0.2}, "half": {"pattern": "half", "ratio": 0.5}}


def shapes(*auxiliary: str, **sections: Tree) -> Tree:
    """An experiment on 64 shapes of 16 pixels with these auxiliary modalities, none of which is aggregated."""
    kinds = {name: {"kind": name, "weight": {"schedule": "none"}} for name in auxiliary}
    tree: Tree = {
        "name": "tiny",
        "data": {"source": "shapes", "options": {"rows": 64, "validation_rows": 32, "size": 16}},
        "modalities": {"image": {"kind": "image"}, **kinds},
        "backbone": BACKBONE,
        "scheduler": {"num_train_timesteps": 50},
        "train": {"steps": 2, "batch_size": 8, "warmup": 1, "threads": 1, "log_every": 1},
        "sample": {"steps": 2},
        "evaluate": {"at_end": False, "num_samples": 16, "features": "pixels"},
    }
    if "masked_image" in auxiliary:
        tree["data"]["masking"] = {"masked_image": {"pattern": "squares", "ratio": [0.1, 0.75]}}
    return tree | {name: tree.get(name, {}) | section for name, section in sections.items()}


class Setup(NamedTuple):
    pipeline: MTDiffusionPipeline
    experiment: Experiment
    found: Evaluation


def evaluated(tree: Tree, **arguments: Any) -> Setup:
    """A model with its first weights: a law of the evaluation holds for good and for bad samples."""
    experiment = build(parse_config(tree))
    pipeline = MTDiffusionPipeline(model=experiment.model.eval(), scheduler=experiment.scheduler)
    return Setup(pipeline, experiment, evaluate(pipeline, experiment, **arguments))


def scene_of(tree: Tree) -> Evaluator:
    experiment = build(parse_config(tree))
    pipeline = MTDiffusionPipeline(model=experiment.model.eval(), scheduler=experiment.scheduler)
    return Evaluator(pipeline, experiment.config, experiment.train, experiment.validation, trust=False)


def evaluate(pipeline: MTDiffusionPipeline, experiment: Experiment, **arguments: Any) -> Evaluation:
    return evaluators.evaluate(pipeline, experiment.config, experiment.train, experiment.validation, **arguments)


def directions(found: Evaluation) -> list[tuple[str, str]]:
    return [(row.direction, row.of) for row in found.rows]


@pytest.fixture(autouse=True)
def no_weights_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """LPIPS finds no weights and cannot download any: their folder is a file."""
    monkeypatch.setenv("TORCH_HOME", __file__)


@pytest.fixture(scope="module")
def five() -> Setup:
    tree = shapes(
        "mask", "masked_image", "label", "embedding", evaluate={"masking": MASKS}, states={"anchor_hidden": 0.1}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", __file__)
        return evaluated(tree)


@pytest.fixture(scope="module")
def digits(finished_run: Path) -> Setup:
    pipeline = MTDiffusionPipeline.from_pretrained(finished_run / "pipeline")
    overrides = ["evaluate.num_samples=30", "sample.batch_size=128", "evaluate.features=pixels"]
    experiment = build(load_config(finished_run / "config.yaml", overrides))
    return Setup(pipeline, experiment, evaluate(pipeline, experiment))


# ---------------------------------------------------------------------------------------------------- which directions


def test_every_direction_is_scored(five: Setup) -> None:
    scored = ["embedding", "label", "mask"]
    expected = [(f"image → {name}", name) for name in scored]
    for direction in ("joint", *(f"{name} → image" for name in scored)):
        expected += [(direction, of) for of in ("image", *scored)]
    expected += [("masked_image → image", "image")] * 6
    assert sorted(directions(five.found)) == sorted(expected)
    ways = [(r.setting["holes"], r.setting["by"]) for r in five.found.rows if r.direction == "masked_image → image"]
    floors = [(masks, by) for masks in MASKS for by in ("mean fill", "head")]
    assert ways == floors + [(masks, "samples") for masks in MASKS]


def test_rows_say_how_many_and_how_sure(five: Setup) -> None:
    for row in five.found.rows:
        reads = row.direction.startswith("image →")
        assert row.scores["n"] == (32 if reads else 16)
        drawn = not reads and row.setting.get("by", "samples") == "samples"
        assert ({"steps", "seed"} <= set(row.setting)) == drawn
        assert not drawn or {"steps": 2, "seed": 0}.items() <= row.setting.items()
        intervals = {name.removesuffix(", 95 %"): ends for name, ends in row.scores.items() if name.endswith("95 %")}
        assert intervals or row.of == "image"
        for name, (low, high) in intervals.items():
            assert low <= high
            if not name.startswith(("macro", "mIoU")):  # means; percentiles of ratios may lie beside the ratio
                assert low - 1e-9 <= row.scores[name] <= high + 1e-9, (row.direction, row.of, name)
    assert any("class shares" in row.scores for row in five.found.rows if row.of == "label")


@pytest.mark.parametrize(
    ("states", "reads", "ways", "samples"),
    [
        ({"anchor_observed": 1}, True, set(), False),
        ({"anchor_hidden": 1, "anchor_observed": 0}, False, {"mean fill", "head"}, False),
        ({"anchor_observed": 0}, False, {"mean fill", "samples"}, True),
        ({"distribution": "source"}, False, {"mean fill", "samples"}, True),
        ({}, True, {"mean fill", "samples"}, True),
    ],
    ids=["reader", "reconstructor", "no reader", "source", "default"],
)
def test_only_what_was_trained_is_scored(states: Tree, reads: bool, ways: set[str], samples: bool) -> None:
    found = evaluated(shapes("embedding", "masked_image", states=states)).found
    assert {row.setting["by"] for row in found.rows if row.direction == "masked_image → image"} == ways
    rest = {pair for pair in directions(found) if pair[0] != "masked_image → image"}
    expected = {("image → embedding", "embedding")} if reads else set()
    if samples:
        expected |= {(way, of) for way in ("joint", "embedding → image") for of in ("image", "embedding")}
    assert rest == expected


def test_samples_are_compared_with_and_without_aggregating() -> None:
    tree = shapes("embedding", evaluate={"seeds": [0, 1]})
    tree["modalities"]["embedding"]["weight"] = {"schedule": "constant", "scale": 1.0}
    pipeline, experiment, found = evaluated(tree, steps=(2, 3))
    settings = [tuple(row.setting.values()) for row in found.rows if (row.direction, row.of) == ("joint", "image")]
    assert settings == [(a, n, seed) for n in (2, 3) for seed in (0, 1) for a in (True, False)]
    scores = [row.scores["KID"] for row in found.rows if (row.direction, row.of) == ("joint", "image")]
    assert len(set(scores)) == len(scores) == 8  # every setting has samples of its own
    text = records.table(found)
    assert text.count("2 seeds)") == 16 and text.count("1 seed)") == 1
    assert "joint: image  (aggregate=True, steps=2, 2 seeds)" in text

    experiment.config.evaluate.seeds = [1]
    alone = evaluate(pipeline, experiment).rows  # two steps, by sample.steps
    assert alone[1:] == [row for row in found.rows if row.setting.get("steps") == 2 and row.setting["seed"] == 1]


def test_ways_of_conditioning_are_compared_in_one_table() -> None:
    """Each direction by every way that it can use, on the same noise; what nothing draws is scored once."""
    tree = shapes("label", "masked_image", states={"anchor_hidden": 0.1}, evaluate={"masking": MASKS, "seeds": [0, 1]})
    tree["modalities"]["label"]["weight"] = {"schedule": "constant", "scale": 1.0}
    ways = ["concatenation", "aggregation", "concatenation+head-guidance", "replacement"]
    pipeline, experiment, found = evaluated(tree, conditioning=ways)
    by = [r.setting["conditioning"] for r in found.rows if (r.direction, r.of) == ("label → image", "image")]
    assert by == ways[:3] * 2
    restored = [r.setting for r in found.rows if r.direction == "masked_image → image"]
    assert [(s["holes"], s["by"], s.get("conditioning")) for s in restored[4:]] == [
        (masks, "samples", way) for _ in (0, 1) for way in ("concatenation", "replacement") for masks in MASKS
    ]
    assert [s["by"] for s in restored[:4]] == ["mean fill", "head"] * 2 and "seed" not in restored[0]
    assert [r.setting["aggregate"] for r in found.rows if (r.direction, r.of) == ("joint", "image")] == [
        True,
        False,
    ] * 2
    assert len(found.pictures["masked_image"]) == 6  # truth, masked, mean fill, head, and two ways

    given = torch.arange(16) % 5
    arguments = {"observed": {"label": given}, "conditioning": ["aggregation"], "num_inference_steps": 2}
    images = draw(pipeline, 16, 256, 1, **arguments)["image"]
    row = row_of(found, "label → image", "image", conditioning="aggregation", seed=1)
    assert row.scores["std over samples"] == pytest.approx(float(images.std(dim=0).mean()))
    for bad, text in (
        ("magic", "conditioning = 'magic'"),
        ("aggregation+replacement", "none of label, masked_image can"),
    ):
        with pytest.raises(InputError) as caught:
            evaluate(pipeline, experiment, conditioning=[bad])
        assert text in str(caught.value) and "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------------- whose scores


def row_of(found: Evaluation, direction: str, of: str, **setting: Any) -> Row:
    (row,) = (r for r in found.rows if (r.direction, r.of) == (direction, of) and setting.items() <= r.setting.items())
    return row


def test_the_scores_are_those_of_the_samples(digits: Setup) -> None:
    """The direction label → image by hand: the same generator, a judge of training pixels."""
    given = torch.arange(30) % 10
    arguments = {"observed": {"label": given}, "aggregate": True, "num_inference_steps": 2}
    images = draw(digits.pipeline, 30, 128, 0, **arguments)["image"]
    real = digits.experiment.train.all().values
    judged = Judge(real["image"].numpy(), real["label"].numpy())(images.numpy())
    label = row_of(digits.found, "label → image", "label", aggregate=True)
    assert label.scores["agreement"] == pytest.approx((judged == given.numpy()).mean())
    assert label.scores["class shares"] == pytest.approx(np.bincount(judged, minlength=10) / 30)
    image = row_of(digits.found, "label → image", "image", aggregate=True)
    assert image.scores["std over samples"] == pytest.approx(float(images.numpy().std(axis=0, ddof=1).mean()), rel=1e-5)
    assert image.scores["FID"] > image.scores["FID, real against real"]  # twelve steps make no digits


def test_values_that_are_given_are_those_of_held_out_rows(five: Setup) -> None:
    """embedding → image by hand: no gallery, so the first held-out embeddings; the last draws are of other values."""
    given = five.experiment.validation.all(16).values["embedding"]
    drawn = draw(five.pipeline, 16, 256, 0, observed={"embedding": given}, num_inference_steps=2)
    judged = read_label(drawn["image"])
    scores = row_of(five.found, "embedding → image", "label").scores
    assert scores["agreement"] == pytest.approx(float((judged == drawn["label"]).float().mean()))
    assert scores["of last draw"] == pytest.approx(float((judged == drawn["label/last"]).float().mean()))
    assert "of last draw" not in row_of(five.found, "embedding → image", "embedding").scores


def test_reading_takes_one_evaluation_per_batch(digits: Setup) -> None:
    calls: list[int] = []
    hook = digits.pipeline.model.register_forward_hook(lambda *_: calls.append(1))
    scene = Evaluator(
        digits.pipeline, digits.experiment.config, digits.experiment.train, digits.experiment.validation, False
    )
    assert not calls  # the judge is no model
    (row,) = scene.reads()
    hook.remove()
    assert (row.direction, row.of, row.setting) == ("image → label", "label", {})
    assert len(calls) == 3  # 299 rows in batches of 128
    values = digits.experiment.validation.all().values
    read = digits.pipeline(observed={"image": values["image"]}, output_type="pt").samples["label"]
    assert row.scores["accuracy"] == pytest.approx(float((read == values["label"]).float().mean()))


def test_rows_with_a_missing_value_take_no_part(digits: Setup) -> None:
    """What stands in for a missing value is no truth: neither for the judge nor for the read-out."""
    pipeline, config = digits.pipeline, digits.experiment.config

    def scene(*tables: Any) -> Evaluator:
        return Evaluator(pipeline, config, *tables, False)

    rows = open_rows(config)
    some = [build_table(config, pipeline.model, part, missing={"label": 0.5}) for part in rows]
    present = [table.all().present["label"] for table in some]
    kept = [part.select(mask.nonzero().flatten().tolist()) for part, mask in zip(rows, present)]
    one, other = scene(*some), scene(*(build_table(config, pipeline.model, part) for part in kept))
    key = "label judge, on held-out rows"
    assert one.facts[key] == other.facts[key] != digits.found.manifest[key]
    assert list(one.reads()) == list(other.reads())
    assert next(one.reads()).scores["n"] == int(present[1].sum()) < 299


# -------------------------------------------------------------------------------------------------------------- judges


def test_the_rule_judges_shapes_and_neighbours_judge_digits(five: Setup, digits: Setup) -> None:
    for name, least in (("label", ("accuracy", 0.99)), ("mask", ("mIoU", 0.95)), ("embedding", ("cosine", 0.9))):
        assert five.found.manifest[f"{name} judge"] == "the rule of shapes"
        assert five.found.manifest[f"{name} judge, on held-out rows"][least[0]] >= least[1]
    assert digits.found.manifest["label judge"] == "3-NN on training pixels"
    assert digits.found.manifest["label judge, on held-out rows"]["accuracy"] > 0.9
    held_out = digits.experiment.validation.all().values
    assert np.bincount(held_out["label"].numpy()).min() > 20


def test_a_run_can_be_the_judge(tmp_path: Path) -> None:
    folder = train(parse_config(shapes("label", states={"anchor_observed": 1}) | {"output": str(tmp_path / "reader")}))
    judges = {"label": str(folder)}
    pipeline, _, found = evaluated(shapes("label", evaluate={"judges": judges}, states={"anchor_observed": 0}))
    images = draw(pipeline, 16, 256, 0, observed={"label": torch.arange(16) % 5}, num_inference_steps=2)
    reader = MTDiffusionPipeline.from_pretrained(folder / "pipeline")
    read = reader(observed={"image": images["image"]}, output_type="pt").samples["label"]
    assert found.manifest["label judge"] == "the run reader"
    agreement = row_of(found, "label → image", "label").scores["agreement"]
    assert agreement == pytest.approx(float((read == torch.arange(16) % 5).float().mean()))


def test_a_judge_that_cannot_judge_is_refused(finished_run: Path, tmp_path: Path) -> None:
    for folder, remedy in (
        (tmp_path, "is no finished run folder"),
        (finished_run, "does not know embedding, but label"),
    ):
        with pytest.raises(InputError) as caught:
            evaluated(shapes("embedding", evaluate={"judges": {"embedding": str(folder)}}))
        assert caught.value.key == "evaluate.judges.embedding" and caught.value.remedy == remedy
        assert "\n" not in str(caught.value)


def test_a_rule_judges_values_of_its_own_kind_and_size_only() -> None:
    """The mask's column as a map of numbers, and a mask beside images of another size."""
    tree = shapes("mask", data={"columns": {"depth": "mask"}})
    tree["modalities"] |= {"depth": {"kind": "dense"}, "image": {"kind": "image", "size": 32, "resize": True}}
    scene = scene_of(tree)
    assert scene.read_out == ["depth", "mask"] and not scene.judges


def test_too_few_rows_are_refused_in_one_line() -> None:
    few = shapes("embedding", data={"options": {"rows": 64, "validation_rows": 1, "size": 16}})
    unlabelled = shapes("label", data={"columns": {"label": "color"}, "missing": {"label": 1.0}})
    for tree, start in ((few, "data = 1: rows with image;"), (unlabelled, "data = 0: rows with image and label;")):
        with pytest.raises(InputError) as caught:
            scene_of(tree)
        assert str(caught.value).startswith(start) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------- the files that stay


def test_the_manifest_and_the_table_say_how(five: Setup) -> None:
    expected = {
        "data": "shapes",
        "training rows": 64,
        "held-out rows": 32,
        "samples": 16,
        "seeds": [0],
        "feedback": "mean",
    }
    assert expected.items() <= five.found.manifest.items()
    assert five.found.manifest["FID and KID features"] == "pixels, PCA 32"
    assert five.found.manifest["LPIPS"].startswith("not measured: torchvision's weights cannot be had")
    assert five.found.manifest["solver"] == five.experiment.config.scheduler.solver
    text = records.table(five.found)
    line = "masked_image → image: image  (holes=half, pattern=half, ratio=[0.5, 0.5], by="
    assert f"{line}samples, steps=2, 1 seed)" in text and f"{line}head, 1 seed)" in text
    assert "image → mask: mask  (1 seed)" in text
    json.dumps(five.found.to_json(), allow_nan=False)


def test_saving_keeps_what_was_measured_by_other_settings(digits: Setup, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    for settings in ("first", "second", "third", "second"):
        records.save(Evaluation(digits.found.manifest | {"settings": settings}, digits.found.rows), path)
    saved = records.read(path)
    assert saved["manifest"]["settings"] == "second" and set(saved["earlier"]) == {"first", "third"}
    assert saved["earlier"]["first"]["rows"] == digits.found.to_json()["rows"]
    assert [file.name for file in tmp_path.iterdir()] == ["evaluation.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": []}', '{"manifest": {}, "rows": [], "earlier": 3}'])
def test_a_broken_file_is_named_and_left(digits: Setup, tmp_path: Path, text: str) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(text)
    with pytest.raises(InputError, match="evaluation.json"):
        records.save(digits.found, path)
    assert path.read_text() == text


# ------------------------------------------------------------------------- modalities of one's own, by the command line

SOURCE = '''
import numpy as np
import torch

from mmdiff.errors import InputError
from mmdiff.modalities import Dense, Modality


class Light(Dense):
    """Brightness of the image, in a unit of its own."""

    @staticmethod
    def read(raw):
        return np.asarray(raw.convert("L"), dtype=np.float32)[None] / 10


class Position(Modality):
    """One number, of a class that nothing scores."""

    def __init__(self, shape):
        super().__init__(shape)
        self.layer = torch.nn.Linear(shape.pooled, 1)

    @classmethod
    def settings_from_data(cls, feature, values, **settings):
        return {}

    value_shape, dimensions, noise_shape = (1,), 1, (1,)

    def preprocess(self, raw):
        return torch.tensor([raw], dtype=torch.float32)

    def parse(self, text):
        return float(text)

    def postprocess(self, value):
        return value.flatten().tolist()

    def placeholder(self):
        return torch.zeros(1)

    def examples(self, count, generator):
        return torch.rand(count, 1, generator=generator)

    def encode(self, value):
        return value[:, :, None, None].expand(-1, *self.shape.space)

    def decode(self, features, pooled):
        return self.layer(pooled)

    def nll(self, params, value):
        return (params - value).square().mean(dim=1)

    def sample(self, params, noise):
        return params + noise

    def mode(self, params):
        return params

    def expected_encoding(self, params):
        return self.encode(params)
'''


@pytest.fixture
def own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A finished run with mask, masked image, a modality derived from Dense and one derived from none."""
    package = tmp_path / "code" / "modalities_of_a_user"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(package.parent))
    tree = shapes("mask", "masked_image", evaluate={"num_samples": 10}, states={"anchor_hidden": 0.2})
    tree["data"]["columns"] = {"light": "image", "position": "x"}
    for name in ("light", "position"):
        kind = f"modalities_of_a_user:{name.title()}"
        tree["modalities"][name] = {"kind": kind, "weight": {"schedule": "none"}}
    yield train(parse_config(tree | {"output": str(tmp_path / "run")}))
    sys.modules.pop("modalities_of_a_user", None)


def test_the_command_writes_scores_and_pictures(cli: Cli, own_run: Path) -> None:
    refused = cli("evaluate", own_run)
    assert refused.code == 2 and "trust_custom_modalities" in refused.complaint
    assert not (own_run / "evaluation.json").exists()

    answer = cli("evaluate", own_run, "--trust-custom-modalities")
    assert answer.code == 0, answer.err
    rows = json.loads((own_run / "evaluation.json").read_text())["rows"]
    found = {(row["direction"], row["of"]): row["scores"] for row in rows}
    assert not any("position" in "".join(pair) for pair in found)  # nothing says how it is scored
    assert set(found) == {
        *((f"image → {name}", name) for name in ("light", "mask")),
        *((way, of) for way in ("joint", "light → image", "mask → image") for of in ("image", "mask")),
        ("masked_image → image", "image"),
    }
    pipeline = MTDiffusionPipeline.from_pretrained(own_run / "pipeline", trust_custom_modalities=True)
    rows_of_shapes = build(load_config(own_run / "config.yaml")).validation.all().values
    read = pipeline(observed={"image": rows_of_shapes["image"]}, output_type="pt").samples["light"]
    wrong = (read - rows_of_shapes["light"]).square().mean(dim=(1, 2, 3)).sqrt().mean()
    assert found["image → light", "light"]["RMSE"] == pytest.approx(float(wrong), rel=1e-5)

    cell = 96 + 2  # 16 pixels six times enlarged, and the gap
    # image, truth and what was read; truth, masked, mean fill, head and samples
    title, legend = FONT_SIZE + 8, FONT_SIZE + 6 + 4  # of one line
    for name, columns, below in (("mask", 3, legend), ("light", 3, legend), ("masked_image", 5, 0)):
        path = own_run / "samples" / f"evaluation-{name}.png"
        assert f"wrote {path}" in answer.out
        with Image.open(path) as picture:
            assert (picture.mode, picture.size) == ("RGB", (columns * cell + 2, title + PICTURED * cell + 2 + below))
            first = np.asarray(picture)[title + 2 :, 2:98][:96:6, ::6]
        truth = (rows_of_shapes["image"][0].permute(1, 2, 0) + 1) * 127.5
        assert np.array_equal(first, truth.round().byte().numpy())
    assert len(list((own_run / "samples").glob("evaluation-*"))) == 3


def test_a_column_of_a_file_is_scored_where_it_is_there(tmp_path: Path) -> None:
    """Missing values in the data themselves, not only hidden ones."""
    numbers = np.random.default_rng(0)
    images = [Image.fromarray(numbers.integers(256, size=(8, 8), dtype=np.uint8)) for _ in range(40)]
    labels = [None if index % 4 == 1 else index % 3 for index in range(40)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(tmp_path / "r.parquet")
    OmegaConf.save(
        OmegaConf.create(
            shapes(
                "label",
                states={"anchor_observed": 1},
                data={"source": str(tmp_path / "r.parquet"), "holdout": 2, "options": {}},
            )
        ),
        tmp_path / "file.yaml",
    )
    experiment = build(load_config(tmp_path / "file.yaml"))
    pipeline = MTDiffusionPipeline(model=experiment.model.eval(), scheduler=experiment.scheduler)
    (row,) = evaluate(pipeline, experiment).rows
    assert row.scores["n"] == sum(label is not None for label in labels[1::2])


# -------------------------------------------------------------------------------------------------------- all subsets


def test_every_subset_of_observed_modalities_is_scored(five: Setup) -> None:
    """30 = 2⁵ − 2 subsets; the joint is the empty one, and of all five nothing is left to draw."""
    found = evaluate(five.pipeline, five.experiment, subsets=True)
    scored = {row.direction for row in found.rows}
    names = set(five.pipeline.model.names)
    for direction in scored:
        given, rest = (set(side.split(" + ")) for side in direction.split(" → "))
        assert given | rest == names and not given & rest
    # of image and all that can be read only the masked image is left, and nothing judges it
    assert len(scored) == 30 - 1
    for row in found.rows:
        given = row.direction.split(" → ")[0].split(" + ")
        assert row.setting["observed"] == (row.of in given) and row.scores["n"] == 16
        assert "image" not in given or row.of not in given  # an observed value is no prediction


def test_observed_values_of_a_subset_come_from_the_same_row(five: Setup) -> None:
    """With the image given its own label is the truth: a judge that is right agrees with the given label."""
    _, experiment, _ = five
    held_out = experiment.validation.all()
    assert torch.equal(read_label(held_out.values["image"][:16]), held_out.values["label"][:16])
    found = evaluate(five.pipeline, experiment, subsets=True)
    (row,) = [
        r for r in found.rows if r.direction == "image → embedding + label + mask + masked_image" and r.of == "label"
    ]
    drawn = draw(five.pipeline, 16, 256, 0, observed={"image": held_out.values["image"][:16]})["label"]
    assert row.scores["accuracy"] == pytest.approx((drawn == held_out.values["label"][:16]).double().mean().item())


def test_guidance_may_differ_by_modality() -> None:
    scene = scene_of(
        shapes("label", "embedding", sample={"steps": 2, "guidance_scale": 1.5, "guidance": {"label": 3.0}})
    )
    torch.nn.init.normal_(
        scene.pipeline.model.backbone.unet.conv_out.weight
    )  # a fresh network gives 0 whatever it sees
    given = {"label": torch.arange(4), "embedding": scene.held_out.values["embedding"][:4]}
    seen = scene._draw(4, 0, observed=given, num_inference_steps=2)["image"]
    for scales, same in (({"label": 3.0, "embedding": 1.5}, True), ({"label": 1.5, "embedding": 1.5}, False)):
        arguments = {"observed": dict(given), "guidance_scale": scales, "num_inference_steps": 2}
        assert torch.equal(seen, draw(scene.pipeline, 4, 256, 0, **arguments)["image"]) is same
