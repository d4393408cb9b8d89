"""Examples become token ids: label words, tokenization, encoding of a trial, decoding of generated text."""

from llmft.prompting.decoding import Decoding, RationaleDecoding
from llmft.prompting.encoding import CONTENT_FREE, DEV, INPUTS, SHOTS, EncodedQueries, EncodedTrial, PromptEncoder
from llmft.prompting.label_words import LabelWords, decoder_start, resolve_label_words
from llmft.prompting.tokenization import encode

__all__ = [
    "CONTENT_FREE", "DEV", "Decoding", "EncodedQueries", "EncodedTrial", "INPUTS", "LabelWords", "PromptEncoder", "RationaleDecoding",
    "SHOTS", "decoder_start", "encode", "resolve_label_words",
]  # fmt: skip
