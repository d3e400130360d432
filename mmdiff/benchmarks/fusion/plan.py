"""`mmdiff benchmark fusion --dry-run`: what would be compared, on which sets, and what is stored already."""

from __future__ import annotations

from pathlib import Path

from mmdiff.benchmarks.fusion.image_sets import front_views, held_out_sets, open_rows, training_sets
from mmdiff.benchmarks.fusion.photos import ImageSets
from mmdiff.benchmarks.fusion.settings import Settings
from mmdiff.evaluation.tables import table


def plan(settings: Settings, parts: list[Path]) -> str:
    """All photos are read as a run would read them; nothing is written, and no model is opened.

    Args:
        settings: of the experiment.
        parts: the files of all its parts, there or not.

    Raises:
        InputError: where a run would stop because of its data.
    """
    test = settings.test
    training = training_sets(settings)
    cells = {(n, share): held_out_sets(settings, n, share) for share in test.distractors for n in test.views}
    held_out = next(iter(cells.values()))
    if settings.learner == "retrieval":
        front_views(settings)
    stored = sum(path.is_file() for path in parts)
    rows, held_out_rows = (len(part) for part in open_rows(settings.data))
    asked = min(held_out_rows, test.rows)
    per_set = [["training", *_row(training)]]
    per_set += [[f"held out, n = {n}, {share:.0%} distractors", *_row(sets)] for (n, share), sets in cells.items()]
    return "\n".join(
        [
            f"{settings.name}: learner {settings.learner}, {_answerer(settings)}",
            f"training rows: {rows}, {_left_out(rows, training)}",
            f"held-out rows: {held_out_rows}, the first {asked} are read, {_left_out(asked, held_out)}",
            "",
            *table(["sets", "number", "photos per set", "photos", "distractors"], per_set),
            "",
            *(_answers(task, training.answers[task], held_out.answers[task]) for task in settings.tasks),
            f"photos in memory: {_size(training, *cells.values())}",
            f"{len(parts) // settings.seeds} entries × {settings.seeds} seeds = {len(parts)} parts; "
            f"{stored} stored already, in {parts[0].parent}",
            *(["fewer if the model takes one image per prompt"] if settings.model and not settings.entries else []),
            "dry run: nothing was written",
        ]
    )


def _answerer(settings: Settings) -> str:
    if settings.learner != "vlm":
        return f"encoder {settings.encoder['kind']}"
    return f"model {settings.model} (not opened)" if settings.model else f"a small {settings.small.kind}"


def _left_out(rows: int, sets: ImageSets) -> str:
    return f"{rows - len(sets.photos)} are left out for lack of photos or an answer"


def _row(sets: ImageSets) -> list[str]:
    counts = [len(photos) for photos in sets.photos]
    between = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} … {max(counts)}"
    return [str(len(counts)), between, str(sum(counts)), str(sum(map(sum, sets.distractors)))]


def _answers(task: str, training: list[str], held_out: list[str]) -> str:
    known, asked = set(training), set(held_out)
    return (
        f"{task}: {len(known)} different answers in training, {len(asked)} held out, {len(asked - known)} of them new"
    )


def _size(*sets: ImageSets) -> str:
    photos = {id(photo): photo for one in sets for members in one.photos for photo in members}  # a distractor is shared
    return f"{sum(3 * photo.width * photo.height for photo in photos.values()) / 2**30:.2f} GiB"
