"""Weight merging by mergekit: one model out of the weights of several with one architecture and one tokenizer.

Every merge is described by a mergekit configuration, whether the user names an algorithm or gives such a configuration.
mergekit takes seconds to import, so that happens where it is used.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from baselines.merge_checks import check_mergeable, check_plan
from baselines.merge_configuration import (
    changes_layers,
    check_configuration,
    define_gpt_neox,
    donor_of,
    first_line,
    makes_tokenizer,
    models_of,
    read_configuration,
    rename_models,
    with_folders,
)
from baselines.merge_methods import MergeStep, register_sce, varm_configuration
from baselines.method import Candidate, Context, Reference, RoleOrRow
from baselines.registry import method
from fusion.errors import UserError
from fusion.modeling.loading import check_loading

VERSION = 2
MODEL_FOLDER = "model"
SEARCH_FILE = "search.json"
_SPREAD = 1.5  # distance of the first simplex' corners from equal weights, in nats
_RANDOM = ("dare", "della")  # a merge method whose name begins with one of these drops differences at random
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_COPIED = (*_TOKENIZER_FILES, "generation_config.json", "chat_template.jinja")


class MergeParameters(MergeStep):
    """A method with the models it merges, or a mergekit configuration in place of all other parameters."""

    models: list[RoleOrRow] | None = Field(
        None, min_length=1, description="roles or rows that are merged; null: all sources"
    )
    base: RoleOrRow = Field(
        "target", description="role or row whose weights the others change, of methods that merge changes"
    )
    mergekit: dict[str, Any] | None = Field(
        None, description="a mergekit configuration or its YAML file, taken as it is; models by role, row or name"
    )

    @field_validator("mergekit", mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        return read_configuration(Path(given)) if isinstance(given, str) else given

    @model_validator(mode="after")
    def _check(self) -> "MergeParameters":
        if isinstance(self.weights, list) and self.models and len(self.weights) != len(self.models):
            raise UserError(f"weights has {len(self.weights)} numbers for {len(self.models)} models: give one each.")
        if self.models and len(set(self.models)) < len(self.models):
            raise UserError(f"models {self.models} names one twice: give each model once.")
        others = [
            field.alias or name
            for name, field in type(self).model_fields.items()
            if name != "mergekit" and getattr(self, name) != field.default
        ]
        if self.mergekit is not None and others:
            raise UserError(f"a mergekit configuration says everything by itself: remove {', '.join(sorted(others))}.")
        return self

    def references(self) -> list[tuple[str, Reference]]:
        """With the models of a mergekit configuration, which may be any."""
        models = models_of(self.mergekit or {})
        return [*super().references(), *((name, Reference(("role", "row", "model"))) for name in models)]


@method(
    "merge",
    needs=("same tokenizer", "same architecture"),
    reference="mergekit, arXiv 2403.13257; the paper's table 7 (arXiv 2401.10491)",
    version=VERSION,
)
def merge(context: Context, parameters: MergeParameters) -> Candidate:
    """One model out of the weights of several; nothing is trained."""
    if parameters.mergekit is not None:
        check_configuration(parameters.mergekit, context.label)
        return _merge_once(context, parameters.mergekit, context.candidate)
    models = parameters.models or list(context.sources)
    return merge_models(context, parameters, models, parameters.base, context.candidate)


def merge_models(
    context: Context, step: MergeStep, models: Sequence[str], base: str, find: Callable[[str], Candidate]
) -> Candidate:
    """The merge of the candidates `find(name)` of `models`, as changes of `base` where the method merges changes.

    Raises UserError where the models do not go together, or with the method.
    """
    weights = step.check_models(models, context.label)
    if step.weights == "tuned":
        return _merge_tuned(context, step, models, base, find)
    configuration = step.configuration(models, weights, base)
    if step.merge_method == "varm":
        return _merge_varm(context, step, configuration, base, find)
    return _merge_once(context, configuration, find)


def _merge_once(context: Context, configuration: Mapping[str, Any], find: Callable[[str], Candidate]) -> Candidate:
    members = _Members.of(context, configuration, find)

    def build(folder: Path) -> None:
        members.merge(context, configuration, folder / MODEL_FOLDER)

    artifact = context.make(
        "merge", build, version=VERSION, inputs=members.inputs, params=members.params(configuration)
    )
    reshaped = changes_layers(configuration) or makes_tokenizer(configuration)
    return members.merged(artifact.folder / MODEL_FOLDER, artifact.fingerprint, reshaped=reshaped)


def _merge_varm(
    context: Context, step: MergeStep, linear: Mapping[str, Any], base: str, find: Callable[[str], Candidate]
) -> Candidate:
    """The merge by VaRM, whose weights are known when its models are."""
    members, origin, parameters = _Members.of(context, linear, find), find(base), step.varm()
    shapes = {name: one.known_shape for name, one in {**members.candidates, base: origin}.items()}
    check_mergeable({name: shape for name, shape in shapes.items() if shape is not None}, context.label)

    def build(folder: Path) -> None:
        folders = {name: candidate.folder for name, candidate in members.candidates.items()}
        configuration = varm_configuration(parameters, folders, origin.folder, linear)
        members.merge(context, configuration, folder / MODEL_FOLDER)

    artifact = context.make(
        "merge",
        build,
        version=VERSION,
        inputs={**members.inputs, "base": origin.fingerprint},
        params={**members.params(linear), "varm": parameters.model_dump()},
    )
    merged = members.merged(artifact.folder / MODEL_FOLDER, artifact.fingerprint, reshaped=False)
    return replace(merged, seeded=merged.seeded or origin.seeded)


def _merge_tuned(
    context: Context, step: MergeStep, models: Sequence[str], base: str, find: Callable[[str], Candidate]
) -> Candidate:
    """The merge whose weights give the lowest loss on validation text, of at most `trials` that are tried."""
    if len(models) < 2:
        raise UserError(f"{context.label} tunes the shares of several models, and merges {models[0]} alone: name more.")
    uniform = step.configuration(models, [1.0] * len(models), base)
    members = _Members.of(context, uniform, find)

    def build(folder: Path) -> dict[str, str]:
        def evaluate(shares: Sequence[float], number: int) -> float:
            trial, configuration = folder / "trial", step.configuration(models, shares, base)
            members.merge(context, configuration, trial)
            candidate = Candidate(trial, members.fingerprint(configuration), seeded=members.seeded)
            nll = context.validation_nll(candidate, f"{context.label}, trial {number} of {step.trials}")
            shutil.rmtree(trial)
            return nll

        tried = search_shares(evaluate, len(models), step.trials, folder / SEARCH_FILE)
        nll, best = min((nll, shares) for shares, nll in tried)
        members.merge(context, step.configuration(models, best, base), folder / MODEL_FOLDER)
        weights = ", ".join(f"{model} {share:.3f}" for model, share in zip(models, best, strict=True))
        seed = f" (seed {context.seed})" if members.seeded else ""
        return {
            "note": f"{context.label}{seed}: the best of {len(tried)} merges tried on validation text, with the "
            f"weights {weights} ({nll:.4f} nats per byte there; {tried[0][1]:.4f} with equal ones)."
        }

    artifact = context.make(
        "merge",
        build,
        version=VERSION,
        inputs={**members.inputs, "validation": context.validation_fingerprint},
        params={**members.params(uniform), "search": {"trials": step.trials}},
        validations=step.trials,
    )
    return members.merged(artifact.folder / MODEL_FOLDER, artifact.fingerprint, reshaped=False)


class _Members:
    """The models that a mergekit configuration names."""

    def __init__(self, candidates: Mapping[str, Candidate], seed: int | None) -> None:
        """seed: None when the merge draws nothing at random."""
        self.candidates = candidates
        self.seed = seed

    @classmethod
    def of(cls, context: Context, configuration: Mapping[str, Any], find: Callable[[str], Candidate]) -> "_Members":
        """Raises UserError when the models cannot be merged; a plan compares what is known of them."""
        candidates = {name: find(name) for name in models_of(configuration)}
        random = str(configuration["merge_method"]).startswith(_RANDOM)
        shapes = {name: shape for name, candidate in candidates.items() if (shape := candidate.known_shape) is not None}
        check_mergeable(
            shapes,
            context.label,
            sliced=changes_layers(configuration),
            tokenizers=not makes_tokenizer(configuration),
        )
        check_plan(configuration, {name: shapes.get(name, {}) for name in candidates}, context.label)
        return cls(candidates, context.seed if random else None)

    @property
    def seeded(self) -> bool:
        """True if the merge draws at random or one of its models depends on the seed."""
        return self.seed is not None or any(candidate.seeded for candidate in self.candidates.values())

    def merged(self, folder: Path, fingerprint: str, *, reshaped: bool) -> Candidate:
        """The candidate of a merge, which has the shape of its models unless it is `reshaped`."""
        shape = None if reshaped else next(iter(self.candidates.values())).known_shape
        return Candidate(folder, fingerprint, seeded=self.seeded, shape=shape)

    @property
    def inputs(self) -> dict[str, str]:
        """The fingerprints of the models, as inputs of the merge's artifact."""
        return {f"model {i}": candidate.fingerprint for i, candidate in enumerate(self.candidates.values())}

    def params(self, configuration: Mapping[str, Any]) -> dict[str, Any]:
        """All that determines the merged weights; models by fingerprint, since their names and places do not matter."""
        by_fingerprint = rename_models(configuration, lambda name: self.candidates[name].fingerprint)
        return {"configuration": by_fingerprint, "seed": self.seed}

    def fingerprint(self, configuration: Mapping[str, Any]) -> str:
        """SHA-256 (hexadecimal) of `params` and the version of the code that merges: the key of what a trial scores."""
        identity = {"version": VERSION, **self.params(configuration)}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def merge(self, context: Context, configuration: Mapping[str, Any], out: Path) -> None:
        """Writes the merged checkpoint to `out`, whose previous content is removed."""
        folders = {name: candidate.folder for name, candidate in self.candidates.items()}
        shutil.rmtree(out, ignore_errors=True)
        size = sum(file.stat().st_size for folder in folders.values() for file in folder.glob("*.safetensors"))
        with context.progress(f"merge {context.label}", size, "bytes") as advance:
            run_mergekit(configuration, folders, out, seed=self.seed or 0)
            advance(size)


