"""A small byte-level BPE tokenizer for the quickstart's model: digits stand singly, any text can be encoded."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 389
"""Odd, so that the quickstart goes through the padding of the vocabulary that tensor parallelism asks for."""

PAD_TOKEN = "<|endoftext|>"
TURN_START_TOKEN = "<|im_start|>"
EOS_TOKEN = "<|im_end|>"

# A word with its leading space, one digit, other signs, spaces: numbers are spelled digit by digit as in Qwen.
SPLIT_PATTERN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]|\s+"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def render_example(problem: str, response: str) -> str:
    """One turn of each side by the chat template."""
    return f"{TURN_START_TOKEN}user\n{problem}{EOS_TOKEN}\n{TURN_START_TOKEN}assistant\n{response}{EOS_TOKEN}\n"


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """BPE merges learnt from ``texts``; ends a turn with <|im_end|> (the eos token), pads with <|endoftext|>.

    Raises:
        ValueError: the texts are too few to learn that many merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, TURN_START_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the texts give only {tokenizer.get_vocab_size()} tokens, not vocab_size={vocab_size}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        additional_special_tokens=[TURN_START_TOKEN],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
