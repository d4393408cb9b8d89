"""QQP (GLUE) with all of its rows in domain, PAWS-QQP (Zhang et al. 2019) out of domain.

363,846 rows of training pool and 40,430 of validation. `qqp` is the part of it that Mosbach et al. 2023 use. A plan's `n_test` takes
fewer rows of a test set, balanced over the labels.
"""

from llmft.tasks.qqp import Qqp


class QqpFull(Qqp):
    in_domain = "qqp_full"
    cut = False


TASK = QqpFull()
