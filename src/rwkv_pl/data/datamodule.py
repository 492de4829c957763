"""Corpora as Lightning data modules.

A batch is one tensor of tokens (rows, T+1) int64, T = ctx_len: the inputs are the first T, the targets the last T.
An epoch is one pass over the training split, except in the command, whose run is one endless epoch. The first batch
follows from the trainer's step, so checkpoints hold no data position.
"""

import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from rwkv_pl.checks import check_at_least, check_kind, to_plain
from rwkv_pl.config import FILE_VOCABULARIES, MIX, Data, corpus_setting, errors_of_corpus
from rwkv_pl.data import order
from rwkv_pl.data.byte_vocabulary import UnknownVocabulary
from rwkv_pl.data.corpus import Corpus
from rwkv_pl.data.document_ends import DocumentEnds
from rwkv_pl.data.sources import Mix, Source, build_source
from rwkv_pl.data.sources.binidx import Binidx
from rwkv_pl.data.sources.enwik8 import ENWIK8_URL, Enwik8
from rwkv_pl.data.sources.ids import Ids
from rwkv_pl.data.sources.text import Text
from rwkv_pl.data.stream import StreamBatches
from rwkv_pl.data.token_file import TokenFile
from rwkv_pl.data.vocabulary import Tokens, Vocabulary, build_vocabulary, describe_strange_bytes, read_vocabulary
from rwkv_pl.errors import UserError

# More batches than any run reads, and few enough for Lightning's float arithmetic on lengths to stay exact.
ENDLESS = 2**50

# Rows whose window starts are computed at once: numpy takes little longer for 1,024 rows than for one.
ROWS_PER_BLOCK = 1024


