"""Types and ranges of the settings. The defaults of the commands are in conf/.

The classes mirror the groups of conf/: `data`, `model`, `optim` and `schedule` field by field. `trainer`, `callbacks`
and `logger` hold the arguments of Lightning's classes, which are not repeated here: a value must have the type that it
has in its YAML file. Only the standard library is imported, so that a mistake is reported at once.

`Optim` and `Schedule` are public: a Python program gives them to LitRWKV.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from rwkv_pl.checks import (
    check_above,
    check_at_least,
    check_between,
    check_kind,
    check_one_of,
    make_plain,
    suggest_key,
)
from rwkv_pl.errors import UserError

CONFIG_MODULE = "rwkv_pl.conf"

KERNELS = ("auto", "compiled", "scan", "recurrence")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
PRECISIONS = ("auto", "32-true", "64-true", "bf16-mixed", "bf16-true", "16-mixed")
# Lightning's other names of these, and its precisions that are untested here.
OTHER_PRECISIONS = ("32", "64", "bf16", "16", "transformer-engine", "transformer-engine-float16")
VOCABULARIES = ("byte", "char", "20b", "world")
# Those that are read from a file, data.vocab_path.
FILE_VOCABULARIES = ("20b", "world")
# Token ids of which only the number is known, data.vocab_size: their text is not.
UNKNOWN = "unknown"
ID_DTYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")

# The paths among the settings of `data`.
DATA_PATHS = ("path", "val_path", "vocab_path")


@dataclass
class ModelConfig:
    """Size of a model: the keys of its file in conf/model/ without `name`, and vocab_size, which the data sets."""

    vocab_size: int
    n_layer: int
    n_embd: int
    dropout: float = 0.0

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("vocab_size", "n_layer", "n_embd"):
            check_kind(f"model.{name}", getattr(self, name), (int,))
            check_at_least(f"model.{name}", getattr(self, name), 1)
        check_kind("model.dropout", self.dropout, (float,))
        check_between("model.dropout", self.dropout, 0, 1)


@dataclass
class RWKV4Config(ModelConfig):
    """Size of an RWKV-4."""


@dataclass
class RWKV7Config(ModelConfig):
    """Size of an RWKV-7. The last fields are not settings: 0 is the official size, and files of weights have others.

    head_size: channels of a head, officially 64, for which the operator is compiled.
    n_ffn: width of the channel mixing, officially 4 n_embd.
    rank_w, rank_a, rank_v, rank_g: of the low-rank functions: decay, in-context learning rate, values, gate.
    """

    head_size: int = 0
    n_ffn: int = 0
    rank_w: int = 0
    rank_a: int = 0
    rank_v: int = 0
    rank_g: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        official = {"head_size": 64, "n_ffn": 4 * self.n_embd}
        for name, factor in {"rank_w": 2.5, "rank_a": 2.5, "rank_v": 1.7, "rank_g": 5.0}.items():
            official[name] = max(32, round(factor * self.n_embd**0.5 / 32) * 32)
        for name, size in official.items():
            check_kind(f"model.{name}", getattr(self, name), (int,))
            setattr(self, name, getattr(self, name) or size)
            check_at_least(f"model.{name}", getattr(self, name), 1)
        if self.n_embd % self.head_size:
            raise UserError(
                f"model.n_embd must be a multiple of {self.head_size} in an rwkv7 model, the channels of a head, got "
                f"{self.n_embd}"
            )


MODEL_CONFIGS: dict[str, type[ModelConfig]] = {"rwkv4": RWKV4Config, "rwkv7": RWKV7Config}
"""Config class of each model version, by model.name; model.MODELS adds the modules."""


@dataclass(frozen=True)
class CorpusType:
    """A corpus type: the class that opens it, and its requirements for other settings of `data`."""

    source: str
    """Module and class, imported when a corpus is opened. The fields of the class are settings of `data`."""
    path: str | None = None
    """If data.path is required: its meaning and how to set it. None if it has a default or is not used."""
    vocabularies: tuple[str, ...] = VOCABULARIES


CORPORA = {
    "enwik8": CorpusType("rwkv_pl.data.sources.enwik8:Enwik8"),
    "stdlib": CorpusType("rwkv_pl.data.sources.stdlib:Stdlib"),
    "text": CorpusType("rwkv_pl.data.sources.text:Text", "your own text; give data.path=FILE"),
    "binidx": CorpusType(
        "rwkv_pl.data.sources.binidx:Binidx",
        "PREFIX.bin and PREFIX.idx; give data.path=PREFIX",
        ("byte", "20b", "world"),
    ),
    "tokens": CorpusType(
        "rwkv_pl.data.sources.id_file:IdFile",
        "a .npy or .bin of token ids; give data.path=FILE",
        (UNKNOWN, "byte", "20b", "world"),
    ),
}
"""Corpus types, by data.name. There is one more: mix, several of these."""

MIX = "mix"

# The settings in the file of a corpus type that hold for the whole of a mix.
SETTINGS_OF_MIX = (
    "batch_size", "ctx_len", "vocab", "vocab_size", "vocab_path", "eval_batch_size", "num_workers", "stream",
)  # fmt: skip


def corpus_defaults(name: str) -> dict[str, Any]:
    """Read the settings of one corpus of a mix from conf/data/NAME.yaml, the file of its type."""
    check_one_of(corpus_setting("name") if _corpus.get() else "data.name", name, tuple(CORPORA))
    return {key: value for key, value in read_conf(f"data/{name}.yaml").items() if key not in SETTINGS_OF_MIX}


def check_fractions(split: Sequence[float], above_zero: bool = False) -> None:
    """Raise UserError unless these are three numbers from 0, or above 0, with the sum 1: train, val and test."""
    # Conditions that a NaN fails too.
    is_valid = len(split) == 3 and all(part > 0 or (part == 0 and not above_zero) for part in split)
    if not (is_valid and abs(sum(split) - 1) < 1e-6):
        wanted = "above 0, with the sum 1" if above_zero else "with the sum 1"
        raise UserError(
            f"{corpus_setting('split')} must be three fractions (train, val, test) {wanted}, got {list(split)}"
        )


_corpus: ContextVar[str] = ContextVar("corpus", default="")


def corpus_setting(key: str) -> str:
    """The name of a corpus's setting for a message: data.KEY (data for the type, `name`), or data.corpora.NAME.KEY."""
    if corpus := _corpus.get():
        return f"data.corpora.{corpus}.{key}"
    return "data" if key == "name" else f"data.{key}"


