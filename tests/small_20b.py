"""A tokenizer of the official one's structure, small: 1,000 merges learned from this repository's own tests."""

import functools
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers


@functools.cache
def small_20b() -> str:
    """Its json, as a run keeps it."""
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
    tests = sorted(Path(__file__).parent.rglob("test_*.py"))[:12]
    tokenizer.train_from_iterator([path.read_text(encoding="utf-8") for path in tests], trainer)
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    return json.dumps(json.loads(tokenizer.to_str()), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
