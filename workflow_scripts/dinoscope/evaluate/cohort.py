"""Who is measured: three sets of cases without a case in common, and what each model has seen of them.

    training    cases that SSL training sees
    selection   eval cases that are looked at while training, for the choice of a teacher
    test        eval cases that nothing has looked at: the only ones a verdict comes from

Nothing here imports torch: planning needs it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dinoscope.errors import ConfigError
from dinoscope.names import nearest
from dinoscope.slides.table import SlideRecord, draw_cases

__all__ = ["SEEN", "SETS", "Cohort", "make_cohort", "seen"]

SETS = ("training", "selection", "test")
# What is known of whether training has seen a case; "unknown" of weights that others have trained.
SEEN = ("no", "yes", "unknown")
_SALT = 7919  # the selection is another draw than that of the held-out cases


@dataclass(frozen=True)
class Cohort:
    """The three sets.

    Attributes:
        sets: case_id -> "training", "selection" or "test"; cases that only features are made of are in none.
        case_of: slide_id -> case_id, of all slides.
        slides: slide_id -> set, of the slides that are measured or trained on.
    """

    sets: dict[str, str]
    case_of: dict[str, str]
    slides: dict[str, str]

    def cases(self, name: str) -> list[str]:
        """The cases of a set, in the order of the slide table."""
        return [case for case, of in self.sets.items() if of == name]

    def slides_of(self, name: str) -> list[str]:
        """The slides of a set, in the order of the slide table."""
        return [slide for slide, of in self.slides.items() if of == name]

    def cases_of_slides(self, slides: Iterable[str]) -> set[str]:
        """The cases of slides, as far as these are in the table."""
        return {self.case_of[slide] for slide in slides if slide in self.case_of}


def make_cohort(
    records: Sequence[SlideRecord],
    split: Mapping[str, str],
    *,
    fraction: float,
    seed: int,
    selection: Collection[str] = (),
) -> Cohort:
    """Deals the eval cases to selection and test.

    Args:
        records: The slide table.
        split: slide_id -> "train" or "eval" (`split_cases`).
        fraction: Share of the eval cases that is for selection, stratified by site and stain; where there are three
            or more, at least one, unless it is 0.
        seed: Another seed draws other ones.
        selection: The cases themselves, in place of a draw.

    Raises:
        ConfigError: A case is on both sides, is for selection and trained on, is unknown, or no case is left to test.
    """
    sides: dict[str, dict[str, str]] = {}
    for record in records:
        if record.slide_id in split:
            sides.setdefault(record.case_id, {}).setdefault(split[record.slide_id], record.slide_id)
    for case, slides in sides.items():
        if len(slides) > 1:
            raise ConfigError(
                f"case {case} is in both training (slide {slides['train']}) and evaluation (slide {slides['eval']}): "
                "no number of it would be a test; change column `use` of the slide table"
            )
    is_eval = {case for case, slides in sides.items() if "eval" in slides}
    chosen = _checked(selection, sides, is_eval) if selection else _drawn(records, is_eval, fraction, seed)
    if is_eval and chosen == is_eval:
        raise ConfigError(
            f"all {len(is_eval)} eval cases are for selection, so that none is left to test: name fewer in "
            "evaluation.selection.cases, or give more cases use=eval"
        )
    names = {case: "training" if case not in is_eval else "selection" if case in chosen else "test" for case in sides}
    return Cohort(
        sets=names,
        case_of={record.slide_id: record.case_id for record in records},
        slides={
            record.slide_id: names[record.case_id]
            for record in records
            if record.slide_id in split or (record.case_id in names and "features" in record.use)
        },
    )


def seen(cohort: Cohort, cases: Iterable[str], trained_on: Iterable[str] | None) -> dict[str, str]:
    """Case -> whether a model's training has seen it, one of `SEEN`.

    Args:
        cohort: For the case of each slide.
        cases: Asked about.
        trained_on: Slides that the model, or a run that it continues, was trained on (its seal's); None, unknown.
    """
    if trained_on is None:
        return dict.fromkeys(cases, "unknown")
    known = cohort.cases_of_slides(trained_on)
    return {case: "yes" if case in known else "no" for case in cases}


def _drawn(records: Sequence[SlideRecord], is_eval: set[str], fraction: float, seed: int) -> set[str]:
    if fraction == 0:
        return set()
    return draw_cases([record for record in records if record.case_id in is_eval], fraction, seed + _SALT)


def _checked(selection: Collection[str], sides: Mapping[str, object], is_eval: set[str]) -> set[str]:
    for case in selection:
        if case not in sides:
            raise ConfigError(
                f"evaluation.selection.cases names {case!r}, which is no case of training or evaluation"
                f"{nearest(case, sides)}"
            )
        if case not in is_eval:
            raise ConfigError(
                f"evaluation.selection.cases names {case!r}, which training sees: a choice by it would be no choice; "
                "name cases with use=eval"
            )
    return set(selection)
