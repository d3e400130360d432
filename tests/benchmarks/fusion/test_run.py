"""`mmdiff benchmark fusion`: image sets at any law, scores by hand, what learns, and a benchmark that goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch.nn.functional import cross_entropy

from mmdiff.benchmarks.fusion import run as fusion_accuracy
from mmdiff.benchmarks.fusion.classifier import Classifiers, Retrieval
from mmdiff.benchmarks.fusion.entries import (
    BASES,
    BEST,
    DROPPED,
    ENTRIES,
    FINE_TUNED,
    ORACLE_VOTE,
    PROMPTED,
    ZERO_SHOT,
)
from mmdiff.benchmarks.fusion.image_sets import front_views, held_out_sets, single_photos, training_sets
from mmdiff.benchmarks.fusion.learning import fit
from mmdiff.benchmarks.fusion.photos import one_large
from mmdiff.benchmarks.fusion.scores import best, between_seeds, mass, plurality, scores
from mmdiff.benchmarks.fusion.settings import Schedule, Settings, load_settings, parse_settings
from mmdiff.benchmarks.fusion.vlm import LanguageModels
from mmdiff.errors import InputError
from mmdiff.modalities.fusion import FUSIONS, build_fusion

Cli = Callable[..., Any]
ROOT = Path(__file__).parents[3]
FUSION = ROOT / "experiments" / "fusion"
EXPERIMENTS = sorted(path for path in FUSION.glob("*.yaml") if "\nlearner: " in path.read_text())
TOY = [
    *("data.options.rows=24", "data.options.validation_rows=8", "seeds=2", "hidden=4"),
    *("test.rows=6", "test.views=[1,3]", "test.distractors=[0,0.5]", "pretraining.steps=2", "training.steps=1"),
]
SMALL = ["small.width=16", "small.layers=1", "small.patch=12"]
DIGITS = {
    stem: ["data.options.source=digits", "data.options.object=label", f"tasks.{task}.columns=[label]"]
    for stem, task in (("accuracy_coil", "category"), ("retrieval_coil", "object"))
}


def toy(stem: str, *more: str) -> Settings:
    chosen = [*TOY, *DIGITS.get(stem, []), *more]
    return load_settings(ROOT / "experiments" / "fusion" / f"{stem}.yaml", chosen)


# --------------------------------------------------------------------------------------------------------------- scores


def test_labels_are_scored_as_by_hand() -> None:
    found = scores("label", ["a", "a", "b", "nonsense"], ["a", "b", "b", "c"])
    precision, recall = (1 / 2 + 1 / 1 + 0) / 3, (1 / 1 + 1 / 2 + 0) / 3  # of a, b, c
    assert found == pytest.approx({"accuracy": 0.5, "precision": precision, "recall": recall})


def test_attributes_are_scored_each() -> None:
    found = scores("attributes", ["circle , red", "red", "blue, ring"], ["red , circle", "red , ring", "blue , ring"])
    precision, recall = 1.0, (1 + 1 + 1 + 1 / 2) / 4  # of blue, circle, red, ring
    assert found == pytest.approx({"accuracy": 2 / 3, "precision": precision, "recall": recall})


def test_captions_are_scored_by_words() -> None:
    found = scores("caption", ["a red ring", "a big blue ring"], ["a red ring", "a blue circle"])
    assert found == pytest.approx({"accuracy": 0.5, "precision": (1 + 2 / 4) / 2, "recall": (1 + 2 / 3) / 2})


def test_the_best_answer_is_the_nearest() -> None:
    candidates = [["a blue ring", "a red circle", "a red ring"], ["x"]]
    assert best("caption", candidates, ["a red square ring", "y"]) == ["a red ring", "x"]
    assert best("label", [["b", "a"]], ["a"]) == ["a"]


def test_the_plurality_is_what_most_say() -> None:
    assert plurality([["a", "b", "a"], ["", "b", ""], [""]], seed=0) == ["a", "b", ""]
    ties = plurality([["a", "b"]] * 200, seed=0)
    assert 70 < ties.count("a") < 130 and ties == plurality([["b", "a"]] * 200, seed=0)


def test_the_mass_on_distractors_is_compared_with_an_even_one() -> None:
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.9, 0.1, 0.0], [1.0, 0.0, 0.0]])
    found = mass(weights, [[False, True, True], [False, True], [False]])
    assert found == pytest.approx({"weight on distractors": 0.3, "1/n on distractors": (2 / 3 + 1 / 2) / 2})
    assert mass(weights[2:], [[False]]) == {}


def test_seeds_have_students_interval() -> None:
    values = [0.5, 0.6, 0.8]
    expected = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert between_seeds(values)["95 %"] == pytest.approx(expected)
    assert between_seeds([0.5])["95 %"] is None


# -------------------------------------------------------------------------------------------------------- image sets


@pytest.mark.parametrize("stem", ["accuracy_shapes", "accuracy_coil"])
def test_bags_follow_the_law_that_is_asked_for(stem: str) -> None:
    settings = toy(stem)
    assert {len(photos) for photos in single_photos(settings).photos} == {1}
    held_out = held_out_sets(settings, 4, 0.5)
    assert len(held_out.photos) == 6 and all(len(photos) == 4 for photos in held_out.photos)
    assert [sum(flags) for flags in held_out.distractors] == [2] * 6
    assert held_out.photos[0][0].size == (settings.data.size,) * 2
    assert max(map(len, training_sets(settings).photos)) > 3
    assert held_out.answers == held_out_sets(settings, 1, 0.0).answers  # the same objects at every law


def test_answers_are_the_texts_of_columns() -> None:
    answers = held_out_sets(toy("accuracy_shapes_llava"), 1, 0.0).answers
    for kind, attributes, caption in zip(*(answers[task] for task in ("category", "attributes", "caption"))):
        color, shape = kind.split()
        assert (attributes, caption) == (f"{color} , {shape}", f"a {color} {shape}")


@pytest.mark.parametrize(("count", "side"), [(1, 1), (2, 2), (4, 2), (5, 3)])
def test_one_large_image_holds_all_photos(count: int, side: int) -> None:
    photos = [Image.new("RGB", (4, 4), (index + 1, 0, 0)) for index in range(count)]
    large = np.asarray(one_large(photos))[..., 0]
    assert large.shape == (4 * side, 4 * side)
    blocks = large.reshape(side, 4, side, 4)[:, 0, :, 0].flatten().tolist()
    assert blocks == [*range(1, count + 1), *[128] * (side**2 - count)]


@pytest.mark.parametrize("stem", ["accuracy_shapes", "accuracy_coil"])
@pytest.mark.parametrize("kind", ["source", "none", "random", "foreign", "coherent"])
def test_distractors_are_what_their_kind_says(stem: str, kind: str) -> None:
    """How many there are, what they show, and that the photo is indeed of what is said of it."""
    settings = toy(stem, f"distractors={kind}", "test.rows=8")
    sets = held_out_sets(settings, 4, 0.5)
    ((shown,), (answers,)) = sets.shown.values(), sets.answers.values()
    assert {sum(flags) for flags in sets.distractors} == ({0} if kind == "none" else {2})
    assert sets.answers == held_out_sets(settings, 1, 0.0).answers
    for answer, each, flags in zip(answers, shown, sets.distractors):
        foreign = [text for text, flag in zip(each, flags) if flag]
        assert [text for text, flag in zip(each, flags) if not flag] == [answer] * (4 - len(foreign))
        assert answer not in foreign
        assert kind != "random" or foreign == ["", ""]
        assert kind != "coherent" or (foreign[0] == foreign[1] != "")
    assert kind != "foreign" or any(len({*each} - {answer}) == 2 for answer, each in zip(answers, shown))
    again = held_out_sets(settings, 4, 0.5)
    assert [[p.tobytes() for p in row] for row in again.photos] == [[p.tobytes() for p in row] for row in sets.photos]


@pytest.mark.parametrize("kind", ["foreign", "coherent"])
def test_a_distractor_shows_what_is_said_of_it(kind: str) -> None:
    clean, mixed = (
        held_out_sets(toy("accuracy_coil", f"distractors={one}", "test.rows=8"), 4, 0.5) for one in ("none", kind)
    )
    pictures = {
        photo.tobytes(): answer for photos, answer in zip(clean.photos, clean.answers["category"]) for photo in photos
    }
    for photos, texts in zip(mixed.photos, mixed.shown["category"]):
        assert [pictures[photo.tobytes()] for photo in photos] == texts


def test_an_oracle_vote_is_right_where_most_photos_are(tmp_path: Path) -> None:
    learner = Classifiers(toy("accuracy_shapes", "distractors=coherent", "test.rows=40", "seeds=1"), tmp_path)
    for share, low, high in ((0.25, 1.0, 1.0), (0.5, 0.2, 0.8)):  # of four photos one, two
        learner.cells = [(4, share)]
        ((_, answers),) = learner.answers(ORACLE_VOTE, 0)
        truth = learner.test((4, share)).answers["category"]
        right = np.mean([texts == [text] for texts, text in zip(answers["category"].texts, truth)])
        assert low <= right <= high


def test_the_oracle_asks_the_mean_without_distractors(tmp_path: Path) -> None:
    learner = Classifiers(toy("accuracy_shapes", "distractors=coherent", "test.distractors=[0.5]"), tmp_path)
    cell = learner.cells[-1]
    with_them, without = learner.sets(cell, dropped=False), learner.sets(cell, dropped=True)
    assert any(map(any, with_them.distractors)) and not any(map(any, without.distractors))
    for photos, flags, own, shown in zip(
        with_them.photos, with_them.distractors, without.photos, without.shown["category"], strict=True
    ):
        assert own == [photo for photo, flag in zip(photos, flags) if not flag] and len(shown) == len(own)
    dropped = dict(learner.answers(DROPPED, 0))[cell]["category"]
    learner.test = lambda _: without
    learner._packed, learner._seen = {}, (-1, {})
    assert dict(learner.answers("mean", 0))[cell]["category"].texts == dropped.texts


def test_photos_of_a_row_are_enough(tmp_path: Path) -> None:
    """A source without a law of image sets: every row has its own photos, here one to three."""
    things = [*range(4)] * 6
    rows = [
        {"label": thing, "photos": [Image.new("RGB", (8, 8), (thing * 60, k, row)) for k in range(1 + row % 3)]}
        for row, thing in enumerate(things)
    ]
    features = datasets.Features(
        {"label": datasets.ClassLabel(names=list("abcd")), "photos": datasets.List(datasets.Image())}
    )
    table = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(tmp_path / "things")
    tree = toy("accuracy_shapes", "distractors=foreign", "test.rows=24").model_dump()
    tree["data"] |= {"source": str(tmp_path / "things"), "options": {}, "size": 8}
    tree["tasks"]["category"]["columns"] = ["label"]
    settings = parse_settings(tree)
    assert [len(photos) for photos in training_sets(settings).photos] == [1, 2, 3] * 8
    assert {len(photos) for photos in single_photos(settings).photos} == {1}
    held_out = held_out_sets(settings, 2, 0.5)
    assert [len(photos) for photos in held_out.photos] == [1, 2, 2] * 8
    assert [sum(flags) for flags in held_out.distractors] == [0, 1, 1] * 8


# ------------------------------------------------------------------------------------------------------------- learning


def test_attention_learns_to_leave_distractors_out() -> None:
    torch.manual_seed(0)
    stranger = torch.arange(5) < torch.randint(1, 4, (64, 1))  # (B, n)
    targets = torch.randint(3, (64,))
    shown = torch.where(stranger, torch.randint(3, (64, 5)), targets[:, None])
    members = torch.cat([torch.nn.functional.one_hot(shown, 3), stranger[..., None]], dim=-1).float()
    fusion, head = build_fusion("attention", 4, 8), torch.nn.Linear(4, 3)
    mask = torch.ones(64, 5, dtype=torch.bool)
    before = mass(fusion(members, mask).weights.detach(), stranger.tolist())

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return cross_entropy(head(fusion(members[rows], mask[rows]).embedding), targets[rows])

    fit([*fusion.parameters(), *head.parameters()], loss, 64, Schedule(steps=150, learning_rate=0.05), seed=0)
    after = mass(fusion(members, mask).weights.detach(), stranger.tolist())
    assert before["weight on distractors"] > 0.3 and after["weight on distractors"] < 0.1


@pytest.mark.parametrize(("learns", "parts"), [("fusion", ""), ("head", "head"), ("all", "encoder head")])
def test_besides_the_fusion_only_what_shall_learns(tmp_path: Path, learns: str, parts: str) -> None:
    learner = Classifiers(toy("accuracy_shapes", f"learns={learns}"), tmp_path)
    model = learner._pretrained(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learner._fused(model, "attention", 0)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.partition(".")[0] for name in moved} == set(parts.split())


def test_an_object_never_seen_is_found_by_its_front_view(tmp_path: Path) -> None:
    """Each front view finds itself, in whatever order; training has none of these objects, no set a front view."""
    settings = toy("retrieval_coil", "test.rows=8")
    learner, fronts = Retrieval(settings, tmp_path), front_views(settings)
    assert set(fronts) == set(held_out_sets(settings, 1, 0.0).answers["object"]) and len(fronts) > 1
    assert not set(fronts) & set(training_sets(settings).answers["object"])
    shown = {photo.tobytes() for photos in held_out_sets(settings, 4, 0.5).photos for photo in photos}
    assert not shown & {front.tobytes() for front in fronts.values()}
    model, pixels = learner._pretrained(0), [torch.from_numpy(np.array(front)) for front in fronts.values()]
    with torch.no_grad():
        features = model.features(torch.stack(pixels).permute(0, 3, 1, 2)).flip(0)
        assert learner._named(model, 3.0 * features, features) == list(fronts)[::-1]


QUICK, LATER = ("blip-2", "llava", "qwen3-vl"), ("llava-onevision", "idefics3", "smolvlm", "qwen3.5", "qwen4-exp")


@pytest.mark.parametrize("kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in LATER)])
def test_a_language_model_learns_its_answers(tmp_path: Path, kind: str) -> None:
    """It says by heart what it has seen often: three sets, a task each."""
    more = ["data.options.rows=3", "data.options.image_sets.views=1", "data.options.image_sets.distractors=0"]
    more += ["pretraining.steps=60", "pretraining.learning_rate=5e-3", *SMALL, f"small.kind={kind}"]
    learner = LanguageModels(toy("accuracy_shapes_llava", *more), tmp_path)
    model, reader = learner._pretrained("attention", 0)
    for row, task in enumerate(learner.settings.tasks):
        found = learner._asked(
            model, reader, "attention", [learner.single.questions[task][row]], learner.single.photos[row : row + 1]
        )
        assert found.texts == [[learner.single.answers[task][row]]]


BY_COLOUR = "tasks.answer.question=which object is {color} ?"


@pytest.mark.parametrize(("changes", "own"), [([], 2), ([BY_COLOUR, "distractors=foreign"], 1)])
def test_a_question_tells_the_objects_of_a_set_apart(changes: list[str], own: int) -> None:
    """Each set is asked about one object by its shape or colour, which no other object in it has."""
    sets = held_out_sets(toy("asked_kind", "test.rows=20", *changes), 4, 1 - own / 4)
    for question, answer, shown in zip(*(column["answer"] for column in (sets.questions, sets.answers, sets.shown))):
        asked = question.split()[-2]  # "… is the circle ?"
        assert [text for text in shown if asked in text.split()] == [answer] * own
        assert own == 1 or len(set(shown)) == 2
    assert len(set(sets.questions["answer"])) > 2


@pytest.mark.parametrize("told", [False, True])
def test_a_classifier_is_asked(tmp_path: Path, told: bool) -> None:
    """Another question changes the fusion's weights; the head hears it where it is told."""
    learner = Classifiers(toy("asked_kind", f"told={told}", "learns=head"), tmp_path)
    model, cell = learner._pretrained(0), learner.cells[-1]
    fusion = learner._fused(model, "query_attention", 0)
    torch.nn.init.normal_(fusion.W.weight, std=5)
    sets, rows = learner._sets((cell, False)), torch.arange(6)
    features = model.features(sets.images)
    other = sets.queries[:, torch.randperm(sets.queries.shape[1], generator=torch.Generator().manual_seed(1))]
    asked = sets.fuse(fusion, features, rows)
    answers = model.answer(asked.embedding, sets.queries), model.answer(asked.embedding, other)
    assert torch.equal(*answers) == (not told)
    sets.queries = other
    assert (sets.fuse(fusion, features, rows).weights - asked.weights).abs().max() > 1e-3
    assert learner._by_fusion(model, fusion, (cell, False), 0).texts


