"""Majority votes over the answers of several models: the answer with the greatest total weight counts."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf
from typing import Any

from harness.evaluation.suite import Example

Line = Mapping[str, Any]
"""What a suite of lm-eval tasks keeps of an example."""
Answers = Callable[[Line], Mapping[str, Any]]
"""The answer in a line by each metric, of those that look at one."""


def chosen_indices(line: Line) -> dict[str, Any]:
    """The index of the choice that each of lm-eval's metrics takes as the answer.

    acc: the choice with the greatest log-likelihood; acc_norm: with the greatest log-likelihood per character.
    """
    log_likelihoods = [float(answer[0]) for answer in line["answer"][: len(line["choices"])]]
    # Without a character there is no mean: like lm-eval's, such a choice is never taken.
    normalised = [
        p / n if (n := len(choice)) else -inf for p, choice in zip(log_likelihoods, line["choices"], strict=True)
    ]
    return {
        "acc": log_likelihoods.index(max(log_likelihoods)),
        "acc_norm": normalised.index(max(normalised)),
    }


def voted(task: str, members: Sequence[tuple[Sequence[Line], float]], answers: Answers) -> Iterator[Example]:
    """The score, by example and metric, of the answer with the greatest total weight.

    Where several answers tie, it is the mean of their scores. `members` are the stored lines of each model, and its
    weight.
    """
    by_example = [({line["example"]: line for line in lines}, weight) for lines, weight in members]
    shared = set.intersection(*(set(lines) for lines, _ in by_example))  # what one could not be asked counts for none
    for example in sorted(shared, key=str):
        given = [(lines[example], answers(lines[example]), weight) for lines, weight in by_example]
        for metric in given[0][1].keys() & given[0][0]["scores"].keys():
            behind: dict[str, float] = {}
            scores: dict[str, float] = {}
            for line, answer, weight in given:
                key = json.dumps(answer[metric])
                behind[key] = behind.get(key, 0.0) + weight
                scores[key] = line["scores"][metric]
            most = max(behind.values())
            first = [scores[key] for key, weight in behind.items() if weight >= most - 1e-9]
            cluster = given[0][0]["cluster"]
            yield Example(task, example, metric, sum(first) / len(first), cluster=cluster)