class TrainBatches(Dataset[Tensor]):
    """Training micro-batches of one process: item m = n * A + a is micro-batch a of batch n, (B / (A * D), T+1) int64.

    A = accumulate, B = batch_size, D = world_size. ``files`` have the ``shares`` of the samples.
    """

    def __init__(
        self,
        files: Sequence[TokenFile],
        shares: Sequence[int],
        *,
        seed: int,
        ctx_len: int,
        batch_size: int,
        world_size: int,
        rank: int,
        accumulate: int,
    ) -> None:
        self.files, self.shares, self.seed, self.ctx_len, self.batch_size = files, shares, seed, ctx_len, batch_size
        self.accumulate = accumulate
        self._batches_per_block = max(1, ROWS_PER_BLOCK // batch_size)
        self._block, self._places = -1, np.empty(0, np.int64)
        self.rows = [
            order.micro_batch_rows(batch_size, world_size=world_size, rank=rank, accumulate=accumulate, micro_batch=a)
            for a in range(accumulate)
        ]

    def __getitem__(self, m: int) -> Tensor:
        n, a = divmod(m, self.accumulate)
        block, place = divmod(n, self._batches_per_block)
        if self._block != block:
            self._block, self._places = block, self._place_block(block)
        corpora, starts = self._places[:, place, self.rows[a]]
        rings = {}
        for c in set(corpora.tolist()):
            self.files[c].check_unchanged()
            rings[c] = self.files[c].split("train")
            if self.files[c].vocab_size is not None:
                for start in starts[corpora == c].tolist():
                    self.files[c].check_range(start, min(start + self.ctx_len + 1, len(rings[c])))
                    self.files[c].check_range(0, start + self.ctx_len + 1 - len(rings[c]))
        return torch.from_numpy(order.read_windows([rings[c] for c in corpora.tolist()], starts, self.ctx_len))

    def _place_block(self, block: int) -> order.Int64:
        """Return the corpus and the start of each row of several batches: (2, batches, B)."""
        # Row numbers continue through the whole run, so several batches are the same as one larger batch.
        size = self._batches_per_block * self.batch_size
        corpora, index = order.place_samples(block * size + np.arange(size, dtype=np.int64), self.shares)
        starts = np.empty(size, np.int64)
        for c in np.unique(corpora):
            mine = np.flatnonzero(corpora == c)
            n_tokens = len(self.files[c].split("train"))
            starts[mine] = order.sample_starts(
                int(index[mine[0]]), len(mine), seed=self.seed + int(c), n_tokens=n_tokens, ctx_len=self.ctx_len
            )
        return np.stack([corpora, starts]).reshape(2, self._batches_per_block, self.batch_size)


class EvalBatches(Dataset[Tensor]):
    """The windows of a split in text order, ``rows`` to a batch: (rows, T+1) int64, -1 past the end of the split.

    Batch k goes to process k mod D, D = world_size. All processes have the same number of batches, so the last ones
    may contain only -1.
    """

    def __init__(
        self, file: TokenFile, split: tuple[int, int], *, ctx_len: int, rows: int, world_size: int = 1, rank: int = 0
    ) -> None:
        self.file, self.ctx_len, self.rows = file, ctx_len, rows
        self.lo, self.hi = split
        self.world_size, self.rank = world_size, rank

    def __len__(self) -> int:
        return -(-order.eval_window_count(self.lo, self.hi, self.ctx_len) // (self.rows * self.world_size))

    def __getitem__(self, i: int) -> Tensor:
        if i >= len(self):
            raise IndexError(f"batch {i} of {len(self)}")
        self.file.check_unchanged()
        first = (i * self.world_size + self.rank) * self.rows
        begin = max(self.lo, 1) - 1 + first * self.ctx_len
        self.file.check_range(begin, min(begin + self.rows * self.ctx_len + 1, self.hi))
        windows = order.read_eval_windows(
            self.file.tokens, self.lo, self.hi, ctx_len=self.ctx_len, first=first, rows=self.rows
        )
        return torch.from_numpy(windows)


class OrderedSampler(SequentialSampler, DistributedSampler[int]):
    """The indices from `first()` on; `first` is called at the start of each epoch. `length`: the indices of an epoch.

    Lightning replaces a sampler that is not a SequentialSampler (for overfit_batches) or not a DistributedSampler (with
    several devices). The order needs neither, so this class is both.
    """

    def __init__(self, length: int, first: Callable[[], int] = lambda: 0, endless: bool = False) -> None:
        self.length, self.first, self.endless = length, first, endless

    def __iter__(self) -> Iterator[int]:
        first = self.first()
        return iter(range(first, ENDLESS if self.endless else first + self.length))

    def __len__(self) -> int:
        return self.length


class ResumableLoader(DataLoader[Tensor]):
    """A loader that continues from the trainer's step. Lightning takes a loader with these methods as resumable."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _ignore_signals(worker: int) -> None:
    """Makes a worker ignore Ctrl-C and signals to the process group: the run ends its workers after it has saved."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class DataModule(LightningDataModule):
    """The batches of a corpus from any source, or of several corpora, a ``Mix``.

    ``batch_size``: the sequences of one optimizer step, over all devices and accumulated batches.
    ``eval_batch_size``: the sequences of one validation or test batch on one device. ``vocab``: "byte", "char",
    "20b" or "world"; the last two are read from the file ``vocab_path``. ``vocabulary``: one from a checkpoint; if
    given, it replaces ``vocab``.

    ``setup`` sets ``corpus``, ``vocabulary``, ``token_file`` and ``train_tokens``; of a mix, ``corpora`` and
    ``token_files`` by name. Without a trainer, the loaders are those of one device from step 0. ``predict_dataloader``
    reads the validation split. A mix has one loader for each corpus's validation and test split.

    ``endless``: one epoch never ends, so the trainer needs ``max_steps``. Else it is one pass.

    ``stream``: each row of a batch reads on where its row in the batch before ended, and LitRWKV carries the state
    along: truncated backpropagation through time. The batches are then ``StreamBatch``, in an order without a seed.

    ``prepare_data`` and ``setup`` raise UserError if the corpus is missing, wrong or too short, ``train_dataloader`` if
    the batch size cannot be divided among the devices.
    """

    batch_is_a_step = True
    """A batch is read in parts if gradients are accumulated, so micro-batches count differently then."""

    limit_val_batches: int | float | None = None
    """How many batches, or which fraction, of each corpus's validation split are read: by all processes together, while
    the Trainer's argument of this name counts those of each process."""

    def __init__(
        self,
        source: Source | Mix,
        *,
        batch_size: int = 1,
        ctx_len: int = 1024,
        vocab: str = "byte",
        vocab_path: str | Path | None = None,
        seed: int = 42,
        num_workers: int = 0,
        eval_batch_size: int = 8,
        vocabulary: Vocabulary | None = None,
        endless: bool = False,
        stream: bool = False,
    ) -> None:
        super().__init__()
        self.batch_size, self.ctx_len, self.seed = to_plain(batch_size), to_plain(ctx_len), seed
        self.num_workers, self.eval_batch_size = to_plain(num_workers), to_plain(eval_batch_size)
        for name, lowest in {"batch_size": 1, "ctx_len": 1, "eval_batch_size": 1, "num_workers": 0}.items():
            check_kind(name, getattr(self, name), (int,))
            check_at_least(name, getattr(self, name), lowest)
        check_kind("stream", stream, (bool,))
        self.mix = source if isinstance(source, Mix) else Mix({"": source}, [1])
        if stream and len(self.mix.sources) > 1:
            raise UserError("stream=True reads one corpus: a mix draws each of its samples from another place")
        self.stream = stream
        self.vocab = vocab
        self.vocab_path = Path(vocab_path) if vocab_path is not None else None
        self.endless = endless
        self._given_vocabulary = vocabulary
        self.corpora: dict[str, Corpus] = {}
        self._files: dict[str, TokenFile] = {}

    def prepare_data(self) -> None:
        """Downloads, checks and encodes the corpus, in one process only; ``setup`` then finds it in the cache."""
        if not self._files:
            self._open()

    def setup(self, stage: str | None = None) -> None:
        """Opens the corpus at the first call, then checks that the splits of ``stage`` (None: all) are long enough."""
        if not self._files:
            self.corpora, self.vocabulary, self._files = self._open()
            if not self.endless and (warning := self.text_warning()):  # the commands print it themselves
                warnings.warn(warning, stacklevel=2)
        for name, file in self._files.items():
            with errors_of_corpus(name):
                self._check_splits(stage, file, self.corpora[name], self.mix.sources[name])

    def _check_splits(self, stage: str | None, file: TokenFile, corpus: Corpus, source: Source) -> None:
        if stage in (None, "fit"):
            order.steps_per_pass(file.splits.train[1], self.ctx_len, self.batch_size)
        for name, stages in {"val": (None, "fit", "validate"), "test": (None, "test")}.items():
            lo, hi = getattr(file.splits, name)
            if name == "test" and not source.has_test_split:
                if stage == "test":
                    raise UserError(f"there is no test split if {corpus_setting('val_path')} is set: use val")
            elif stage in stages and order.eval_window_count(lo, hi, self.ctx_len) == 0:
                raise UserError(
                    f"the {name} split of {corpus.path} has {hi - lo} tokens, nothing to predict: "
                    f"use a larger corpus or another {corpus_setting('split')}"
                )

    @property
    def corpus_names(self) -> list[str]:
        """The names of the corpora of a mix, in the order of its loaders. Without a mix, []."""
        return [name for name in self.mix.sources if name]

    @property
    def unit(self) -> str:
        """The unit of scores, in bits per unit: byte, or token if the bytes of each token are not known."""
        return "byte" if hasattr(self.vocabulary, "bytes_per_token") else "token"

    @property
    def steps_per_pass(self) -> int:
        """Optimizer steps of one pass over the training split; of a mix, until each corpus has been read once."""
        total = sum(self.mix.shares)
        return max(
            -(-(file.splits.train[1] // self.ctx_len) * total // (share * self.batch_size))
            for file, share in zip(self.token_files.values(), self.mix.shares, strict=True)
        )

    def passes(self, n_steps: int) -> dict[str, float]:
        """The passes over the training split of each corpus in ``n_steps`` optimizer steps."""
        samples, total = n_steps * self.batch_size, sum(self.mix.shares)
        return {
            name: samples * share / total / (file.splits.train[1] // self.ctx_len)
            for (name, file), share in zip(self.token_files.items(), self.mix.shares, strict=True)
        }

    @property
    def train_tokens(self) -> Tokens:
        """The training split: (N,), memory-mapped."""
        return self.token_file.split("train")

    def description(self) -> str:
        """The corpora, the sizes of their splits and the vocabulary, in one line; a mix has a line for each corpus."""
        lines, total = [], sum(self.mix.shares)
        for (name, file), share in zip(self.token_files.items(), self.mix.shares, strict=True):
            train, val, test = (f"{hi - lo:,}" for lo, hi in file.splits)
            n_bytes = "" if isinstance(self.vocabulary, UnknownVocabulary) else f"{sum(file.n_bytes):,} bytes, "
            of_mix = f"{name}, {share / total:.1%} of the samples, " if name else ""
            lines.append(
                f"{of_mix}{self.corpora[name]}: {n_bytes}{train} / {val} / {test} tokens to train / validate / test"
            )
        vocabulary = f"vocabulary {self.vocabulary.kind} ({self.vocabulary.size})"
        return "\n".join([*lines, vocabulary]) if self.corpus_names else f"{lines[0]}, {vocabulary}"

    def text_warning(self) -> str | None:
        """Describe the user's text if it does not look like text, else return None."""
        texts = [self.corpora[name].path for name, source in self.mix.sources.items() if isinstance(source, Text)]
        found = [describe_strange_bytes(path, self.vocabulary.kind) for path in texts]
        return "; ".join(warning for warning in found if warning) or None

    def train_dataloader(self) -> DataLoader[Tensor]:
        world_size, rank = self._process_rank()
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        how = {"ctx_len": self.ctx_len, "batch_size": self.batch_size, "accumulate": accumulate}
        how |= {"world_size": world_size, "rank": rank}
        batches: Dataset[Any]
        if self.stream:
            batches = StreamBatches(self.token_file, self._document_ends, **how)
        else:
            batches = TrainBatches(list(self.token_files.values()), self.mix.shares, seed=self.seed, **how)
        length = ENDLESS if self.endless else self.steps_per_pass * accumulate
        if not (trainer := self.trainer):
            return self._loader(batches, OrderedSampler(length))
        refuse_accumulation_schedule(trainer)
        if self.stream and trainer.overfit_batches:  # type: ignore[attr-defined]
            raise UserError("overfit_batches repeats its batches, and a stream reads on: leave out one of the two")

        def first() -> int:
            # Lightning has restored its loops by now, so a resumed run continues from this step.
            limit: int | float = trainer.overfit_batches  # type: ignore[attr-defined]
            if limit:  # each epoch starts with batch 0 again
                progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
                done: int = progress.processed
                return done % (min(limit, length) if isinstance(limit, int) else int(limit * length))
            return trainer.global_step * accumulate

        return self._loader(batches, OrderedSampler(length, first, endless=True))

    def val_dataloader(self) -> Any:
        return self._eval_loaders("val")

    def test_dataloader(self) -> Any:
        return self._eval_loaders("test")

    predict_dataloader = val_dataloader

    def _eval_loaders(self, split: str) -> DataLoader[Tensor] | list[DataLoader[Tensor]]:
        # Each loader of a mix starts its workers anew: those of all corpora would be too many processes.
        is_mix = len(self.corpora) > 1
        loaders = [
            self._loader(batches, OrderedSampler(len(batches)), not is_mix) for batches in self.eval_batches(split)
        ]
        return loaders if is_mix else loaders[0]

    def eval_batches(self, split: str, all_processes: bool = False) -> list[EvalBatches]:
        """The batches of "val" or "test" of each corpus: those of this process, or of all of them."""
        world_size, rank = (1, 0) if all_processes else self._process_rank()
        how = {"ctx_len": self.ctx_len, "rows": self.eval_batch_size, "world_size": world_size, "rank": rank}
        found = []
        for file in self.token_files.values():
            lo, hi = getattr(file.splits, split)
            if split == "val" and (limit := self.limit_val_batches) is not None:
                count = -(-order.eval_window_count(lo, hi, self.ctx_len) // self.eval_batch_size)
                count = min(count, limit if isinstance(limit, int) else int(limit * count))
                hi = min(hi, max(lo, 1) + count * self.eval_batch_size * self.ctx_len)
            found.append(EvalBatches(file, (lo, hi), **how))
        return found

    def _loader(self, batches: Dataset[Any], sampler: OrderedSampler, keeps_workers: bool = True) -> DataLoader[Tensor]:
        return ResumableLoader(
            batches,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0 and keeps_workers,
            worker_init_fn=_ignore_signals if self.num_workers else None,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            # Without this generator, each pass over the loader would draw from the generator that dropout uses.
            generator=torch.Generator(),
        )

    def _open(self) -> tuple[dict[str, Corpus], Vocabulary, dict[str, TokenFile]]:
        corpora, files = {}, {}
        for name, source in self.mix.sources.items():
            with errors_of_corpus(name):
                corpora[name] = source.open()
        vocabulary = self._given_vocabulary or build_vocabulary(self.vocab, list(corpora.values()), self.vocab_path)
        for name, source in self.mix.sources.items():
            with errors_of_corpus(name):
                files[name] = source.open_tokens(corpora[name], vocabulary)
                if self.stream:
                    self._document_ends = DocumentEnds(source.document_ends(corpora[name], files[name], vocabulary))
        return corpora, vocabulary, files

    def _process_rank(self) -> tuple[int, int]:
        """The number of processes and the rank of this one."""
        if not self.trainer:
            return 1, 0
        return self.trainer.world_size, self.trainer.global_rank

    @property
    def token_files(self) -> dict[str, TokenFile]:
        """The tokens of each corpus and the ranges of its splits, by name; the only corpus has the name ""."""
        if not self._files:
            raise RuntimeError("call setup() first: the corpus is not open yet")
        return self._files

    @property
    def token_file(self) -> TokenFile:
        """The tokens and the ranges of the splits of the only corpus."""
        return self.token_files[""]

    @property
    def corpus(self) -> Corpus:
        """The only corpus."""
        return self.corpora[""]

    @property
    def source(self) -> Source:
        """The source of the only corpus."""
        return self.mix.sources[""]


def refuse_accumulation_schedule(trainer: Trainer) -> None:
    """Raises UserError for GradientAccumulationScheduler, which would only divide a step of the same size."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
        raise UserError(
            "GradientAccumulationScheduler would not change the steps: batch_size counts the sequences of one "
            "optimizer step, however it is divided; use accumulate_grad_batches, or a loader of your own"
        )


class CorpusDataModule(DataModule):
    """A text file, folder or glob, split by fractions of its bytes, or validated on ``val_path``: see ``Text``.

    ``settings`` are the arguments of DataModule.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        split: tuple[float, float, float] = (0.9, 0.05, 0.05),
        val_path: str | Path | None = None,
        field: str = "text",
        **settings: Any,
    ) -> None:
        super().__init__(Text(path, split, val_path, field), **settings)


class Enwik8DataModule(DataModule):
    """enwik8 in the folder ``path``, downloaded from ``url`` if missing. ``settings``: the arguments of DataModule."""

    def __init__(self, path: str | Path = "data/enwik8", *, url: str = ENWIK8_URL, **settings: Any) -> None:
        super().__init__(Enwik8(path, url), **settings)


class TokensDataModule(DataModule):
    """Token ids in memory, or in Megatron's format in the files ``ids``.bin and ``ids``.idx if ``ids`` is a path.

    ``ids`` in memory is one sequence of integers: a list, a one-dimensional tensor or array, memory-mapped or not. Or
    it is a list of such sequences, the documents; so is a column of a Hugging Face dataset. Documents are joined
    without a token in between: if your model needs one, end each document with it. ``prepare_data`` writes the ids to
    the cache folder, where the same ids are found again.

    ``vocab_size``: the number of different token ids, for ids whose text is not known. LitRWKV then scores bits per
    token; only exactly 256 ids count as bytes. Else give their vocabulary, for bits per byte: ``vocab`` ("byte", or
    "20b" or "world" with ``vocab_path``) or ``vocabulary``. Files have vocabulary "byte" if none of these is given.

    ``split``: the fractions of the ids (train, val, test). A boundary moves back to the start of a document.
    ``settings``: the other arguments of DataModule.

    Raises UserError if ``ids`` is not a sequence or its vocabulary is missing. ``prepare_data`` and ``setup`` raise it
    for an id that is not an integer from 0 to vocab_size - 1, with its position.
    """

    def __init__(
        self,
        ids: Any,
        *,
        split: tuple[float, float, float] = (0.9, 0.05, 0.05),
        vocab_size: int | None = None,
        vocab: str | None = None,
        vocab_path: str | Path | None = None,
        vocabulary: Vocabulary | None = None,
        **settings: Any,
    ) -> None:
        if sum(given is not None for given in (vocab_size, vocab, vocabulary)) > 1:
            raise UserError("vocab_size, vocab and vocabulary exclude each other: give one of them")
        if vocab not in (None, "byte", *FILE_VOCABULARIES):
            raise UserError(f"token ids take vocab=byte, 20b or world, got {vocab!r}; for others, give vocab_size=")
        if vocab_size is not None:
            vocabulary = UnknownVocabulary(vocab_size)
        source: Source
        if isinstance(ids, str | Path):
            source = Binidx(ids, split)
        else:
            if vocab is not None:
                path = Path(vocab_path) if vocab_path is not None else None
                vocabulary = read_vocabulary(path, vocab) if vocab in FILE_VOCABULARIES else Vocabulary()
            if vocabulary is None:
                raise UserError(
                    "token ids need vocab_size=, their number, or a vocabulary (vocab=byte, 20b, world or vocabulary=)"
                )
            source = Ids(ids, vocabulary, split)
        super().__init__(source, vocab=vocab or "byte", vocab_path=vocab_path, vocabulary=vocabulary, **settings)


class MixDataModule(DataModule):
    """Several corpora, each with its share of the samples: see ``order.place_samples``.

    ``corpora``: the settings of each corpus by name, as those of `data=mix`:

        MixDataModule({"code": {"name": "stdlib", "share": 1}, "books": {"path": "books.txt", "share": 3}})

    An epoch never ends, so the Trainer needs ``max_steps``. ``settings`` are the other arguments of DataModule.
    """

    def __init__(self, corpora: dict[str, dict[str, Any]], **settings: Any) -> None:
        def as_in_yaml(value: Any) -> Any:
            return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value

        plain = {name: {key: as_in_yaml(value) for key, value in given.items()} for name, given in corpora.items()}
        data = Data(name=MIX, corpora=plain, vocab=settings.get("vocab", "byte"))
        super().__init__(build_mix(data, Path()), endless=True, **settings)

    def train_dataloader(self) -> DataLoader[Tensor]:
        if self.trainer and self.trainer.max_steps < 1:
            raise UserError("a mix has no pass of its corpora: give the Trainer max_steps")
        return super().train_dataloader()


def build_mix(data: Data, cwd: Path, digests: dict[str, str] | None = None) -> Mix:
    """Builds the sources of `data`, one without a mix. digests: those of a checkpoint's texts, by name."""
    sources = {name: build_source(part, cwd) for name, part in data.parts().items()}
    for name, source in sources.items():
        if isinstance(source, Text) and (digest := (digests or {}).get(name)):
            sources[name] = source.matching(digest)
    return Mix(sources, data.shares)


def open_data(
    data: Data, seed: int, cwd: Path, vocabulary: Vocabulary | None, digests: dict[str, str] | None = None
) -> DataModule:
    """Builds the data module for `data`. Relative paths are relative to `cwd`.

    vocabulary, digests: of the checkpoint and of its texts by name, if there is one.
    """
    return DataModule(
        build_mix(data, cwd, digests),
        batch_size=data.batch_size,
        ctx_len=data.ctx_len,
        vocab=data.vocab,
        vocab_path=cwd / data.vocab_path if data.vocab_path else None,
        seed=seed,
        num_workers=data.num_workers,
        eval_batch_size=data.eval_batch_size,
        vocabulary=vocabulary or (UnknownVocabulary(data.vocab_size) if data.vocab_size is not None else None),
        endless=True,
        stream=data.stream,
    )
