"""Configuration: YAML merged by OmegaConf, validated by pydantic, unknown keys refused.

Precedence: `--set` > user's file > profile > experiment > defaults. The resolved configuration says everything; it is
stored with every artifact and printed by `fusellm experiment show`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fusion.errors import UserError, did_you_mean
from harness.data.corpus import CorpusConfig
from harness.runtime.device import DType
from harness.store.paths import EXAMPLE_ROWS, PRESETS

ALL = "all"
OWN_ROWS = "tiny:"  # as data.root: rows that were written for the profile tiny
_SOURCE = "{source}"  # in a row's label and parameters: the row is there once for every source
_OWN = "own"  # the profile of a user's file that names none
_TAKEN = ("target", "teacher", "fused")  # what a source cannot be called: the other roles, and the audit's sum of all


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Role(Strict):
    """Who fills a role, and how it is run."""

    model: str = Field(description="catalogue name, hub id, local folder, .gguf file, or tiny:NAME")
    revision: str | None = None
    dtype: DType = Field("auto", description="computing precision of extraction and evaluation")
    batch_tokens: int = Field(2048, gt=0, description="padded tokens a batch (tokens)")
    trust_remote_code: bool = Field(False, description="run Python that lies in the model's folder")
    attn_implementation: str | None = None
    corpus: CorpusConfig | None = Field(
        None, description="the role is the model continued on this text; what is not said is as in `corpus`"
    )


class Roles(Strict):
    target: Role
    sources: dict[str, Role] = Field(min_length=1)
    teacher: Role | None = Field(None, description="a larger model of the target's family")

    def named(self) -> dict[str, Role]:
        """Every role by its name, the target first."""
        teacher = {"teacher": self.teacher} if self.teacher else {}
        return {"target": self.target, **self.sources, **teacher}


class PassagesConfig(Strict):
    max_bytes: int = Field(4096, ge=4, description="longest passage (bytes)")


class ExtractionConfig(Strict):
    k: int = Field(10, gt=0, description="entries kept a position (paper: 10)")
    passages_per_shard: int = Field(256, gt=0)
    store_dtype: Literal["float16", "float32"] = Field("float16", description="of stored log-probabilities and tails")
    temperatures: list[Annotated[float, Field(gt=0)]] = Field(
        [], description="beside 1: those at which distillation may take stored distributions"
    )
    compression: Literal["zstd", "none"] = Field("zstd", description="of what is stored; the numbers are the same")
    max_skipped_fraction: float = Field(
        0.001,
        ge=0,
        le=1,
        description="share of the passages that may be left out, as a model's logits are not finite; 1 passage at "
        "least may, unless it is 0",
    )


class DataConfig(Strict):
    root: str | None = Field(
        None, description="folder of <hub id>/<configuration>/<split>.parquet (or .jsonl); tiny: for a few own rows"
    )

    @property
    def folder(self) -> Path | None:
        """The folder itself; None where everything comes from the hub."""
        if self.root == OWN_ROWS:
            return EXAMPLE_ROWS
        return Path(self.root) if self.root else None


class TrainingConfig(Strict):
    """How a target is trained; the same for every trained method of an experiment."""

    sequence_length: int = Field(2048, gt=1, description="positions a row (tokens)")
    global_batch_size: int = Field(128, gt=0, description="rows an optimiser step, over all ranks")
    micro_batch_size: int = Field(1, gt=0, description="rows at once on a rank; does not change the result")
    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    weight_decay: float = Field(0.1, ge=0)
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    warmup_ratio: float = Field(0.008, ge=0, lt=1, description="share of the steps that warm up")
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    epochs: float = Field(1, gt=0, description="passes over the corpus")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 where it is native")
    gradient_checkpointing: bool = False
    save_every: int = Field(500, gt=0, description="steps between checkpoints")
    workers: int = Field(0, ge=0, description="data loader processes")
    deepspeed: str | None = Field(None, description="zero1, zero2, zero3 or a DeepSpeed JSON file; DDP without")


class CurveConfig(Strict):
    """Held-out text measured during training, on a part of the perplexity suite's documents."""

    per_domain: int = Field(5, ge=0, description="documents a domain; 0 for no curve")
    points: int = Field(8, gt=0, description="measurements along the training, the start not counted")