@pytest.mark.parametrize("learns", ["fusion", "all"])
def test_a_language_model_is_asked_with_its_fusion(tmp_path: Path, learns: str) -> None:
    color = ["tasks.color.columns=[color]", "tasks.color.question=which color is the {label} ?"]
    settings = toy("asked_kind", "learner=vlm", *color, *SMALL, "new_tokens=2", "seeds=1", f"learns={learns}")
    parts = fusion_accuracy.results(settings, tmp_path, progress=False)
    found = fusion_accuracy.tree(settings, parts)
    assert {(row["task"], row["entry"]) for row in found["gains"]} == {
        (task, entry) for task in ("answer", "color") for entry in ("mean", "query_attention")
    }
    rows = [row for row in found["rows"] if (row["photos"], row["distractors"]) == (3, 0.5)]
    weights = {row["entry"]: row["weight on distractors"]["mean"] for row in rows}
    assert weights["mean"] != weights["query_attention"]


# ------------------------------------------------------------------------------------------------------------ the whole


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_is_named_after_its_file(path: Path) -> None:
    assert load_settings(path).name == path.stem


@pytest.mark.parametrize(
    "stem",
    [
        "accuracy_shapes",
        "accuracy_shapes_llava",
        pytest.param("accuracy_coil", marks=pytest.mark.slow),
        pytest.param("retrieval_coil", marks=pytest.mark.slow),
        pytest.param("accuracy_shapes_blip2", marks=pytest.mark.slow),
    ],
)
def test_the_command_leaves_a_table_and_goes_on(stem: str, cli: Cli, tmp_path: Path) -> None:
    more = [*TOY, *SMALL, "new_tokens=2", "seeds=1", "test.distractors=[0.5]", "test.rows=3"]
    more += DIGITS.get(stem, [])
    call = ("benchmark", "fusion", ROOT / "experiments" / "fusion" / f"{stem}.yaml", *more, "--out", tmp_path)
    answer = cli(*call)
    assert answer.code == 0, answer.err
    entries = [entry for entry in ENTRIES if "llava" in stem or entry not in PROMPTED]
    for name in (*entries, "weight on distractors (1/n)", "accuracy minus that of"):
        assert name in answer.out
    found = json.loads((tmp_path / f"{stem}.json").read_text())
    tasks = found["manifest"]["settings"]["tasks"]
    assert len(found["rows"]) == len(tasks) * len(entries) * (1 + 2 + 1 + 2)
    assert {(row["task"], row["entry"], row["distractors"]) for row in found["gains"]} == {
        (task, kind, share) for task in tasks for kind in FUSIONS for share in ("all", 0.5)
    }
    assert len(found["headroom"]) == 2 * len(tasks)
    assert found["manifest"]["seeds"] == [0] and "mmdiff benchmark fusion" in found["manifest"]["command"]
    assert (tmp_path / f"{stem}.png").stat().st_size > 1000
    parts = sorted(tmp_path.glob(f"{stem}-*/parts/*.json"))
    assert len(parts) == len(entries)
    lost, kept = parts[0], {path: path.stat().st_mtime_ns for path in parts[1:]}
    scores_before = json.loads(lost.read_text())["scores"]
    lost.unlink()
    assert cli(*call).code == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert json.loads(lost.read_text())["scores"] == scores_before