def run_mergekit(configuration: Mapping[str, Any], folders: Mapping[str, Path], out: Path, *, seed: int = 0) -> None:
    """Runs a mergekit configuration whose models are names of `folders`; writes a complete checkpoint to `out`.

    seed: of what a method drops at random. Raises UserError when mergekit refuses the configuration, and when loading
    the merged model reports a missing or superfluous weight.
    """
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    define_gpt_neox()
    register_sce()
    renamed = with_folders(configuration, folders)
    LoaderCache().loaders.clear()  # it caches by path, and that folder may hold another model by now
    try:
        run_merge(
            MergeConfiguration.model_validate(renamed),
            str(out),
            MergeOptions(copy_tokenizer=False, random_seed=seed, quiet=True, write_model_card=False),
        )
    except (OSError, MemoryError):
        raise
    except Exception as error:  # it raises RuntimeError, ValueError, KeyError and pydantic's own
        raise UserError(f"mergekit cannot merge {', '.join(folders)}: {first_line(error)}.") from error
    finally:
        LoaderCache().loaders.clear()
    donor = folders[donor_of(configuration)]
    for name in _COPIED[len(_TOKENIZER_FILES) :] if makes_tokenizer(configuration) else _COPIED:
        if (donor / name).is_file() and not (out / name).exists():
            shutil.copyfile(donor / name, out / name)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        out,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        generation_config=GenerationConfig(),  # the donor's may be one that is refused
    )
    model, info = loaded
    check_loading(info, model, str(out), "mergekit cannot merge models of this architecture")
    if broken := next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None):
        raise UserError(
            f"mergekit merged {', '.join(folders)} to weights that are not finite (first {broken}): change the weights "
            "of the models, and look for one whose own weights are not finite."
        )


