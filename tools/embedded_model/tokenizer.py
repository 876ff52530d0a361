"""Train the embedded model's byte-level BPE, laid out as the released tokenizer is.

The first twenty ids are the special tokens, the last four the image tokens; digits stay single so
that numbers are read digit by digit.
"""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from nvvl.tools.embedded_model.spec import IMAGE_TOKENS, SPECIAL_TOKENS, VOCAB_SIZE


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Return a tokenizer of exactly `VOCAB_SIZE` ids trained on ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|\n| ?[A-Za-z]+|\s|[^\sA-Za-z\d]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(IMAGE_TOKENS),
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in IMAGE_TOKENS])
    size = tokenizer.get_vocab_size()
    if size != VOCAB_SIZE:
        raise ValueError(f"tokenizer: required {VOCAB_SIZE} ids, the texts gave {size}")
    return tokenizer
