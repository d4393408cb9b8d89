"""MNLI with neutral and contradiction as one label in domain, HANS (McCoy et al. 2019) out of domain.

The binary form that Mosbach et al. 2023 compare `mnli` with ("merge neutral"): the majority of the matched validation set is
not_entailment with 64.6 %.
"""

from llmft.tasks.mnli import Mnli


class MnliMerged(Mnli):
    in_domain = "mnli_merged"
    label_of = {0: 0, 1: 1, 2: 1}


TASK = MnliMerged()
