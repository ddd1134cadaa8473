"""The layers of a configuration that a user writes (files and `--set`), and the line that a key stands in."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion.errors import UserError, message_line
from harness.config.schema import Config
from harness.config.shipped import names

Key = tuple[str, ...]
"""The parts of a dotted key; a list's items are numbered from 0."""


@dataclass(frozen=True)
class Layer:
    """Keys and values that are merged over the layers before."""

    values: Any
    """An OmegaConf mapping."""
    places: dict[Key, str] = field(default_factory=dict)
    """Where each key was written, in the words of an error message."""


def is_file(name: str) -> bool:
    """Whether the name of an experiment means a YAML file of the user's own."""
    return name.endswith((".yaml", ".yml"))


def user_layers(path: Path, _extending: Sequence[Path] = ()) -> tuple[list[Layer], str | None]:
    """The layers of a user's file, the files that it extends first; and the shipped experiment below them, if any.

    `extends: NAME` names an experiment that ships with the harness, `extends: FILE` another file, relative to the file
    that says so. Raises UserError where a file cannot be read and where files extend one another.
    """
    values = _read(path, _extending[-1] if _extending else None)
    layer = Layer(values, dict(_lines(path)))
    _refuse_functions(layer, str(path))
    extends = values.pop("extends", None)
    if extends is None:
        return [layer], None
    if not isinstance(extends, str):
        raise UserError(f"{path} has extends = {extends!r}, which must be an experiment's name or a YAML file.")
    if not is_file(extends):
        return [layer], extends
    chain = [*_extending, path]
    base = path.parent / Path(extends).expanduser()
    if base.resolve() in [one.resolve() for one in chain]:
        names = ", which extends ".join(map(str, [*chain, base]))
        raise UserError(f"{names}: a file cannot extend itself, so remove one `extends`.")
    below, shipped = user_layers(base, chain)
    return [*below, layer], shipped


def setting_layer(item: str) -> Layer:
    """A `--set KEY=VALUE` as a layer; SUITE.KEY is short for suites.SUITE.KEY. Raises UserError where it is none."""
    from omegaconf import OmegaConf

    key, equals, value = item.partition("=")
    if not equals:
        raise UserError(f"--set {item} has no value: write --set KEY=VALUE.")
    if not all(key.strip().split(".")):
        raise UserError(f"--set {item} has no key: write --set KEY=VALUE, with dots between the parts of the key.")
    if key == "extends":
        raise UserError(f"--set {item} extends nothing: write `extends` in a YAML file.")
    if key == "profile":
        raise UserError(f"--set {item} chooses no profile: write --profile.")
    if _begins_with_suite(key):
        key = f"suites.{key}"
    if re.fullmatch(r"[\w.-]+:", value):
        value = f"'{value}'"  # tiny: is a name, and not a key without a value
    values = OmegaConf.from_dotlist([f"{key}={value}"])
    keys = dict(_items(OmegaConf.to_container(values, resolve=False)))
    layer = Layer(values, dict.fromkeys(keys, f"--set {item}"))
    _refuse_functions(layer, f"--set {item}")
    return layer


def _refuse_functions(layer: Layer, where: str) -> None:
    """Raises UserError for a value that interpolates anything but another key, such as `${oc.env:HF_TOKEN}`.

    A resolved configuration is stored with every artifact and printed in reports, and nothing of the environment may
    get there. All of OmegaConf's functions are refused, since some of them (`oc.decode`) build a call of others.
    """
    from omegaconf import OmegaConf

    for key, text in _items(OmegaConf.to_container(layer.values, resolve=False)):
        if isinstance(text, str) and _calls_function(text):
            raise UserError(
                f"{layer.places.get(key, where)} has {'.'.join(key)} = {text}, which is not resolved, because a secret "
                "of the environment would be stored with every result: write the value itself; only other keys, as in "
                "${roles.target.model}, can be interpolated."
            )


def _calls_function(text: str) -> bool:
    """Whether an interpolation of the text, which may stand in another one, is more than the name of a key."""
    shorter = ""
    while shorter != text:
        shorter, text = text, re.sub(r"\$\{[^${}:]*\}", "", text)
    return re.search(r"\$\{[^}]*:", text) is not None


def _begins_with_suite(key: str) -> bool:
    first, dot, _ = key.strip().partition(".")
    return bool(dot) and first not in Config.model_fields and first in names("suites")


def place_of(key: Key, layers: Sequence[Layer]) -> str | None:
    """Where a key was written last, or else the section it is missing from; None where no user wrote it."""
    for depth in range(len(key), min(2, len(key)) - 1, -1):
        for layer in reversed(layers):
            if depth and key[:depth] in layer.places:
                return layer.places[key[:depth]]
    return None


def _read(path: Path, extended_by: Path | None) -> Any:
    """The keys and values of a user's file. Raises UserError where it cannot be read or holds something else."""
    from omegaconf import OmegaConf
    from yaml import MarkedYAMLError, YAMLError

    correct = f"correct `extends` in {extended_by}" if extended_by else "correct the path of the experiment"
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"There is no file {path}: {correct}.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: give an experiment's name or a YAML file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}: convert the file.") from None
    except MarkedYAMLError as error:
        at = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{at} is not valid YAML ({error.problem}): correct it.") from None
    except YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {message_line(error)}.") from None
    except OSError as error:  # for OmegaConf a single value is one, too
        if error.errno is not None:
            raise
        loaded = None
    if not loaded or not OmegaConf.is_dict(loaded):
        raise UserError(f"{path} does not hold keys and values: write an experiment in it (see `experiment show`).")
    return loaded


def _lines(path: Path) -> Iterator[tuple[Key, str]]:
    """The keys of a YAML file that can be read, with file and line."""
    import yaml

    def walk(node: yaml.Node, above: Key) -> Iterator[tuple[Key, str]]:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = above if key.value == "<<" else (*above, str(key.value))
                yield inner, f"{path}, line {key.start_mark.line + 1}"
                yield from walk(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for number, value in enumerate(node.value):
                inner = (*above, str(number))
                yield inner, f"{path}, line {value.start_mark.line + 1}"
                yield from walk(value, inner)

    node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    if node is not None:
        yield from walk(node, ())


def _items(value: Any, above: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Every key below a value, and what stands there."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*above, str(key)), inner
        yield from _items(inner, (*above, str(key)))
