"""The sections of a resolved configuration, as pydantic models; unknown keys are refused.

This module knows nothing of methods and suites: their parameters are checked by `harness.config.validation`, which asks
the registries. It is therefore safe to import from every room.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from harness.runtime.device import DType
from harness.store.paths import EXAMPLE_ROWS

EXAMPLE_ROWS_ROOT = "tiny:"
"""As `data.root`: the few evaluation rows that ship with the harness."""


class StrictModel(BaseModel):
    """Base of every section: unknown keys, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class CorpusConfig(StrictModel):
    """A set of documents: where they lie and how many of them are taken."""

    path: str = Field(description="hub dataset id, Parquet, .jsonl or .txt file, folder of .txt files, or 'stdlib'")
    configuration: str = Field("default", description="configuration of the hub dataset")
    split: str = Field("train", description="split that is read")
    revision: str = Field("main", description="revision of the hub dataset; a commit hash pins the text")
    text_column: str = Field("text", description="column that holds the text")
    name_column: str | None = Field(
        None,
        description="column that holds the document's name; documents of one name and domain are parts of one text, "
        "which counts once in intervals and tests. Default: the document's number in the file",
    )
    domain_column: str | None = Field(
        None, description="column that holds the document's domain; a.b for the field b of the structure a"
    )
    domain: str = Field("all", description="domain of documents for which no column gives one")
    domains: list[str] | dict[str, str] | None = Field(
        None, description="only documents of these domains; a mapping also renames them. Default: all domains"
    )
    first_bytes: int | None = Field(
        None, gt=0, description="number of bytes kept from the beginning of each document. Default: whole documents"
    )
    max_bytes: int | None = Field(
        None, gt=0, description="no further document is taken once this many bytes of text are. Default: no limit"
    )
    per_domain: int | None = Field(None, gt=0, description="maximum number of documents a domain. Default: no limit")
    domain_bytes: int | None = Field(
        None, gt=0, description="as max_bytes, for each domain by itself (bytes). Default: no limit"
    )
    expected_bytes: int | None = Field(
        None, gt=0, description="size of the text for estimates made before it is on this machine (bytes)"
    )
    seed: int = Field(0, description="seed of the draw of documents where a limit is set")


class RoleConfig(StrictModel):
    """The model that fills a role, and how it is run."""

    model: str = Field(description="catalogue name, hub id, local folder, .gguf file, or tiny:NAME")
    revision: str | None = Field(None, description="hub revision. Default: the catalogue's, else main")
    dtype: DType = Field(
        "auto", description="computing precision of predictions and evaluation; auto: bfloat16 where it is native"
    )
    batch_tokens: int = Field(2048, gt=0, description="size of a batch, padding included (tokens)")
    trust_remote_code: bool = Field(False, description="run Python code that lies in the model's folder")
    attn_implementation: str | None = Field(
        None, description="attention implementation that transformers loads the model with. Default: its own choice"
    )
    prefix: str | None = Field(
        None,
        min_length=1,
        description='token that precedes every passage: bos, eos, or a token of the vocabulary, such as "\\n". '
        "Default: bos, else eos",
    )
    corpus: CorpusConfig | None = Field(
        None,
        description="text on which the model is trained further before it takes the role; keys that are not given are "
        "taken from the experiment's `corpus`. Default: the model as it is",
    )


class RolesConfig(StrictModel):
    """The models of an experiment by the part that each plays."""

    target: RoleConfig = Field(description="model that is trained and compared")
    sources: dict[str, RoleConfig] = Field(min_length=1, description="models whose knowledge is fused, by name")
    teacher: RoleConfig | None = Field(None, description="larger model of the target's family, for distillation")

    def by_name(self) -> dict[str, RoleConfig]:
        """Every role by its name: the target first, then the sources, then the teacher if there is one."""
        teacher = {"teacher": self.teacher} if self.teacher else {}
        return {"target": self.target, **self.sources, **teacher}


class PassagesConfig(StrictModel):
    """How documents are cut into passages, which is what models read."""

    max_bytes: int = Field(4096, ge=4, description="maximum length of a passage (bytes)")


class ExtractionConfig(StrictModel):
    """What is stored of the models' predictions on the training corpus."""

    k: int = Field(10, gt=0, description="number of most probable tokens stored for each position (paper: 10)")
    passages_per_shard: int | None = Field(
        None,
        gt=0,
        description="number of passages in one stored file. Default: 256, and more from a million passages on "
        "(4,096 at most), so that there are at most 4,096 files",
    )
    store_dtype: Literal["float16", "float32"] = Field(
        "float16", description="precision of stored log-probabilities and tail probabilities"
    )
    temperatures: list[Annotated[float, Field(gt=0)]] = Field(
        [], description="temperatures beside 1 at which distributions are stored, for distillation"
    )
    compression: Literal["zstd", "none"] = Field(
        "zstd", description="compression of stored predictions; lossless, so the numbers are the same"
    )
    max_skipped_fraction: float = Field(
        0.001,
        ge=0,
        le=1,
        description="largest fraction of passages that may be skipped because a model's logits are not finite; unless "
        "it is 0, one passage may always be skipped",
    )


class DataConfig(StrictModel):
    """Where evaluation rows and corpora lie on this machine."""

    root: str | None = Field(
        None,
        description="folder of HUB ID/CONFIGURATION/SPLIT.parquet (or .jsonl), or tiny: for a few example rows. "
        "Default: everything comes from the hub",
    )

    @property
    def folder(self) -> Path | None:
        """The folder itself; None where everything comes from the hub."""
        if self.root == EXAMPLE_ROWS_ROOT:
            return EXAMPLE_ROWS
        return Path(self.root) if self.root else None


