"""A record with every field."""

from llmft.records.record import CurvePoint, Finding, SetMetrics
from support.fakes import fake_record


def full_record(spec, cause=None):
    """A record with numbers for everything that is logged."""
    record = fake_record(spec, cause)
    if cause:
        return record

    def numbers(accuracy, domain):
        return SetMetrics(
            n=8, score=accuracy, accuracy=accuracy, macro_accuracy=0, macro_f1=0, mcc=0, calibration_error=0, loss=float("nan"),
            majority_share=0.5, label_shares={}, predicted_shares={}, label_accuracy={}, domain=domain,
        )  # fmt: skip

    trains = spec.selections != ("none",)
    sets = {"toy": numbers(0.75, "in"), "toy_hans": numbers(0.5, "out")}
    return record.model_copy(
        update={
            "metrics": {} if spec.test_sets == () else dict.fromkeys(spec.selections, sets),
            "curve": [
                CurvePoint(step=step, epoch=step // 10, train_loss=1 / step, learning_rate=1e-3, dev_score=0.5 + step / 100)
                for step in (10, 20, 30)
            ]
            if trains
            else [],
            "findings": [Finding(code="constant_prediction", severity="warning", message="all alike", set="toy")],
        }
    )
