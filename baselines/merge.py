"""Weight merging by mergekit: one model out of the weights of several with one architecture and one tokenizer.

A merge is described as mergekit describes it, whether it was asked for by the name of an algorithm or by a mergekit
configuration. mergekit takes seconds to import, so that happens where it is used.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from baselines.method import METHODS, Candidate, Context, Need, Parameters, Role
from fusion.errors import UserError, did_you_mean
from fusion.modeling.loading import check_loading

VERSION = 1
MODEL_FOLDER = "model"
SEARCH_FILE = "search.json"
_SPREAD = 1.5  # how far from equal the first tried weights are, in nats
_TASK_VECTORS = ("task_arithmetic", "ties", "dare_ties")
_DRAWN = ("dare", "della")  # what drops differences at random begins with one of these
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_BESIDE = (*_TOKENIZER_FILES, "generation_config.json", "chat_template.jinja")
# What a configuration says about itself, its library, its precision or its special tokens, and not about its weights.
_NOT_COMPARED = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_range",
    "max_position_embeddings", "pad_token_id", "transformers_version", "use_cache",
}  # fmt: skip
_FIRST = ("model_type", "hidden_size", "vocab_size")
_PER_LAYER = {"num_hidden_layers", "layer_types"}  # what a mergekit configuration with slices may change


class MergeParameters(Parameters):
    """An algorithm with the models it merges, or a mergekit configuration instead of all that."""

    merge_method: Literal["linear", "slerp", "task_arithmetic", "ties", "dare_ties"] = Field(
        "linear", description="linear, slerp (of two models), task_arithmetic, ties or dare_ties"
    )
    models: list[Role] | None = Field(None, min_length=2, description="the roles that are merged; all sources without")
    base: Role = Field("target", description="task_arithmetic, ties, dare_ties: role whose weights the others change")
    weights: Literal["uniform", "tuned"] | list[float] = Field(
        "uniform", description="uniform; one number a model, of which the shares count; or tuned on validation text"
    )
    scale: float = Field(1.0, description="task_arithmetic, ties, dare_ties: factor of the merged change")
    density: float = Field(0.5, gt=0, le=1, description="ties, dare_ties: share of each change that is kept")
    trials: int = Field(12, gt=0, description="tuned: merges that are tried")
    mergekit: dict[str, Any] | None = Field(
        None, description="a mergekit configuration or its YAML file, taken as it is; models by role or by name"
    )

    @field_validator("mergekit", mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        return _read_yaml(Path(given)) if isinstance(given, str) else given

    @model_validator(mode="after")
    def _weights_hold(self) -> "MergeParameters":
        if isinstance(self.weights, list) and not sum(self.weights) > 0:
            raise UserError(f"weights {self.weights} do not sum to a positive number: raise one of them.")
        if isinstance(self.weights, list) and self.models and len(self.weights) != len(self.models):
            raise UserError(f"weights has {len(self.weights)} numbers for {len(self.models)} models: give one each.")
        if self.models and len(set(self.models)) < len(self.models):
            raise UserError(f"models {self.models} names one twice: give each model once.")
        if others := sorted(self.model_fields_set - {"mergekit"}) if self.mergekit is not None else []:
            raise UserError(f"a mergekit configuration says everything by itself: remove {', '.join(others)}.")
        return self

    def configuration(self, models: Sequence[str], weights: Sequence[float]) -> dict[str, Any]:
        """The merge of `models` with `weights` (as shares of their sum), as mergekit describes it."""
        shares = [weight / sum(weights) for weight in weights]
        found: dict[str, Any] = {"merge_method": self.merge_method, "dtype": "float32"}
        if self.merge_method == "slerp":
            first, second = models
            return {
                **found,
                "base_model": first,
                "models": [{"model": first}, {"model": second}],
                "parameters": {"t": shares[1]},
            }
        density = {} if self.merge_method in ("linear", "task_arithmetic") else {"density": self.density}
        found["models"] = [
            {"model": model, "parameters": {"weight": share, **density}}
            for model, share in zip(models, shares, strict=True)
        ]
        if self.merge_method in _TASK_VECTORS:
            found |= {"base_model": self.base, "parameters": {"lambda": self.scale}}
        return found


@METHODS.register("merge", reference="mergekit, arXiv 2403.13257; the paper's table 7 (arXiv 2401.10491)")
class Merge:
    """One model out of the weights of several; nothing is trained."""

    schema: ClassVar[type[Parameters]] = MergeParameters
    needs: ClassVar[Sequence[Need]] = ("same tokenizer", "same architecture")

    def __init__(self, parameters: MergeParameters) -> None:
        self.parameters = parameters

    def build(self, context: Context) -> Candidate:
        parameters = self.parameters
        if parameters.mergekit is not None:
            check_configuration(parameters.mergekit, context.label)
            return self._merged(context, parameters.mergekit)
        models = parameters.models or list(context.sources)
        if len(models) < 2 or (parameters.merge_method == "slerp" and len(models) != 2):
            number = "two models" if parameters.merge_method == "slerp" else "at least two models"
            raise UserError(
                f"{context.label} merges {number} with {parameters.merge_method} and not {len(models)} "
                f"({', '.join(models)}): say which in its `models`."
            )
        if parameters.weights == "tuned":
            return self._tuned(context, models)
        weights = [1.0] * len(models) if parameters.weights == "uniform" else list(parameters.weights)
        if len(weights) != len(models):
            raise UserError(
                f"{context.label} has {len(weights)} weights for {len(models)} models ({', '.join(models)}): give one "
                "each."
            )
        return self._merged(context, parameters.configuration(models, weights))

    def _merged(self, context: Context, configuration: Mapping[str, Any]) -> Candidate:
        members = _Members.of(context, configuration)

        def build(folder: Path) -> None:
            members.merge(context, configuration, folder / MODEL_FOLDER)

        made = context.make(
            "merge", build, version=VERSION, inputs=members.inputs, params=members.params(configuration)
        )
        return Candidate(made.folder / MODEL_FOLDER, made.fingerprint, seeded=members.seed is not None)

    def _tuned(self, context: Context, models: Sequence[str]) -> Candidate:
        parameters = self.parameters
        uniform = parameters.configuration(models, [1.0] * len(models))
        members = _Members.of(context, uniform)
        search = {"trials": parameters.trials}

        def build(folder: Path) -> dict[str, str]:
            def score(shares: Sequence[float], number: int) -> float:
                trial, configuration = folder / "trial", parameters.configuration(models, shares)
                members.merge(context, configuration, trial)
                candidate = Candidate(trial, members.fingerprint(configuration), seeded=members.seed is not None)
                found = context.score(candidate, f"{context.label}, trial {number} of {parameters.trials}")
                shutil.rmtree(trial)
                return found

            tried = search_shares(score, len(models), parameters.trials, folder / SEARCH_FILE)
            nats, best = min((nats, shares) for shares, nats in tried)
            members.merge(context, parameters.configuration(models, best), folder / MODEL_FOLDER)
            found = ", ".join(f"{model} {share:.3f}" for model, share in zip(models, best, strict=True))
            return {
                "note": f"{context.label}: the best of {len(tried)} merges tried on validation text, with the weights "
                f"{found} ({nats:.4f} nats per byte there; {tried[0][1]:.4f} with equal ones)."
            }

        made = context.make(
            "merge",
            build,
            version=VERSION,
            inputs={**members.inputs, "held_out": context.held_out},
            params={**members.params(uniform), "search": search},
            scores=parameters.trials,
        )
        return Candidate(made.folder / MODEL_FOLDER, made.fingerprint, seeded=members.seed is not None)


class _Members:
    """The models that a mergekit configuration names."""

    def __init__(self, candidates: Mapping[str, Candidate], seed: int | None) -> None:
        self.candidates = candidates
        self.seed = seed
        """None where no difference is dropped at random."""

    @classmethod
    def of(cls, context: Context, configuration: Mapping[str, Any]) -> "_Members":
        candidates = {name: context.model(name) for name in dict.fromkeys(_names(configuration))}
        drawn = str(configuration["merge_method"]).startswith(_DRAWN)
        sliced = "slices" in configuration or "modules" in configuration
        here = {name: one.folder for name, one in candidates.items() if one.folder.exists()}  # the others in a plan
        check_mergeable(here, context.label, sliced=sliced, tokenizers="tokenizer" not in " ".join(configuration))
        return cls(candidates, context.seed if drawn else None)

    @property
    def inputs(self) -> dict[str, str]:
        return {f"model {i}": one.fingerprint for i, one in enumerate(self.candidates.values())}

    def params(self, configuration: Mapping[str, Any]) -> dict[str, Any]:
        """What decides about the merge; models by fingerprint, since their names and places do not matter."""
        by_fingerprint = _renamed(configuration, lambda name: self.candidates[name].fingerprint)
        return {"configuration": by_fingerprint, "seed": self.seed}

    def fingerprint(self, configuration: Mapping[str, Any]) -> str:
        return hashlib.sha256(json.dumps(self.params(configuration), sort_keys=True).encode()).hexdigest()

    def merge(self, context: Context, configuration: Mapping[str, Any], out: Path) -> None:
        """Merges into `out`, which is then a whole checkpoint."""
        folders = {name: one.folder for name, one in self.candidates.items()}
        shutil.rmtree(out, ignore_errors=True)
        size = sum(file.stat().st_size for folder in folders.values() for file in folder.glob("*.safetensors"))
        with context.progress(f"merge {context.label}", size, "bytes") as advance:
            merge(configuration, folders, out, seed=self.seed or 0)
            advance(size)


def merge(configuration: Mapping[str, Any], folders: Mapping[str, Path], out: Path, *, seed: int = 0) -> None:
    """Runs a mergekit configuration whose models are names of `folders`; leaves a whole checkpoint in `out`.

    Raises UserError where mergekit refuses, and where loading the merged model reports a missing or superfluous weight.
    """
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    _define_gpt_neox()
    given = _renamed(configuration, lambda name: {"model": {"path": str(folders[name])}})
    LoaderCache().loaders.clear()  # it knows folders by path, and what lies there may be another model by now
    try:
        run_merge(
            MergeConfiguration.model_validate(given),
            str(out),
            MergeOptions(copy_tokenizer=False, random_seed=seed, quiet=True, write_model_card=False),
        )
    except (OSError, MemoryError):
        raise
    except Exception as error:  # it raises RuntimeError, ValueError, KeyError and pydantic's own
        raise UserError(f"mergekit cannot merge {', '.join(folders)}: {_first_line(error)}.") from error
    finally:
        LoaderCache().loaders.clear()
    donor = folders[str(configuration.get("base_model") or next(_names(configuration)))]
    for name in _BESIDE:
        if (donor / name).is_file() and not (out / name).exists():
            shutil.copyfile(donor / name, out / name)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        out, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    model, info = loaded
    check_loading(info, model, str(out), "mergekit cannot merge models of this architecture")


def _define_gpt_neox() -> None:
    """Has mergekit ask a GPT-NeoX checkpoint for its weights only.

    Its own definition also wants the masks and frequencies that such checkpoints once held; without a definition it
    would leave the language model's head out.
    """
    from importlib.resources import files

    from mergekit.architecture.json_definitions import NAME_TO_ARCH, _load_architecture_json

    definition = json.loads((files("mergekit._data.architectures") / "gpt-neox.json").read_text(encoding="utf-8"))
    layer = definition["layer_templates"]
    computed = (".attention.bias", ".attention.masked_bias", ".inv_freq")
    layer["weights"] = [weight for weight in layer["weights"] if not weight["name"].endswith(computed)]
    for name in definition["architectures"]:
        NAME_TO_ARCH[name] = [_load_architecture_json(json.dumps(definition))]


def search_shares(
    score: Callable[[Sequence[float], int], float], n: int, trials: int, log: Path
) -> list[tuple[list[float], float]]:
    """At most `trials` shares of `n` models (they sum to 1) with their scores, in the order tried; equal ones first.

    Nelder and Mead's simplex over the logarithms of the shares' ratios, to low scores. `log` keeps what was scored, and
    a second start takes it from there.
    """
    import numpy as np
    from scipy.optimize import minimize
    from scipy.special import softmax

    tried: list[tuple[list[float], float]] = []
    known = json.loads(log.read_text(encoding="utf-8")) if log.exists() else []

    def objective(ratios: Any) -> float:
        shares = [float(share) for share in softmax(np.append(0.0, ratios))]
        before = known[len(tried)] if len(tried) < len(known) else None
        nats = before[1] if before and before[0] == shares else score(shares, len(tried) + 1)
        tried.append((shares, nats))
        beside = log.with_name(f".{log.name}")
        beside.write_text(json.dumps(tried, indent=1), encoding="utf-8")
        beside.replace(log)
        return nats

    start = np.vstack([np.zeros(n - 1), _SPREAD * np.eye(n - 1)])
    options = {"maxfev": trials, "initial_simplex": start, "xatol": 0.01, "fatol": 1e-5}
    minimize(objective, np.zeros(n - 1), method="Nelder-Mead", options=options)
    return tried


def check_configuration(configuration: Mapping[str, Any], label: str) -> None:
    """Raises UserError for what mergekit would not take: an unknown method, a key of another type, no models."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge_methods.registry import registered_methods

    try:
        MergeConfiguration.model_validate(configuration)
    except Exception as error:  # pydantic's, or RuntimeError
        raise UserError(f"{label}: mergekit does not take its configuration: {_first_line(error)}.") from None
    known = [method.spec.name for method in registered_methods()]
    if configuration["merge_method"] not in known:
        hint = did_you_mean(configuration["merge_method"], known)
        raise UserError(
            f"{label}: mergekit has no merge_method {configuration['merge_method']!r}{hint}: it has {', '.join(known)}."
        )


