"""The registry of methods, and the decorator that makes a function one.

    @method("clm", needs=("training",), reference="arXiv 2401.10491, section 4.1")
    def clm(context: Context, parameters: Parameters) -> Candidate:
        \"\"\"The target trained on the next token alone.\"\"\"
        return context.train(lam=1.0)

The annotation of the second argument is the schema of the method's parameters, and the first line of the docstring is
what `fusellm baseline list` prints. A package offers a method by an entry point of the group `fusellm.methods` whose
target is the decorated function; its name must be the method's.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from baselines.method import Candidate, Context, Ensemble, Need, Parameters
from fusion.errors import UserError
from fusion.registry import Part, Registry

Method = Callable[[Context, Any], Candidate | Ensemble]
"""A function of (context, parameters), the second annotated with a subclass of `Parameters`."""
M = TypeVar("M", bound=Callable[[Any, Any], Candidate | Ensemble])

METHODS: Registry[Method] = Registry(
    "method",
    "fusellm.methods",
    own={
        "alm": "baselines.alm",
        "as_is": "baselines.as_is",
        "bpm": "baselines.bpm",
        "clm": "baselines.clm",
        "distillation": "baselines.distillation",
        "ensemble": "baselines.ensemble",
        "fuse_then_merge": "baselines.fuse_then_merge",
        "fusellm": "baselines.fusellm",
        "gold": "baselines.gold",
        "infifusion": "baselines.infifusion",
        "merge": "baselines.merge",
        "simct": "baselines.simct",
        "strict": "baselines.strict",
        "uld": "baselines.uld",
        "xtoken": "baselines.xtoken",
    },
)


def method(name: str, *, needs: Sequence[Need] = (), reference: str = "", version: int = 1) -> Callable[[M], M]:
    """A decorator that registers its function as the method `name` and returns it unchanged.

    needs: what the models must have in common and what else the experiment must offer.
    reference: where the method is from (paper, section, table).
    version: raised when the function changes in a way that changes results; part of what names a run.
    Raises UserError when the function does not take a context and parameters of a schema of its own.
    """

    def decorate(function: M) -> M:
        METHODS.register(name, version=version, parameters=_schema(name, function), reference=reference, needs=needs)(
            function
        )
        return function

    return decorate


def get_method(name: str) -> Part[Method]:
    """The registered method of that name, with its schema (`parameters`), needs, version and reference.

    Raises UserError when there is none, when its package cannot be imported, and when what the package offers is not a
    function that `method` has registered under that name.
    """
    part = METHODS.part(name)
    if part.parameters is None:
        raise UserError(
            f"The method {name!r} is not a function decorated with @method({name!r}) of baselines.registry: correct or "
            "uninstall the package that offers it."
        )
    return part


def schema_of(part: Part[Method]) -> type[Parameters]:
    """The model that validates a method's parameters."""
    assert part.parameters is not None and issubclass(part.parameters, Parameters)
    return part.parameters


def _schema(name: str, function: Callable[..., Any]) -> type[Parameters]:
    """The class that the second argument is annotated with."""
    try:
        arguments = list(inspect.signature(function, eval_str=True).parameters.values())
    except (TypeError, ValueError, NameError):  # no function, or an annotation that names nothing
        arguments = []
    schema = arguments[1].annotation if len(arguments) == 2 else None
    if not (isinstance(schema, type) and issubclass(schema, Parameters)):
        raise UserError(
            f"The method {name!r} must be a function of (context, parameters) whose second argument is annotated with "
            "baselines.method.Parameters or a subclass: correct its signature."
        )
    return schema