@contextmanager
def errors_of_corpus(name: str) -> Iterator[None]:
    """Make a UserError inside the block name the corpus `name` of a mix. "": the outer block's, if any."""
    before = _corpus.set(name or _corpus.get())
    try:
        yield
    except UserError as error:
        where = f"data.corpora.{name}"
        if not name or where in str(error):
            raise
        raise UserError(f"{where}: {error}") from error
    finally:
        _corpus.reset(before)


@dataclass
class Data:
    """The text and its division into sequences. Relative paths count from the folder where the run first started."""

    name: str = "enwik8"
    path: str | None = None
    val_path: str | None = None
    url: str | None = None
    batch_size: int = 1
    ctx_len: int = 1024
    vocab: str = "byte"
    vocab_size: int | None = None
    vocab_path: str | None = None
    dtype: str | None = None
    split: list[float] = field(default_factory=lambda: [0.9, 0.05, 0.05])
    eval_batch_size: int = 8
    num_workers: int = 0
    stream: bool = False
    field: str = "text"
    corpora: Any = None

    def __post_init__(self) -> None:
        check_one_of("data.name", self.name, (*CORPORA, MIX))
        check_one_of("data.vocab", self.vocab, (*VOCABULARIES, UNKNOWN))
        self._check_vocab_size()
        if self.vocab_path and self.vocab not in FILE_VOCABULARIES:
            raise UserError(
                f"data.vocab_path is only for data.vocab={' and '.join(FILE_VOCABULARIES)}, the config has "
                f"{self.vocab}: leave it out"
            )
        for name in ("batch_size", "ctx_len", "eval_batch_size"):
            check_at_least(f"data.{name}", getattr(self, name), 1)
        check_at_least("data.num_workers", self.num_workers, 0)
        if self.name == MIX:
            self._check_mix()
            return
        corpus, which = CORPORA[self.name], f"{corpus_setting('name')}={self.name}"
        if corpus.path and not self.path:
            raise UserError(f"{corpus_setting('path')} is missing: {which} reads {corpus.path}")
        if self.dtype is not None:
            check_one_of(corpus_setting("dtype"), self.dtype, ID_DTYPES)
        if self.val_path == "":
            raise UserError(
                f"{corpus_setting('val_path')} is empty: give a file, a folder or a glob, or null to validate on a "
                f"part of {corpus_setting('path')}"
            )
        if self.vocab not in corpus.vocabularies:
            raise UserError(f"{which} takes data.vocab={' or '.join(corpus.vocabularies)}, got {self.vocab}")
        check_fractions(self.split)

    def _check_vocab_size(self) -> None:
        if self.vocab_size is not None:
            check_at_least("data.vocab_size", self.vocab_size, 1)
            if self.vocab != UNKNOWN:
                raise UserError(
                    f"data.vocab_size is only for data.vocab={UNKNOWN}, the config has {self.vocab}: leave it out"
                )
        elif self.vocab == UNKNOWN:
            raise UserError(
                "data.vocab_size is missing: give the number of different token ids, or data.vocab=byte, 20b or world "
                "if the ids are text"
            )

    def _check_mix(self) -> None:
        if self.stream:
            raise UserError(
                "data.stream=true reads one corpus, and data=mix draws each sample from another place: "
                "leave it out, or choose another data="
            )
        if not self.corpora:
            raise UserError(
                "data.corpora is missing: give each corpus of the mix a name and a share, "
                "'data.corpora={code:{name:stdlib,share:1},books:{path:books.txt,share:3}}'"
            )
        check_kind("data.corpora", self.corpora, (dict,))
        for name, given in self.corpora.items():
            where = f"data.corpora.{name}"
            if not re.fullmatch(r"[A-Za-z][\w-]*", str(name)):
                raise UserError(f"{where}: the name of a corpus is a letter, then letters, digits, _ and -")
            check_kind(where, given, (dict,))
            with errors_of_corpus(name):
                defaults = corpus_defaults(given.get("name", "text")) | {"share": 1}
            for key, value in given.items():
                if key not in defaults:
                    raise UserError(f"{where}.{key} is not a setting{suggest_key(str(key), defaults)}")
                if value is not None or defaults[key] is not None:
                    check_kind(f"{where}.{key}", value, (str if defaults[key] is None else type(defaults[key]),))
            if "share" not in given:
                raise UserError(f"{where}.share is missing: give a whole number, its part of the sum of the shares")
            check_at_least(f"{where}.share", given["share"], 1)
            for part in given.get("split", ()):
                check_kind(f"{where}.split", part, (float,))
        if sum(self.shares) >= 2**31:
            raise UserError(f"data.corpora: the sum of the shares must be below 2^31, got {sum(self.shares)}")
        self.parts()

    def parts(self) -> dict[str, "Data"]:
        """The settings of each corpus of a mix, by name. Without a mix, these settings by the name ""."""
        parts = {}
        for name, given in (self.corpora or {}).items() if self.name == MIX else ():
            settings = corpus_defaults(given.get("name", "text")) | given
            with errors_of_corpus(name):
                parts[name] = replace(self, corpora=None, **{k: v for k, v in settings.items() if k != "share"})
        return parts or {"": self}

    @property
    def shares(self) -> list[int]:
        """The shares of the corpora of a mix. Without a mix, [1]."""
        return [given["share"] for given in (self.corpora or {}).values()] if self.name == MIX else [1]