@pytest.mark.parametrize(
    ("kind", "image"),
    [
        ("llava", 4),
        ("qwen3-vl", 1 + 2),  # with the marks around it
        pytest.param("llava-onevision", 4 + 1, marks=pytest.mark.slow),
        pytest.param("idefics3", 1 + 3, marks=pytest.mark.slow),
    ],
)
def test_an_answer_costs_the_tokens_of_its_photos(kind: str, image: int, cli: Cli, tmp_path: Path) -> None:
    chosen = [f"small.kind={kind}", f"entries={json.dumps(['mean', *PROMPTED, BEST])}", "seeds=1", "new_tokens=2"]
    call = (FUSION / "accuracy_shapes_llava.yaml", *TOY, *SMALL, *chosen, "--out", tmp_path)
    answer = cli("benchmark", "fusion", *call)
    assert answer.code == 0 and "an answer: prompt tokens" in answer.out, answer.err
    found = json.loads((tmp_path / "accuracy_shapes_llava.json").read_text())["costs"]
    tokens = {(cost["entry"], cost["photos"]): cost["prompt tokens"] for cost in found}
    one = tokens["mean", 1]
    assert one > image and tokens["mean", 3] == one  # a set looks like one image
    assert [tokens[entry, 3] for entry in (*PROMPTED, BEST)] == [one + 2 * image] * 2 + [3 * one]
    assert all(cost["seconds per answer"] > 0 for cost in found)


