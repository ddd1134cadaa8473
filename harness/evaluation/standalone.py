"""Measuring one model on suites, outside of any experiment (`fusellm eval`)."""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from harness.evaluation.evaluated_model import EvaluatedModel
from harness.evaluation.records import note_suites, write_records
from harness.evaluation.suite import SUITES, Suite, suite_config, suite_parameters
from harness.models.resolution import ModelSpec, count_parameters, resolve
from harness.runtime import distributed
from harness.runtime.device import compute_dtype
from harness.runtime.environment import ignore_overrides
from harness.runtime.progress import notify
from harness.store.artifacts import Store
from harness.store.costs import Costs
from harness.store.files import write_json
from harness.store.fingerprint import fingerprint
from harness.store.paths import ARTIFACTS, MODELS, PLAN_FILE, RECORDS, RUN_FILE, evaluation_path, root_of_evaluation
from harness.store.provenance import made_by
from harness.store.run_files import list_measured, read_run_file

# Options of `fusellm eval` that are not called as the setting of suites that they give.
_OPTIONS = {"batch_size": "--batch-size", "execute": "--generate-only", "sandbox": "--unsafe-no-sandbox"}


def sections(
    names: Sequence[str],
    *,
    tasks: Sequence[str],
    common: Mapping[str, Any],
    settings: Mapping[str, Mapping[str, Any]],
    data_root: Path | None,
) -> dict[str, Suite]:
    """The suites of a command line, by name.

    tasks: only these; a suite that has none of them is left out with a line about it. common: settings that each suite
    takes if it has them; None: not given. settings: by suite, keys and values of its own. Raises UserError for what no
    suite knows.
    """
    from omegaconf import OmegaConf

    suites: dict[str, Suite] = {}
    skipped: list[str] = []
    unknown = {task: UserError(f"No suite that was asked for has the task {task!r}: leave it out.") for task in tasks}
    common = {key: value for key, value in common.items() if value is not None}
    used: set[str] = set()
    for name in dict.fromkeys(names):
        kind = SUITES.get(name)
        fields = suite_parameters(name).model_fields
        given = {key: value for key, value in common.items() if key in fields}
        used |= given.keys()
        if standalone_config := getattr(kind, "standalone_config", None):
            given = standalone_config(common)
            used.add("limit")
        merged: Any = OmegaConf.to_container(OmegaConf.merge(given, dict(settings.get(name, {}))))
        if tasks and "tasks" in fields:
            known = []
            for task in tasks:
                try:
                    kind(suite_config(name, {**merged, "tasks": [task]}), data_root)
                    known.append(task)
                    unknown.pop(task, None)
                except UserError as error:
                    if task in unknown and "did you mean" not in str(unknown[task]):
                        unknown[task] = error
            if not known:
                skipped.append(name)
                continue
            merged["tasks"] = known
        suites[name] = kind(suite_config(name, merged), data_root)
    if unknown:
        raise next(iter(unknown.values()))
    if unused := [_OPTIONS.get(key, f"--{key}") for key in common if key not in used]:
        raise UserError(f"{', '.join(names)} cannot use {' and '.join(unused)}: leave it out.")
    for name in skipped:
        notify(f"{name} is left out: it has none of the tasks that were asked for.")
    return suites


def evaluate(
    spec: ModelSpec, suites: Mapping[str, Suite], root: Path, *, device: str, batch_tokens: int = 2048
) -> Path:
    """Measures one model on the suites; the folder with records and tables. What is there is not computed again.

    Of several ranks all make parts, and the first one completes and writes; the others may return before it has.
    """
    ignore_overrides()
    if spec.dtype != "auto":  # asked for of the model, and so of suites that do not ask for another
        for one in suites.values():
            if "dtype" in type(one.config).model_fields and "dtype" not in one.config.model_fields_set:
                one.config = one.config.model_copy(update={"dtype": spec.dtype})
    resolved = resolve(spec, root / MODELS)
    dtype = compute_dtype(spec.dtype, device)
    evaluated = EvaluatedModel(
        label=resolved.name,
        fingerprint=resolved.fingerprint,
        spec=spec,
        dtype=dtype,
        device=device,
        batch_tokens=batch_tokens,
        parameters=count_parameters(resolved.folder),
        models_dir=root / MODELS,
    )
    parts = {name: {"config": one.config.model_dump(mode="json"), **one.identity()} for name, one in suites.items()}
    identity = {"model": resolved.fingerprint, "dtype": dtype, "suites": parts, **spec.prefix_identity()}
    folder = evaluation_path(root, resolved.name, fingerprint(identity))
    costs = Costs(device)
    store = Store(root / ARTIFACTS, info={"configuration": identity})
    if distributed.world_size() > 1:
        with store.in_use():
            _share(evaluated, suites, store.sharing(), costs)
        if not distributed.is_main_process():
            return folder
    (folder / RECORDS).mkdir(parents=True, exist_ok=True)
    plan = Store(root / ARTIFACTS, dry=True)
    for one in suites.values():
        one.measure(evaluated, plan, costs)
    # Known from the beginning, so that cleaning up spares what is under way.
    write_json(folder / PLAN_FILE, {"artifacts": _artifacts(plan, root)})
    before = read_run_file(folder / RUN_FILE)  # refused now if it is damaged, not when all is done
    with store.in_use():
        measured = [
            write_records(
                folder,
                name,
                one.measure(evaluated, store, costs),
                candidate=evaluated.fingerprint,
                experiment="eval",
                profile=dtype,
                method=evaluated.label,
                seed=None,
            )
            for name, one in suites.items()
        ]
    listed = list_measured(folder, before, measured)
    note_suites(folder, suites, listed["measured"])
    description = {
        "evaluation": identity,
        # What a table needs to know of a run: this one has a single row.
        "configuration": {
            "experiment": "eval",
            "profile": evaluated.dtype,
            "title": evaluated.label,
            "methods": {evaluated.label: {"method": "as_is"}},
            "reference": None,
            "banner": None,
        },
        **made_by(),
        "artifacts": _artifacts(store, root),
        **listed,
        "finished": time.time(),
    }
    write_json(folder / RUN_FILE, description)
    return folder


def _share(evaluated: EvaluatedModel, suites: Mapping[str, Suite], store: Store, costs: Costs) -> None:
    """Makes the parts of suites that no other rank makes."""
    for one in suites.values():
        if getattr(one, "in_parts", False):
            # What cannot be measured the main process says.
            with nullcontext() if distributed.is_main_process() else suppress(UserError):
                one.measure(evaluated, store, costs)


def _artifacts(store: Store, root: Path) -> list[str]:
    return sorted(str(planned.path.relative_to(root)) for planned in store.planned.values())


def generated(folder: Path) -> list[str]:
    """The files of completions that an evaluation wrote."""
    from harness.evaluation.multipl_e.code_suite import COMPLETIONS

    description = read_run_file(folder / RUN_FILE)
    root = root_of_evaluation(folder)
    files = (root / name / COMPLETIONS for name in description["artifacts"])
    return [str(path) for path in files if path.exists()]