class TrainingConfig(StrictModel):
    """How the target is trained, by default as in the paper (arXiv 2401.10491, section 4.1).

    A row may have values of its own (`baselines.training.RowTraining`).
    """

    sequence_length: int = Field(2048, gt=1, description="length of a packed sequence (tokens)")
    global_batch_size: int = Field(128, gt=0, description="sequences in an optimiser step, over all processes")
    micro_batch_size: int = Field(
        1,
        gt=0,
        description="sequences in one forward pass of a process; changes rounding only, but in rows with "
        "`balance: rescale`, whose ratio is taken over them",
    )
    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), description="decay rates of AdamW's first and second moment"
    )
    weight_decay: float = Field(0.1, ge=0, description="weight decay of AdamW")
    gradient_clip: float = Field(1.0, gt=0, description="maximum norm of the gradient")
    warmup_ratio: float = Field(0.008, ge=0, lt=1, description="fraction of the steps in which the learning rate rises")
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = Field(
        "cosine", description="course of the learning rate after the warm-up"
    )
    epochs: float = Field(1, gt=0, description="passes over the corpus")
    select: Literal["last", "best"] = Field(
        "last",
        description="checkpoint that a trained row is: the last, or the one that validation text likes best of those "
        "at the points of the learning curve",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="computing precision of training; auto: bfloat16 where it is native"
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto",
        description="recompute activations in the backward pass, which saves memory and costs a third of the time; "
        "auto: on a GPU whose memory would not hold them",
    )
    save_every: int = Field(
        500, gt=0, description="steps between two checkpoints, from which an interrupted training resumes"
    )
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="data loader processes of each training process; 0: it loads by itself; auto: up to 4 for a GPU, "
        "0 on a CPU",
    )
    timeout_minutes: float = Field(
        30,
        gt=0,
        description="minutes without progress of any process after which a training on several ends, naming the one "
        "that hangs",
    )
    deepspeed: str | None = Field(
        None, description="zero1, zero2, zero3 or a DeepSpeed JSON file. Default: data parallelism without DeepSpeed"
    )
    fsdp2: bool = Field(
        False,
        description="divide weights, gradients and moments among the processes by torch's FSDP2, without DeepSpeed; "
        "another number of processes can continue the training",
    )

    @model_validator(mode="after")
    def _check_one_sharding(self) -> "TrainingConfig":
        if self.fsdp2 and self.deepspeed is not None:
            raise ValueError("training.fsdp2 and training.deepspeed exclude each other: set one of them")
        return self

    def with_own(self, own: Mapping[str, Any]) -> "TrainingConfig":
        """These settings with a row's own in their place."""
        return TrainingConfig.model_validate({**self.model_dump(), **own})


class CurveConfig(StrictModel):
    """The learning curve: held-out text measured during training, on a part of the perplexity suite's documents."""

    per_domain: int = Field(5, ge=0, description="documents of each domain that are measured; 0: no curve")
    points: int = Field(8, gt=0, description="measurements during a training, the one before it not counted")


class Config(StrictModel):
    """A resolved experiment: everything that its numbers come from has a value."""

    experiment: str = Field(pattern=r"^\w[\w.-]*$", description="name of the experiment and of its runs' folder")
    title: str = Field(description="title of the tables")
    profile: str = Field(description="name of the chosen profile: models, corpus and settings")
    profiles: list[str] = Field(min_length=1, description="profiles in which the experiment can be run")
    banner: str | None = Field(None, description="warning printed above every table of the profile")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where models run; auto: CUDA if there is any")
    threads: int | None = Field(
        None, gt=0, description="CPU threads of each process. Default: as many as there are cores"
    )
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(
        min_length=1, description="seeds; every row that is random is made once for each"
    )
    data: DataConfig = Field(DataConfig(), description="where data lie on this machine")
    roles: RolesConfig = Field(description="the models by role")
    corpus: CorpusConfig = Field(description="training text")
    validation: CorpusConfig | None = Field(
        None, description="text by which methods choose their settings; neither trained on nor tested on"
    )
    passages: PassagesConfig = Field(PassagesConfig(), description="how documents are cut")
    extraction: ExtractionConfig = Field(ExtractionConfig(), description="what is stored of predictions")
    training: TrainingConfig = Field(TrainingConfig(), description="how the target is trained")
    suites: dict[str, Any] = Field(min_length=1, description="what is measured: suites by name, with their settings")
    curve: CurveConfig = Field(CurveConfig(), description="learning curve")
    methods: dict[str, dict[str, Any]] = Field(
        min_length=1, description="the rows of the table by label: `method: NAME` and the method's parameters"
    )
    reference: str = Field(description="label of the row that the others are compared with")

    def own_training(self, label: str) -> dict[str, list[Any]]:
        """The training settings that the row `label` has of its own, each with its value or those that are tuned."""
        given = self.methods[label].get("training")
        own = {key: value for key, value in given.items() if value is not None} if isinstance(given, Mapping) else {}
        return {key: value["tune"] if isinstance(value, Mapping) else [value] for key, value in own.items()}

    def global_batch_sizes(self) -> list[tuple[str | None, int]]:
        """The sequences in a step: of the experiment under None, and of each row that has numbers of its own."""
        own = [(label, self.own_training(label).get("global_batch_size", [])) for label in self.methods]
        return [(None, self.training.global_batch_size), *((label, size) for label, sizes in own for size in sizes)]

    def rows_of(self, name: str) -> list[str]:
        """Labels of the rows that are called `name` or are made by the method `name`."""
        return [label for label, entry in self.methods.items() if name in (label, entry["method"])]
