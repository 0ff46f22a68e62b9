"""Whether two engines say the same: greedy tokens, and where they part, whether rounding alone can have parted them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gate import Verdict

Answer = dict[str, Any]

EXCUSED = 0.05  # of the prompts may part at a near tie


def near_tie_bound(dtype: str, largest_logit: float) -> float:
    """A gap between two logits below which rounding them to the dtype may turn their order: 2 · eps · largest logit.

    A logit is rounded to the dtype once, by at most eps / 2 of its size (eps: the distance of 1 to the next number).
    Two engines that are exact until then have each of two logits up to eps · size apart, so that their gaps differ by
    2 · eps · size at most; the second engine can see the other order only if the first one's gap is smaller. The size
    is that of the largest logit of the run, since log-probabilities do not tell it. Roundings in the layers before
    come on top, and are not allowed for: the gate is stricter for it.
    """
    return 2 * torch.finfo(getattr(torch, dtype)).eps * largest_logit


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """The first place at which two answers are not the same; None where they are, to the end."""
    for place, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return place
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def difference(base: Answer, other: Answer, bound: float) -> dict[str, Any] | None:
    """Where two answers part: the place, both top-2 there, and whether it is a near tie; None if they do not.

    A near tie: the same two tokens come first in both, and the gap between them is below `bound` in both.
    """
    place = first_difference(base["tokens"], other["tokens"])
    if place is None:
        return None
    tops = [answer["top2"][place] if place < len(answer["top2"]) else None for answer in (base, other)]
    near = False
    if all(tops):
        gaps = [first - second for _, first, _, second in tops]
        near = {tops[0][0], tops[0][2]} == {tops[1][0], tops[1][2]} and max(gaps) < bound
    return {"place": place, "baseline": tops[0], "top2": tops[1], "near_tie": near}


def compared(base: Sequence[Answer], others: Sequence[Answer], bound: float) -> list[dict[str, Any] | None]:
    """`difference` of every pair of answers, which are to the same questions in the same order.

    Raises:
        ValueError: they are not.
    """
    asked = [[(one["asked"], one["question"]) for one in answers] for answers in (base, others)]
    if asked[0] != asked[1]:
        raise ValueError(f"answers: expected those to the baseline's {len(base)} questions, got {len(others)}, others")
    return [difference(one, other, bound) for one, other in zip(base, others, strict=True)]


def verdict(differences: Sequence[dict[str, Any] | None]) -> Verdict:
    """Green if every prompt is equal or differs at a near tie, and one prompt or `EXCUSED` of them at most does."""
    near, parted = (sum(one is not None and one["near_tie"] is kind for one in differences) for kind in (True, False))
    wrong = parted + max(0, near - max(1, int(EXCUSED * len(differences))))
    what = f"prompts that part from the baseline at no near tie, or beyond {EXCUSED:.0%} at one"
    return Verdict(wrong == 0, float(wrong), len(differences), what)
