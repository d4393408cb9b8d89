"""MNLI with its three labels, matched in domain, mismatched out of domain (Williams et al. 2018).

The mismatched validation set comes from genres that the training pool lacks. HANS, whose labels are two, is the out-of-domain set
of `mnli` and `mnli_merged`. Patterns as in lm-evaluation-harness; `gpt-3` as for ANLI in Brown et al. 2020.
"""

from llmft.config import Pattern, with_literals
from llmft.tasks.mnli import MATCHED, MISMATCHED, TRAIN, Mnli


class Mnli3Way(Mnli):
    labels = ("entailment", "neutral", "contradiction")
    patterns = with_literals(
        {
            "minimal": Pattern(template="{premise} {hypothesis} ?", verbalizer="yes-maybe-no"),
            "gpt-3": Pattern(template="{premise} question: {hypothesis} True, False, or Neither? answer:", verbalizer="true-neither-false"),
            "eval-harness": Pattern(
                template="{premise}\nQuestion: {hypothesis} True, False or Neither?\nAnswer:", verbalizer="true-neither-false"
            ),
        }
    )
    verbalizers = {"yes-maybe-no": ("Yes", "Maybe", "No"), "true-neither-false": ("True", "Neither", "False")}
    in_domain = "mnli_3way"
    out_of_domain = ("mnli_mismatched",)
    sources = (TRAIN, MATCHED, MISMATCHED)
    label_of = {0: 0, 1: 1, 2: 2}

    def _hans(self, data):
        return []


TASK = Mnli3Way()