class Config(Strict):
    """A resolved experiment: nothing is left open."""

    experiment: str = Field(pattern=r"^\w[\w.-]*$", description="names the run's folder")
    title: str
    profile: str
    profiles: list[str] = Field(min_length=1, description="the profiles the experiment can run in")
    banner: str | None = Field(None, description="a warning printed above every table of the profile")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, gt=0, description="CPU threads of a process; as many as there are cores without")
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(min_length=1)
    data: DataConfig = DataConfig()
    roles: Roles
    corpus: CorpusConfig
    validation: CorpusConfig | None = Field(
        None, description="text that methods choose by: neither trained nor tested on"
    )
    passages: PassagesConfig = PassagesConfig()
    extraction: ExtractionConfig = ExtractionConfig()
    training: TrainingConfig = TrainingConfig()
    suites: dict[str, Any] = Field(min_length=1, description="what is measured: the suites and their configuration")
    curve: CurveConfig = CurveConfig()
    methods: dict[str, dict[str, Any]] = Field(min_length=1, description="a row of the table each")
    reference: str = Field(description="the row that the others are compared with")

    @model_validator(mode="after")
    def _methods_hold(self) -> "Config":
        from baselines.registry import get_method, schema_of

        # A suite that is set to null is left out.
        self.suites = {name: suite_section(name, given) for name, given in self.suites.items() if given is not None}
        if len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"seeds {self.seeds} names one twice: give each seed once.")
        for name in self.roles.sources:
            if name in _TAKEN:
                raise UserError(f"roles.sources has a source called {name!r}, which means something else: rename it.")
        for label, entry in self.methods.items():
            if not isinstance(entry.get("method"), str):
                raise UserError(f"methods.{label} does not say which method it is: add `method: NAME`.")
            method = get_method(entry["method"])
            parameters = method_parameters(label, entry, schema_of(method))
            # What a parameter was read from (a file) may change; the resolved configuration says what it held.
            self.methods[label] = {
                "method": entry["method"],
                **parameters.model_dump(mode="json", by_alias=True, exclude_unset=True),
            }
            self._check_roles(label, method.needs, parameters)
        if self.training.global_batch_size % self.training.micro_batch_size:
            raise UserError(
                f"training.global_batch_size = {self.training.global_batch_size} is no multiple of "
                f"training.micro_batch_size = {self.training.micro_batch_size}: change one of them."
            )
        if self.reference not in self.methods:
            hint = did_you_mean(self.reference, self.methods)
            raise UserError(f"reference {self.reference!r} is no row{hint}: rows are {', '.join(self.methods)}.")
        return self

    def _check_roles(self, label: str, needs: Sequence[str], parameters: BaseModel) -> None:
        """Raises UserError where a method names a role that is not there, or needs one."""
        from baselines.method import named_roles

        roles, named = list(self.roles.named()), named_roles(parameters)
        if "teacher" in needs and not hasattr(parameters, "teachers"):
            named.append("teacher")
        for name in named:
            if name == "teacher" and self.roles.teacher is None:
                raise UserError(f"methods.{label} needs a teacher, and there is none: say who it is in roles.teacher.")
            if name not in roles:
                raise UserError(
                    f"methods.{label} names {name!r}, which is no role{did_you_mean(name, roles)}: roles are "
                    f"{', '.join(roles)}."
                )


def method_parameters(label: str, entry: Mapping[str, Any], schema: type[BaseModel]) -> BaseModel:
    """The entry's parameters, validated by the method's own model. Raises UserError naming the key."""
    try:
        return schema.model_validate({k: v for k, v in entry.items() if k != "method"})
    except ValidationError as error:
        raise _sentence(error, schema, f"methods.{label}") from None


def suite_section(name: str, given: Any) -> BaseModel:
    """A suite's section, validated by the suite's own model. Raises UserError for an unknown suite or key."""
    from harness.evaluation.suite import suite

    schema = suite(name).schema
    try:
        return given if isinstance(given, schema) else schema.model_validate(given)
    except ValidationError as error:
        raise _sentence(error, schema, f"suites.{name}") from None


def rows_of(config: Config, name: str) -> list[str]:
    """The rows of the experiment that are called so or are of the method that is."""
    return [label for label, entry in config.methods.items() if name in (label, entry["method"])]


