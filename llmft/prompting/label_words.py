"""From text to token ids: answers. Label words that are scored, and texts that are trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmft.config import Pattern
from llmft.errors import Cause, TrialFailure, UserError
from llmft.prompting.tokenization import encode


@dataclass(frozen=True)
class LabelWords:
    """The label words of a trial.

    Attributes:
        texts: by label.
        ids: for each, the token ids that follow the prompt (or the decoder's prefix).
        n_known: how many tokens of the vocabulary the model and its teacher both have (some pad theirs); None without a teacher.
    """

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    n_known: int | None = None

    @property
    def continuation_prefixes(self) -> tuple[tuple[int, ...], ...]:
        """The token ids after which another token of a label word follows: none, and all proper prefixes of the words; each once."""
        return tuple(dict.fromkeys(ids[:step] for ids in self.ids for step in range(len(ids))))

    @property
    def single(self) -> bool:
        """Whether every word is one token."""
        return all(len(ids) == 1 for ids in self.ids)

    @property
    def longest(self) -> int:
        return max(len(ids) for ids in self.ids)


def encode_answer(tokenizer, text: str) -> tuple[int, ...]:
    """The token ids of an answer that a decoder of its own says: tokenised alone, as a target, without what the tokenizer adds."""
    return tuple(tokenizer(text_target=text, add_special_tokens=False, verbose=False)["input_ids"])


def decoder_start(tokenizer, token: int) -> tuple[int, ...]:
    """What a decoder reads before an answer: its start `token`, and whatever opens the tokenizer's texts.

    As transformers trains encoder-decoder models. T5: `<pad>`; BART: `</s><s>`.
    """
    sample = tokenizer(text_target="a", return_special_tokens_mask=True)
    return (token, *sample["input_ids"][: sample["special_tokens_mask"].index(0)])


def resolve_label_words(
    tokenizer, pattern: Pattern, words: Sequence[str], sample: Mapping[str, str], in_decoder: bool = False
) -> LabelWords:
    """The token ids of each label word after a prompt.

    Args:
        sample: the fields of any example, to see the words in their place.
        in_decoder: whether a decoder of its own says them, so that they stand alone and not behind the prompt.

    Raises:
        UserError: a word is unknown to the tokenizer, melts into the prompt's last token, or two words have the same tokens.
    """
    prompt = pattern.render(sample)
    (before,), ids = encode(tokenizer, [prompt]), []
    for word in words:
        if in_decoder:
            answer = encode_answer(tokenizer, word)
        else:
            (whole,) = encode(tokenizer, [prompt + pattern.label_prefix + word])
            answer = tuple(whole[len(before) :])
            if whole[: len(before)] != before:
                raise UserError(
                    f"verbalizer: label word {word!r} cannot be scored after the pattern {pattern.template!r}: this tokenizer "
                    "joins it with the text before. Choose a pattern that does not end in a space, or another word."
                )
        if not answer or (tokenizer.unk_token_id in answer and tokenizer.unk_token_id != tokenizer.bos_token_id):
            raise UserError(f"verbalizer: label word {word!r} is unknown to this model's tokenizer. Choose another verbalizer.")
        ids.append(answer)
    if len(set(ids)) < len(ids):
        raise UserError(f"verbalizer: two of the label words {', '.join(map(repr, words))} have the same tokens. Choose other words.")
    return LabelWords(tuple(words), tuple(ids))


def encode_completions(
    tokenizer, pattern: Pattern, prompts: Sequence[str], ids: Sequence[tuple[int, ...]], answers: Sequence[tuple[str, str]], most: int
) -> tuple[tuple[int, ...], ...]:
    """The tokens of each answer (the example's id, and its text) after its prompt, and the end of the text.

    Args:
        prompts, ids: of the prompts: their texts and their tokens.
        most: tokens that a prompt and its answer may take.

    Raises:
        TrialFailure: they take more (QUERY_TOO_LONG).
        UserError: the tokenizer joins an answer with its prompt, or has no token for the end of a text.
    """
    end, completions = _end_of_text(tokenizer), []
    whole = encode(tokenizer, [prompt + pattern.label_prefix + text for prompt, (_, text) in zip(prompts, answers, strict=True)])
    for (name, _), prompt, all_ids in zip(answers, ids, whole, strict=True):
        if tuple(all_ids[: len(prompt)]) != prompt:
            raise UserError(
                f"pattern: the answer of {name} cannot be trained on after the pattern {pattern.template!r}: this tokenizer "
                "joins it with the text before. Choose a pattern that does not end in a space."
            )
        if len(all_ids) > most:
            raise TrialFailure(
                Cause.QUERY_TOO_LONG,
                f"{name} and its answer take {len(all_ids)} tokens; at most {most} fit this model or max_length.",
            )
        completions.append((*all_ids[len(prompt) :], end))
    return tuple(completions)


def encode_decoder_completions(tokenizer, answers: Sequence[tuple[str, str]], most: int) -> tuple[tuple[int, ...], ...]:
    """The tokens of each answer (the example's id, and its text) as a decoder of its own says it, and the end of the text.

    Raises:
        TrialFailure: an answer takes more than `most` tokens (QUERY_TOO_LONG).
        UserError: the tokenizer has no token for the end of a text.
    """
    end, completions = _end_of_text(tokenizer), []
    for name, text in answers:
        ids = encode_answer(tokenizer, text)
        if len(ids) > most:
            raise TrialFailure(
                Cause.QUERY_TOO_LONG,
                f"the answer of {name} takes {len(ids)} tokens; at most {most} fit this model's decoder or max_length.",
            )
        completions.append((*ids, end))
    return tuple(completions)


def _end_of_text(tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError("model: its tokenizer has no token that ends a text, so it cannot learn where to stop. Use another model.")
    return tokenizer.eos_token_id