@dataclass
class Model:
    """Version and size of the model."""

    name: str = "rwkv4"
    n_layer: int = 12
    n_embd: int = 512
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_one_of("model.name", self.name, tuple(MODEL_CONFIGS))
        MODEL_CONFIGS[self.name](vocab_size=1, n_layer=self.n_layer, n_embd=self.n_embd, dropout=self.dropout)


OFFICIAL_OPTIM = "optim/rwkv.yaml"


@dataclass(init=False)
class Optim:
    """The optimizer class and its arguments.

    Optim() is the official RWKV optimizer: all its values are those of conf/optim/rwkv.yaml, `rwkv-train optim=rwkv`.
    Optim(lr=1e-3) changes one of them. These values apply only to the class in that file, torch.optim.AdamW:

        Optim("torch.optim.SGD", lr=0.3, own={"momentum": 0.9})

    has no betas, eps, weight decay or lr_scale except those given, and must be given lr; else it raises UserError.

    _target_: module and name of the class, a subclass of torch.optim.Optimizer.
    lr: the highest learning rate; the Schedule sets the rate of each step.
    betas, eps: None for the defaults of another class, or if it has no such argument (torch.optim.SGD).
    weight_decay: only for two-dimensional parameters named `*.weight`.
    lr_scale: factors of the learning rate, by the last part of a parameter's name. {} for no factors, `version` for
    the model version's own table.
    own: arguments that only this class has, such as {"momentum": 0.9}. In YAML they are further keys of optim.
    """

    _target_: str
    lr: float
    betas: list[float] | None
    eps: float | None
    weight_decay: float
    lr_scale: Any
    own: dict[str, Any]

    def __init__(
        self,
        _target_: str | None = None,
        lr: float | None = None,
        betas: list[float] | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        lr_scale: Any = None,
        own: dict[str, Any] | None = None,
    ) -> None:
        values = read_conf(OFFICIAL_OPTIM)
        if _target_ not in (None, values["_target_"]):
            if lr is None:
                raise UserError(
                    f"Optim(_target_={_target_!r}) needs lr=: the learning rate in conf/{OFFICIAL_OPTIM} is for "
                    f"{values['_target_']}"
                )
            values = {"betas": None, "eps": None, "weight_decay": 0.0, "lr_scale": None}
        given = {"_target_": _target_, "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        given["lr_scale"] = lr_scale
        for name, value in (values | {key: value for key, value in given.items() if value is not None}).items():
            setattr(self, name, value)
        self.own = own or {}
        self.__post_init__()

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the class. Lists become tuples, which torch expects."""
        common = {"lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}
        given = {key: value for key, value in common.items() if value is not None} | self.own
        return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}

    def __post_init__(self) -> None:
        make_plain(self)
        check_kind("optim._target_, the name of a class,", self._target_, (str,))
        if not isinstance(self.lr, float):  # check_above names the range for NaN
            check_kind("optim.lr", self.lr, (float,))
        check_above("optim.lr", self.lr, 0)
        if self.betas is not None and not (
            isinstance(self.betas, list | tuple) and self.betas and all(0 <= beta < 1 for beta in self.betas)
        ):
            raise UserError(f"optim.betas must be numbers from 0 to below 1, got {self.betas}")
        if self.eps is not None:
            check_above("optim.eps", self.eps, 0)
        check_at_least("optim.weight_decay", self.weight_decay, 0)
        if self.lr_scale not in (None, "version"):
            check_kind("optim.lr_scale, if neither null nor version,", self.lr_scale, (dict,))
            for name, factor in self.lr_scale.items():
                check_kind(f"optim.lr_scale.{name}", factor, (float,))
                check_above(f"optim.lr_scale.{name}", factor, 0)


@dataclass
class OptimGroup(Optim):
    """The group `optim` of a command's config. A key that its YAML file leaves out does not come from rwkv.yaml."""

    _target_: str = "torch.optim.Adam"
    lr: float = 1e-5
    betas: list[float] | None = None
    eps: float | None = None
    weight_decay: float = 0.0
    lr_scale: Any = None
    own: dict[str, Any] = field(default_factory=dict)


def read_conf(name: str) -> dict[str, Any]:
    """Read a file of conf/, such as optim/rwkv.yaml, without its defaults list."""
    from importlib import resources

    from omegaconf import OmegaConf

    text = resources.files(CONFIG_MODULE).joinpath(name).read_text(encoding="utf-8")
    return OmegaConf.to_container(OmegaConf.create(text))  # type: ignore[return-value]


def split_own_arguments(optim: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split the optim group of a config into the keys of every optimizer, and those that only its class has."""
    known = {of.name for of in fields(Optim)} - {"own"}
    common = {key: value for key, value in optim.items() if key in known}
    return common, {key: value for key, value in optim.items() if key not in known}


@dataclass
class Schedule:
    """The learning rate as a function of the optimizer step.

    Schedule() is constant, without a warm-up: conf/schedule/constant.yaml. Schedule("cosine", warmup_steps=100) needs a
    Trainer with a length, max_steps or max_epochs, or decay_steps.

    It rises from 0 to optim.lr over `warmup_steps`, then falls along the curve `name` and reaches `final_lr` at step
    `decay_steps` (None: the run's last step).

    decay_share: only for wsd (warm-up, stable, decay): the rate stays at optim.lr and falls over this last share of the
    steps up to `decay_steps`.
    """

    name: str = "constant"
    warmup_steps: int = 0
    decay_steps: int | None = None
    final_lr: float = 0.0
    decay_share: float | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        check_kind("schedule.warmup_steps", self.warmup_steps, (int,))
        check_kind("schedule.final_lr", self.final_lr, (float,))
        check_one_of("schedule.name", self.name, ("constant", "cosine", "linear", "wsd", "exponential"))
        if (self.decay_share is None) == (self.name == "wsd"):
            wrong = "is missing" if self.decay_share is None else f"is not a setting of schedule={self.name}"
            raise UserError(f"schedule.decay_share {wrong}; it belongs to schedule=wsd")
        if self.decay_share is not None and not 0 < self.decay_share <= 1:
            raise UserError(f"schedule.decay_share must be above 0 and at most 1, got {self.decay_share}")
        check_at_least("schedule.warmup_steps", self.warmup_steps, 0)
        if self.decay_steps is not None:
            check_at_least("schedule.decay_steps", self.decay_steps, 1)
            if self.decay_steps <= self.warmup_steps:
                raise UserError(
                    f"schedule.decay_steps ({self.decay_steps}) must be above schedule.warmup_steps "
                    f"({self.warmup_steps}): the decay comes after the warm-up"
                )
        check_at_least("schedule.final_lr", self.final_lr, 0)
        if self.name == "exponential":
            check_above("schedule.final_lr", self.final_lr, 0)


@dataclass
class Checkpoints:
    """How checkpoints are written. sharded: as folders, in which each process writes its part."""

    sharded: bool = False


@dataclass
class Train:
    """The settings of conf/train.yaml."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=OptimGroup)
    schedule: Schedule = field(default_factory=Schedule)
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    kernel: str = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    loss_chunk_len: int | None = None
    tf32: bool = True
    seed: int = 42
    skip_nonfinite: int = 0
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    resume: str | None = None
    weights: str | None = None
    plugins: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_at_least("skip_nonfinite", self.skip_nonfinite, 0)
        if self.loss_chunk_len is not None:
            check_at_least("loss_chunk_len", self.loss_chunk_len, 1)
        check_one_of("kernel", self.kernel, KERNELS)
        for name, data in self.data.parts().items():
            with errors_of_corpus(name):
                check_fractions(data.split, above_zero=True)
        check_between("seed", self.seed, 0, 2**63 - 1, inclusive=True)
        max_steps, max_epochs = self.trainer.get("max_steps", -1), self.trainer.get("max_epochs")
        if self.data.name == MIX and (max_steps < 1 or (max_epochs or -1) > 0):
            raise UserError("data=mix needs trainer.max_steps, and no max_epochs: a mix has no pass of its corpora")
        if self.checkpoints.sharded and (strategy := self.trainer.get("strategy")) != "fsdp":
            raise UserError(
                f"checkpoints.sharded=true needs trainer=fsdp, got trainer.strategy={strategy}: give "
                "checkpoints.sharded=false, which continues from sharded checkpoints too"
            )

    def hyperparameters(self) -> dict[str, Any]:
        """Return the settings for loggers, without the keys that the chosen optim and schedule do not have."""
        plain = asdict(self)
        plain["optim"] |= plain["optim"].pop("own")
        for group in ("optim", "schedule"):
            optional = ("betas", "eps", "decay_share")
            plain[group] = {k: v for k, v in plain[group].items() if not (k in optional and v is None)}
        return plain


@dataclass
class Eval:
    """The settings of conf/eval.yaml. `weights` and `out` count from the folder where the command is typed."""

    data: Data = field(default_factory=Data)
    weights: str | None = None
    split: str = "val"
    protocol: str = "both"
    streams: int = 1
    warmup: int = 1024
    chunk_len: int = 1024
    stride: int | None = None
    accelerator: str = "auto"
    precision: str = "32-true"
    kernel: str = "auto"
    out: str | None = None

    def __post_init__(self) -> None:
        if not self.weights:
            raise UserError("weights is missing: give weights=PATH, a run folder, .ckpt, .pth or Hugging Face folder")
        check_one_of("split", self.split, ("train", "val", "test"))
        check_one_of("protocol", self.protocol, ("both", "carried", "windows"))
        check_at_least("streams", self.streams, 1)
        check_at_least("warmup", self.warmup, 0)
        check_at_least("chunk_len", self.chunk_len, 1)
        if self.stride is not None:
            check_between("stride", self.stride, 1, self.data.ctx_len, inclusive=True)
        check_one_of("accelerator", self.accelerator, ACCELERATORS)
        check_one_of("precision", self.precision, ("32-true", "64-true", "bf16-mixed", "16-mixed"))
        check_one_of("kernel", self.kernel, KERNELS)


GROUPS = ("data", "model", "optim", "schedule", "trainer", "callbacks", "logger", "experiment")

# Types of the settings whose YAML default is null, or which accept more types than that of the default.
TRAINER_KINDS: dict[str, tuple[type, ...]] = {
    "devices": (int, str, list),
    "accumulate_grad_batches": (int, str),
    "val_check_interval": (int, str),
    "precision": (str, int),
    "max_epochs": (int,),
    "max_time": (str, dict),
    "limit_val_batches": (int, float),
    "limit_test_batches": (int, float),
    "deterministic": (bool, str),
    "benchmark": (bool,),
    "profiler": (str,),
}
# Settings that may be null although their default is not.
TRAINER_NULLABLE = {"gradient_clip_val", "limit_val_batches", "precision"}

# Arguments of Lightning's Trainer that would conflict with the order of batches (data/order.py) or with lengths in
# optimizer steps, and the replacement of each.
TRAINER_OWNED = {
    "limit_train_batches": "use trainer.max_steps",
    "overfit_batches": "use data=text with a small file",
    "fast_dev_run": "use trainer.max_steps=1",
    "reload_dataloaders_every_n_epochs": "leave it out, batch n depends only on the seed and n",
    "min_steps": "set the length with max_steps, max_epochs or max_time",
    "min_epochs": "set the length with max_steps, max_epochs or max_time",
    "num_sanity_val_steps": "use trainer.max_steps=1, which ends with a validation",
    "check_val_every_n_epoch": "use trainer.val_check_interval, in optimizer steps",
    "use_distributed_sampler": "leave it out, every batch is already divided over the devices",
}


def _is_duration(length: Any) -> bool:
    """Whether Lightning takes `length` as max_time: days:hours:minutes:seconds, or a mapping of units to numbers."""
    if isinstance(length, dict):
        units = ("weeks", "days", "hours", "minutes", "seconds")
        return all(unit in units and type(number) in (int, float) for unit, number in length.items())
    return isinstance(length, str) and bool(re.fullmatch(r"\d+:\d\d:\d\d:\d\d", length))


def check_trainer(trainer: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Check keys and types of `trainer` against conf/trainer/default.yaml, and the ranges. Raises UserError."""
    for key, value in trainer.items():
        if key in TRAINER_OWNED:
            raise UserError(f"trainer.{key} is not supported: {TRAINER_OWNED[key]}")
        if key not in defaults:
            raise UserError(f"trainer.{key} is not a setting{suggest_key(key, defaults)}")
        kinds = TRAINER_KINDS.get(key) or (type(defaults[key]),)
        if value is None and (defaults[key] is None or key in TRAINER_NULLABLE):
            continue
        if key == "max_time" and not _is_duration(value):
            raise UserError(
                f"trainer.{key} must be days:hours:minutes:seconds, as in 00:08:00:00 for eight hours, got {value!r}"
            )
        check_kind(f"trainer.{key}", value, kinds)
    trainer = defaults | trainer
    for key in ("accumulate_grad_batches", "val_check_interval"):
        if isinstance(trainer[key], str):
            check_one_of(f"trainer.{key}, if not a number,", trainer[key], ("auto",))
            trainer[key] = 1
    for key in ("max_steps", "max_epochs"):
        if trainer[key] is not None and trainer[key] < 1 and trainer[key] != -1:
            raise UserError(f"trainer.{key} must be at least 1, or -1 for no limit, got {trainer[key]}")
    for key in ("val_check_interval", "accumulate_grad_batches", "log_every_n_steps", "num_nodes", "timeout"):
        check_at_least(f"trainer.{key}", trainer[key], 1)
    for key in ("limit_val_batches", "limit_test_batches"):
        limit = 0 if trainer[key] is None else trainer[key]
        if isinstance(limit, float) and limit > 1:
            raise UserError(f"trainer.{key} must be a fraction from 0.0 to 1.0 or a whole number, got {limit}")
        check_at_least(f"trainer.{key}", limit, 0)
    check_one_of("trainer.accelerator", trainer["accelerator"], ACCELERATORS)
    if isinstance(trainer["deterministic"], str):
        check_one_of("trainer.deterministic, if neither true nor false,", trainer["deterministic"], ("warn",))
    if re.match("ddp_(spawn|fork|notebook)", trainer["strategy"].lower()):
        raise UserError(
            f"trainer.strategy={trainer['strategy']} is not supported, it copies this process: use ddp, which starts "
            "the command once per device"
        )
    if re.match("fsdp_|deepspeed", trainer["strategy"]):
        raise UserError(
            f"trainer.strategy={trainer['strategy']} is not supported: use trainer=fsdp, which divides the model"
        )
    if trainer["precision"] == "16-true":
        raise UserError(
            "trainer.precision=16-true is not supported, small gradients underflow to 0 and the loss becomes NaN: use "
            "16-mixed, which scales the loss, or bf16-true"
        )
    if trainer["precision"] is not None and str(trainer["precision"]) not in OTHER_PRECISIONS:
        check_one_of("trainer.precision", trainer["precision"], PRECISIONS)
    if trainer["gradient_clip_val"] is not None:
        check_at_least("trainer.gradient_clip_val", trainer["gradient_clip_val"], 0)
