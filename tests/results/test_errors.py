"""The errors of `results`, which say the same as those of `fusion` although neither package imports the other."""

import pickle

import pytest

import fusion.errors
import results.errors


@pytest.mark.parametrize("errors", [fusion.errors, results.errors])
@pytest.mark.parametrize("known", [("CLM", "FuseLLM"), ()])
def test_an_unknown_name_carries_its_parts_through_a_process(errors: object, known: tuple[str, ...]) -> None:
    error = pickle.loads(pickle.dumps(errors.UnknownName("row", "clm", known)))  # type: ignore[attr-defined]
    assert (error.noun, error.name, error.known) == ("row", "clm", known)


@pytest.mark.parametrize("known", [("Gemma", "FuseLLM"), ()])
def test_both_packages_have_one_sentence_where_no_name_is_near(known: tuple[str, ...]) -> None:
    ours, theirs = (errors.UnknownName("row", "clm", known) for errors in (results.errors, fusion.errors))
    assert str(ours) == str(theirs) == f"There is no row 'clm': there are {', '.join(known) or 'none'}."


def test_the_hint_of_a_command_line_ignores_case() -> None:
    error = results.errors.UnknownName("row", "clm", ("FuseLLM", "CLM"))
    sentence = fusion.errors.unknown_name(error.noun, error.name, error.known)
    assert sentence == "There is no row 'clm' (did you mean 'CLM'?): there are FuseLLM, CLM."