def names(kind: str) -> list[str]:
    """Experiments or profiles that ship with the harness."""
    return sorted(p.name.removesuffix(".yaml") for p in (PRESETS / kind).iterdir() if p.name.endswith(".yaml"))


def _shipped(kind: str, name: str) -> Any:
    from omegaconf import OmegaConf

    known = names(kind)
    if name not in known:
        raise UserError(
            f"There is no {kind.removesuffix('s')} {name!r}{did_you_mean(name, known)}: {kind} are {', '.join(known)}"
            f"{', or give a YAML file' if kind == 'experiments' else ''}."
        )
    return OmegaConf.create((PRESETS / kind / f"{name}.yaml").read_text(encoding="utf-8"))


def chosen(wanted: Sequence[str], profile: str | None) -> list[str]:
    """The experiments of a command line, each once; `all` stands for those with the profile that ship with the harness.

    Raises UserError for `all` without a profile, or with one that no experiment has.
    """
    found: list[str] = []
    for name in wanted:
        if name != ALL:
            found.append(name)
        elif profile is None:
            raise UserError("all means the experiments of one profile: add --profile NAME.")
        else:
            _shipped("profiles", profile)
            found += [one for one in names("experiments") if profile in _shipped("experiments", one).profiles]
    return list(dict.fromkeys(found))


def _user_file(path: Path) -> Any:
    from omegaconf import OmegaConf
    from yaml import MarkedYAMLError, YAMLError

    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"There is no file {path}: correct the path of the experiment.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: give an experiment's name or a YAML file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}: convert the file.") from None
    except MarkedYAMLError as error:
        at = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{at} is not valid YAML ({error.problem}): correct it.") from None
    except YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {str(error).splitlines()[0]}.") from None
    except OSError as error:  # for OmegaConf a single value is one, too
        if error.errno is not None:
            raise
        loaded = None
    if not loaded or not OmegaConf.is_dict(loaded):
        raise UserError(f"{path} does not hold keys and values: write an experiment in it (see `experiment show`).")
    return loaded


def _one_setting(item: str) -> Any:
    """A `--set KEY=VALUE` as a configuration of its own."""
    from omegaconf import OmegaConf

    key, equals, _ = item.partition("=")
    if not equals:
        raise UserError(f"--set {item} has no value: write --set KEY=VALUE.")
    if not all(key.strip().split(".")):
        raise UserError(f"--set {item} has no key: write --set KEY=VALUE, with dots between the parts of the key.")
    if key == "profile":
        raise UserError(f"--set {item} chooses no profile: write --profile.")
    return OmegaConf.from_dotlist([item])