def check_mergeable(folders: Mapping[str, Path], label: str, *, sliced: bool = False, tokenizers: bool = True) -> None:
    """Raises UserError, saying what differs, unless all checkpoints have one architecture, its sizes and a tokenizer.

    Reads configurations and tokenizers, no weights. `sliced`: the number of layers may differ.
    """
    from transformers import AutoConfig

    (first, *others) = folders or [""]
    skipped = _NOT_COMPARED | (_PER_LAYER if sliced else set())

    def configured(name: str) -> dict[str, Any]:
        found = AutoConfig.from_pretrained(folders[name], local_files_only=True).get_text_config().to_dict()
        return {key: value for key, value in found.items() if key not in skipped}

    for name in others:
        one, other = configured(first), configured(name)
        # What follows from the size comes after it.
        for key in [*_FIRST, *sorted((one.keys() | other.keys()) - set(_FIRST))]:
            if one.get(key) != other.get(key):
                raise UserError(
                    f"{label} cannot merge {first} and {name}, which differ in {key} ({one.get(key)} and "
                    f"{other.get(key)}): choose models of one architecture and size."
                )
        if tokenizers and (difference := _tokenizers_differ(folders[first], folders[name])):
            raise UserError(
                f"{label} cannot merge {first} and {name}, whose tokenizers differ ({difference}): choose models with "
                "one tokenizer."
            )


