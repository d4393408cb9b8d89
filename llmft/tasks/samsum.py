"""SAMSum (Gliwa et al. 2019): summaries of chats between friends; DialogSum's spoken dialogues are out of domain.

Test is SAMSum's test split (819 chats, one reference each), `dialogsum` that of DialogSum (500 dialogues, three references each).
A local folder holds `samsum_train.parquet`, `samsum_test.parquet` and `dialogsum_test.parquet`.
"""

from llmft.tasks._dialogues import DialogueTask


class Samsum(DialogueTask):
    in_domain = "samsum"
    out_of_domain = ("dialogsum",)


TASK = Samsum()
