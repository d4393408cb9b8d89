"""DialogSum (Chen et al. 2021): summaries of spoken dialogues; SAMSum's chats are out of domain.

Test is DialogSum's test split (500 dialogues, three references each), `samsum` that of SAMSum (819 chats, one reference each).
A local folder holds `dialogsum_train.parquet`, `dialogsum_test.parquet` and `samsum_test.parquet`.
"""

from llmft.tasks._dialogues import DialogueTask


class Dialogsum(DialogueTask):
    in_domain = "dialogsum"
    out_of_domain = ("samsum",)


TASK = Dialogsum()