@pytest.mark.parametrize(
    ("stem", "change", "key"),
    [
        ("accuracy_shapes", "seeds=1", "fusion.entries"),
        ("accuracy_shapes_blip2", "seeds=1", "fusion.entries"),
        ("accuracy_shapes_llava", "small.kind=llama", "fusion.small.kind"),
        ("accuracy_shapes_llava", "model=nowhere", "fusion.model"),
    ],
)
def test_who_cannot_take_several_images_is_refused_before_the_start(
    stem: str, change: str, key: str, cli: Cli, tmp_path: Path
) -> None:
    entries = f"entries={json.dumps(['mean', *PROMPTED])}"
    answer = cli("benchmark", "fusion", FUSION / f"{stem}.yaml", *TOY, change, entries, "--out", tmp_path)
    assert answer.code == 2 and f"{key} = " in answer.err and not list(tmp_path.iterdir())


def test_means_and_gains_are_of_the_parts(tmp_path: Path) -> None:
    settings = toy("accuracy_shapes")
    accuracy = {"mean": 0.5, "attention": 0.4, "agreement_attention": 0.7}
    accuracy |= {ZERO_SHOT: 0.2, FINE_TUNED: 0.3, DROPPED: 0.8}

    def cell(entry: str, seed: int, views: int, share: float) -> dict[str, Any]:
        own = accuracy.get(entry, 0.1) + 0.01 * seed + (0.3 if views == 1 else 0.0) - 0.1 * share
        return {"task": "category", "views": views, "distractors": share, "sets": 6, "answers": 3} | dict.fromkeys(
            ("accuracy", "precision", "recall"), own
        )

    parts = [
        {"entry": entry, "seed": seed, "seconds": 1.0, "scores": [cell(entry, seed, *c) for c in cells]}
        for entry in ENTRIES
        if entry not in PROMPTED
        for seed in range(2)
        for cells in [[(views, share) for share in (0.0, 0.5) for views in (1, 3)]]
    ]
    found = fusion_accuracy.tree(settings, parts)
    row = next(r for r in found["rows"] if (r["entry"], r["photos"], r["distractors"]) == ("mean", "all", "all"))
    assert row["accuracy"]["by seed"] == pytest.approx([0.475, 0.485])  # of three photos, both shares
    gains = {
        (row["entry"], row["distractors"]): {base: row[base]["mean"] for base in BASES if base in row}
        for row in found["gains"]
    }
    assert gains["mean", "all"] == pytest.approx({"attention": 0.1, ZERO_SHOT: 0.3, FINE_TUNED: 0.2})
    assert gains["agreement_attention", 0.5]["attention"] == pytest.approx(0.3)
    assert [row["mean"] for row in found["headroom"]] == pytest.approx([0.3] * 3)  # of all shares, of 0, of 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("test.veiws=[1]", "did you mean views"),
        ("learner=retrieval data.front=back", "fusion.data = 'back': the source has the columns"),
        ("data.photos=pictures", "fusion.data = 'pictures': the source has the columns"),
        ("learner=oracle", "learner"),
        ("tasks.more.columns=[label]", "a classifier has one task"),
        ("test.distractors=[1.0]", "test.distractors"),
        ("seeds=0", "fusion.seeds"),
        ("distractors=strange", "fusion.distractors"),
        ("distractors.share=[0.5,0.1]", "fusion.distractors.share"),
        ("distractors.test=strange", "fusion.distractors.test"),
        ("entries=[mean,median]", "'median' is unknown"),
        ("entries=[query_attention]", "'query_attention': needs questions that differ"),
        ("told=true", "'told': needs questions that differ"),
        ("told=true learner=retrieval", "fusion.told"),
        ("learns=head learner=vlm", "fusion.learns"),
        ("tasks.category.question=is_it_{colour}?", "fusion.data = 'colour': the source has the columns"),
    ],
)
def test_bad_settings_are_one_line(change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        fusion_accuracy.results(toy("accuracy_shapes", *change.split()), tmp_path, progress=False)


def test_the_command_needs_experiments(cli: Cli, tmp_path: Path) -> None:
    assert cli("benchmark", "fusion", "seeds=1").code == 2
    answer = cli("benchmark", "fusion", tmp_path / "none.yaml")
    assert answer.code == 2 and "no such file" in answer.err
    twice = cli("benchmark", "fusion", EXPERIMENTS[0], EXPERIMENTS[0])
    assert twice.code == 2 and "the name of two experiments" in twice.err
