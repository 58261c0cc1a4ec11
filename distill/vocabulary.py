"""A CLIP tokenizer with a small vocabulary, trained on the captions at hand."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
MOST_TOKENS = 2000


def small_clip_tokenizer(captions: list[str], max_length: int) -> CLIPTokenizer:
    """CLIP's own rules (lower case, bytes, word ends) with merges learnt from ``captions``.

    The vocabulary is laid out as CLIP's: bytes, bytes at a word's end, merges, start and end; so
    any text has ids.
    """
    rules = CLIPTokenizer().backend_tokenizer
    trained = Tokenizer(BPE(end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    trainer = BpeTrainer(vocab_size=MOST_TOKENS, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator(sorted(set(captions)), trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += ["".join(pair) for pair in merges] + [START, END]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)
