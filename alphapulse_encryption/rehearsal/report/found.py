"""A rehearsal, thought through: what the page, the history and Dagster's metadata are all shown from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alphapulse_encryption.rehearsal.measures import Rehearsal
from alphapulse_encryption.rehearsal.report import prediction
from alphapulse_encryption.rehearsal.report.comparison import Comparison, compare
from alphapulse_encryption.rehearsal.report.prediction import Accuracy, Prediction, Trial
from alphapulse_encryption.rehearsal.report.verdict import Verdict, judge

# Where production's size is not known.
EXAMPLE_TIMES = 10


@dataclass(frozen=True)
class Found:
    """What a rehearsal says.

    Args:
        comparison: with those before it.
        accuracy: of the predictions until then.
        prediction: for production; where its size is not known, for an example.
    """

    rehearsal: Rehearsal
    comparison: Comparison
    verdict: Verdict
    accuracy: Accuracy
    prediction: Prediction

    @classmethod
    def of(cls, rehearsal: Rehearsal, history: Sequence[Rehearsal]) -> Found:
        """Of a rehearsal beside others, in any order; itself may be among them."""
        comparison = compare(rehearsal, history)
        like = [*comparison.earlier, rehearsal]
        accuracy = prediction.accuracy(like)
        sizes = rehearsal.production or prediction.times_as_large(rehearsal.before, EXAMPLE_TIMES)
        return cls(
            rehearsal=rehearsal,
            comparison=comparison,
            verdict=judge(rehearsal, comparison.worse),
            accuracy=accuracy,
            prediction=prediction.predict(like, sizes, accuracy),
        )

    @property
    def predicted_for(self) -> str:
        """What the prediction is about, in words."""
        known = self.rehearsal.production is not None
        return "production" if known else f"{EXAMPLE_TIMES} times the rehearsed rows"

    @property
    def trial(self) -> Trial | None:
        """How good the prediction of this very rehearsal was; None where there was none."""
        return next((one for one in self.accuracy.trials if one.run_id == self.rehearsal.run_id), None)
