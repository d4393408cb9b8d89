"""CoLA (GLUE; Warstadt et al. 2019) in domain, sentences from other publications out of domain.

GLUE's validation set (1,043 rows) is CoLA's in-domain set followed by its out-of-domain set. `cola` is the former alone (527 rows);
`cola_ood` is the latter (516 rows, by `source`), from the later release that corrects typing errors, as in the code of Mosbach et
al. 2023. The usual number for CoLA is Matthews' correlation, `mcc` in every record.
"""

from __future__ import annotations

from llmft.config import DataRef, Pattern, with_literals
from llmft.data import Example, Source, Task, TaskData, TestSet, checked_fields, checked_label, labelled_examples, numbered
from llmft.errors import UserError

GLUE = ("nyu-mll/glue", "cola")
HOLDS = "sentence, label (0 unacceptable, 1 acceptable)"
TRAIN = Source(("cola_train.parquet",), (*GLUE, "train", "main"), holds=HOLDS)
VALIDATION = Source(("cola_validation.parquet",), (*GLUE, "validation", "main"), holds=HOLDS)
OOD = Source(
    ("cola_ood.tsv", "cola_ood/dev.tsv"),
    None,
    columns=("source", "label", "mark", "sentence"),
    obtain="data/cola_ood/dev.tsv of github.com/uds-lsv/llmft, the out_of_domain_dev.tsv of cola_public 1.1, "
    "sha256 201b9c57b2a20f1282242eec0ed8995729e3be19c29a46c047b3727338836c05",
    holds="without a header: source, label (0 unacceptable, 1 acceptable), the authors' mark, sentence",
)
N_VALIDATION, N_IN_DOMAIN = 1043, 527


class Cola(Task):
    labels = ("unacceptable", "acceptable")
    patterns = with_literals(
        {  # minimal as in the code of Mosbach et al. 2023, the others in the manner of their other tasks
            "minimal": Pattern(template="{sentence} ?", verbalizer="no-yes"),
            "gpt-3": Pattern(template="{sentence} question: Does this sentence make sense? Yes or No? answer:", verbalizer="no-yes"),
            "eval-harness": Pattern(template="{sentence}\nQuestion: Does this sentence make sense?\nAnswer:", verbalizer="no-yes"),
        }
    )
    verbalizers = {"no-yes": ("No", "Yes"), "no-yes-lower": ("no", "yes")}  # the latter as in lm-evaluation-harness
    in_domain = "cola"
    out_of_domain = ("cola_ood",)
    sources = (TRAIN, VALIDATION, OOD)

    def load(self, data: DataRef) -> TaskData:
        pool, validation = (
            labelled_examples(source.rows(data), name, {"sentence": "sentence"}, 2)
            for source, name in ((TRAIN, "cola_train"), (VALIDATION, "cola_validation"))
        )
        if len(validation) != N_VALIDATION:
            raise UserError(
                f"{VALIDATION.origin(data)}: has {len(validation)} rows. The first {N_IN_DOMAIN} of GLUE's {N_VALIDATION} are "
                "the in-domain set; give GLUE's own file."
            )
        tests = (TestSet("cola", "in", validation[:N_IN_DOMAIN]), TestSet("cola_ood", "out", _out_of_domain(data)))
        return TaskData(pool, tests, revision=", ".join(source.origin(data) for source in (VALIDATION, OOD)))


def _out_of_domain(data: DataRef) -> tuple[Example, ...]:
    return tuple(
        Example(
            id_,
            checked_fields(row, {"sentence": "sentence"}, where),
            checked_label(row, 2, where),
            {"source": str(row["source"])},
        )
        for id_, where, row in numbered(OOD.rows(data), "cola_ood")
    )


TASK = Cola()
