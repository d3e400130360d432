"""What the fusion benchmark compares, by name."""

from __future__ import annotations

from mmdiff.modalities.fusion import FUSIONS, QUERY_FUSIONS

ZERO_SHOT, FINE_TUNED = "concatenated, zero-shot", "concatenated, fine-tuned"
PROMPT_ZERO_SHOT, PROMPT_FINE_TUNED = "all photos in the prompt, zero-shot", "all photos in the prompt, fine-tuned"
SINGLE, BEST = "single image", "best single image"
PLURALITY = "plurality of single images"
ORACLE_VOTE, DROPPED = "oracle vote", "distractors dropped"
#: Only of a language model that takes several images.
PROMPTED = (PROMPT_ZERO_SHOT, PROMPT_FINE_TUNED)
ENTRIES = (*FUSIONS, ZERO_SHOT, FINE_TUNED, *PROMPTED, SINGLE, BEST, PLURALITY, ORACLE_VOTE, DROPPED)
#: Where sets are asked different questions; not compared by default.
ASKED = tuple(QUERY_FUSIONS)
#: {entry: (the fusion, whether somebody took the distractors out)}
FUSED: dict[str, tuple[str, bool]] = {kind: (kind, False) for kind in (*FUSIONS, *ASKED)} | {DROPPED: ("mean", True)}
#: Gains are over these.
BASES = ("mean", "attention", ZERO_SHOT, FINE_TUNED, *PROMPTED)

NOTES = {
    PROMPT_ZERO_SHOT: "every photo has its own tokens in the prompt, as the model itself reads several images",
    PROMPT_FINE_TUNED: "the same, after all between encoder and language model has learned from image sets",
    SINGLE: "the first of each set, which are in random order",
    BEST: "of each photo's answer the one nearest to the truth, which a person without the truth cannot choose",
    PLURALITY: "the answer that most photos of a set give; ties are broken at random",
    ORACLE_VOTE: "the right answer for most photos of a set, as if each photo were read rightly; ties as above",
    DROPPED: "an oracle takes the distractors out, then the mean is asked; minus the mean: the expected headroom",
}