def load(
    name: str,
    *,
    profile: str | None = None,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> Config:
    """The resolved configuration of an experiment's name or of a user's YAML file.

    A user's file may say `extends: NAME` to start from an experiment that ships with the harness, and `profile: NAME`;
    without either it stands alone. A source or a method that is set to null is left out.
    Raises UserError, in one sentence, for unknown names, keys and values.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    user: Any = OmegaConf.create({})
    if name.endswith((".yaml", ".yml")):
        user = _user_file(Path(name))
        extends = user.pop("extends", None)
        experiment = _shipped("experiments", str(extends)) if extends else OmegaConf.create({})
        user.setdefault("experiment", Path(name).stem)
    else:
        experiment = _shipped("experiments", name)
        experiment.experiment = name
    place = f"The configuration of {name}"
    try:
        chosen = profile or user.get("profile") or experiment.get("profiles", [_OWN])[0]
        per_profile = experiment.pop("per_profile", {})
        layers = [OmegaConf.create((PRESETS / "defaults.yaml").read_text(encoding="utf-8")), experiment]
        if chosen != _OWN:
            layers.append(_shipped("profiles", str(chosen)))
        layers.append(per_profile.get(str(chosen), {}))
        merged = OmegaConf.merge(*layers, user)
        for item in overrides:
            place = f"--set {item}"
            merged = OmegaConf.merge(merged, _one_setting(item))
        place = f"The configuration of {name}"
        merged.profile = chosen
        if seeds:
            merged.seeds = list(seeds)
        raw: Any = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"{place} does not hold: {str(error).splitlines()[0]}.") from None
    except TypeError:  # what OmegaConf raises for these two
        raise UserError(f"{place} has a list where keys and values belong, or the other way round.") from None
    raw.pop("protocols", None)  # what experiments took from it is in their suites
    if not isinstance(raw.setdefault("profiles", [raw["profile"]]), list):
        raise UserError(f"The configuration of {name} has profiles = {raw['profiles']!r}, which must be a list.")
    if raw["profile"] not in raw["profiles"]:
        raise UserError(
            f"The experiment {name} has no profile {raw['profile']!r}: its profiles are {', '.join(raw['profiles'])}."
        )
    for place in ("roles", "roles.sources", "roles.target", "roles.teacher", "methods"):
        _check_mapping(raw, place, name)
    if sources := (raw.get("roles") or {}).get("sources"):
        raw["roles"]["sources"] = {name: role for name, role in sources.items() if role is not None}
    _complete_corpora(raw)
    raw["methods"] = _expanded(raw.get("methods") or {}, raw.get("roles") or {})
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise _sentence(error, Config, name) from None


def _complete_corpora(raw: dict[str, Any]) -> None:
    """What a role's text is not said to differ in is as in the experiment's own corpus."""
    roles = raw.get("roles") or {}
    for role in [roles.get("target"), *(roles.get("sources") or {}).values(), roles.get("teacher")]:
        if isinstance((role or {}).get("corpus"), dict):
            role["corpus"] = {**(raw.get("corpus") or {}), **role["corpus"]}


def _check_mapping(raw: Mapping[str, Any], place: str, where: str) -> None:
    """Raises UserError where `place` (a dotted path) holds something else than keys and values."""
    value: Any = raw
    for part in place.split("."):
        value = (value or {}).get(part)
    values = [value, *value.values()] if isinstance(value, dict) and place in ("methods", "roles.sources") else [value]
    if any(v is not None and not isinstance(v, dict) for v in values):
        raise UserError(f"The configuration of {where} has {place} = {value!r}, which must hold keys and values.")


def _expanded(methods: Mapping[str, Any], roles: Mapping[str, Any]) -> dict[str, Any]:
    """The rows with `{target}`, `{teacher}`, `{sources}`, `{source}` written out by name, less those set to null."""
    rows: dict[str, Any] = {}
    sources = list(roles.get("sources") or {})
    for label, entry in methods.items():
        if entry is None or (label == "{teacher}" and not roles.get("teacher")):
            continue
        if label in ("{target}", "{teacher}"):
            role = label.strip("{}")
            model = str((roles.get(role) or {}).get("model", role))
            found = {_short(model): {**entry, "role": role}}
        elif label == "{sources}":
            found = {source: {**entry, "role": source} for source in sources}
        elif _SOURCE in str(label):
            found = {label.replace(_SOURCE, source): _with_source(entry, source) for source in sources}
        else:
            found = {str(label): dict(entry)}
        if taken := sorted(rows.keys() & found.keys()):
            raise UserError(f"Two rows of the table would be called {taken[0]!r}: rename the source or the method.")
        rows |= found
    return rows


def _with_source(value: Any, source: str) -> Any:
    if isinstance(value, dict):
        return {key: _with_source(one, source) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_source(one, source) for one in value]
    return value.replace(_SOURCE, source) if isinstance(value, str) else value


def _short(model: str) -> str:
    return model.removeprefix("tiny:").rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")


def _sentence(error: ValidationError, schema: type[BaseModel], where: str) -> UserError:
    """Pydantic's first complaint in one sentence, with the nearest spelling of an unknown key."""
    first = error.errors()[0]
    if isinstance(own := first.get("ctx", {}).get("error"), UserError):
        return own if schema is Config else UserError(f"{where}: {own}")
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        owner: Any = schema
        for part in first["loc"][:-1]:
            annotation = owner.model_fields[part].annotation if part in getattr(owner, "model_fields", {}) else None
            owner = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
        known = [f.alias or n for n, f in owner.model_fields.items()] if owner else []
        hint = did_you_mean(first["loc"][-1], known)
        return UserError(f"The configuration of {where} has an unknown key {place}{hint}: correct or remove it.")
    if first["type"] == "missing":
        return UserError(f"The configuration of {where} lacks {place}: add it.")
    return UserError(f"The configuration of {where} has {place} = {first['input']!r}, which is wrong: {first['msg']}.")