def search_shares(
    evaluate: Callable[[Sequence[float], int], float], n: int, trials: int, log: Path
) -> list[tuple[list[float], float]]:
    """At most `trials` vectors of `n` shares (they sum to 1) with their losses, in the order tried; equal ones first.

    Minimises `evaluate(shares, number of the trial)` by the Nelder-Mead simplex over the logarithms of the shares'
    ratios. `log` is a JSON file of the trials so far; an interrupted search resumes from it.
    """
    import numpy as np
    from scipy.optimize import minimize
    from scipy.special import softmax

    tried: list[tuple[list[float], float]] = []
    known: list[Any] = []
    with contextlib.suppress(FileNotFoundError, ValueError):  # damaged, it is made again
        known = json.loads(log.read_text(encoding="utf-8"))

    def objective(ratios: Any) -> float:
        shares = [float(share) for share in softmax(np.append(0.0, ratios))]
        before = known[len(tried)] if len(tried) < len(known) else None
        nll = before[1] if before and before[0] == shares else evaluate(shares, len(tried) + 1)
        tried.append((shares, nll))
        beside = log.with_name(f".{log.name}")
        with beside.open("w", encoding="utf-8") as file:
            file.write(json.dumps(tried, indent=1))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(log)
        return nll

    start = np.vstack([np.zeros(n - 1), _SPREAD * np.eye(n - 1)])
    options = {"maxfev": trials, "initial_simplex": start, "xatol": 0.01, "fatol": 1e-5}
    minimize(objective, np.zeros(n - 1), method="Nelder-Mead", options=options)
    return tried