def _tokenizers_differ(one: Path, other: Path) -> str:
    """What two tokenizers differ in, in words; empty where they read every text alike."""
    from tokenizers import Tokenizer

    # As the library writes them, since older ones wrote the same otherwise.
    left, right = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (one, other))
    if differing := left.get_vocab().items() ^ right.get_vocab().items():
        token, number = min(differing, key=lambda pair: (pair[1], pair[0]))
        return f"first in token {number}, {token!r}"
    # As the library writes them, since older ones wrote the same otherwise.
    mine, theirs = json.loads(left.to_str()), json.loads(right.to_str())
    for part in ("normalizer", "pre_tokenizer", "model"):
        if mine[part] != theirs[part]:
            return f"in their {part}"
    return ""


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the mergekit configuration {path} cannot be read ({error.strerror}): correct it.") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"the mergekit configuration {path} is not valid YAML ({_first_line(error)}).") from None
    if not isinstance(found, dict):
        raise UserError(f"the mergekit configuration {path} does not hold keys and values: correct it.")
    return found


def _is_model(key: str, value: Any) -> bool:
    """Whether an entry of a mergekit configuration names a model."""
    named = key in ("model", "base_model") or (key in ("tokenizer_source", "source") and value not in ("union", "base"))
    return named and isinstance(value, str)


def _renamed(configuration: Any, name: Callable[[str], Any]) -> Any:
    """The configuration with every model called otherwise."""
    if isinstance(configuration, Mapping):
        return {k: name(v) if _is_model(k, v) else _renamed(v, name) for k, v in configuration.items()}
    if isinstance(configuration, list):
        return [_renamed(one, name) for one in configuration]
    return configuration


def _names(configuration: Any) -> Iterator[str]:
    """The models that a mergekit configuration names, in its order."""
    found: list[str] = []
    _renamed(configuration, found.append)
    yield from found


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # Pydantic says in its second line where something is wrong and in its third line what.
    return " ".join(line.strip() for line in lines[1:3] if lines[0].endswith("MergeConfiguration")) or lines[0].rstrip(
        "."
    )
