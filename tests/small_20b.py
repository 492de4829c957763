"""A small tokenizer with the official structure: 1,000 merges learned from the licence, some of white space."""

import functools
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WHITE_SPACE = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
)
MARKS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


@functools.cache
def small_20b() -> str:
    """The tokenizer's JSON, as stored by a run."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = byte_level
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1258,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    licence = Path(__file__).parents[1] / "LICENSE"
    # Merge these into one token, so that a split at a wrong place breaks it.
    runs = "".join(f"x{space} \n{space}\n" for space in WHITE_SPACE) + "".join(f"x{mark * 2}\n" for mark in MARKS)
    tokenizer.train_from_iterator([licence.read_text(encoding="utf-8"), runs * 50], trainer)
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    return json.dumps(json.loads(tokenizer.to_str()), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
