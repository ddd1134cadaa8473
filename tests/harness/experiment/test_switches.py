"""Every switch of the method, set alone as a user sets it, reaches what is trained on: values worked out by hand.

Each test names one switch, gives every value of it the same small input, and writes down what the method says comes
out. The models are bigram tables, so that the numbers in a test are the numbers that the models say; float16 in the
store rounds them in the fourth digit.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from baselines.fusellm import FuseLLMParameters
from harness.experiment.candidates import candidates
from harness.experiment.pipeline import evaluated_model, measure
from harness.experiment.plan import plan
from tests.harness.bigrams import Bigrams, experiment, other
from tests.harness.listening import rows_of, trained

pytestmark = pytest.mark.slow

TOKEN_BY_TOKEN = ("projection=token", "inside=none", "true_token=top_k", "map=mined")
ALONG_THE_TEXT = ("projection=path", "inside=prefix", "true_token=always", "map=first_piece")


class Line:
    """From texts, models and one setting of the switches to the targets at every position of the one sequence."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch

    def row(self, texts: Sequence[str], sources: Mapping[str, Bigrams], *settings: str, **how: Any) -> Any:
        rows = rows_of(experiment(self.folder, texts, sources, *settings, **how), self.monkeypatch)
        assert len(rows) == 1
        return rows[0]

    def teaches(
        self, texts: Sequence[str], sources: Mapping[str, Bigrams], *switches: str, k: int = 2, **how: Any
    ) -> list[dict[str, float]]:
        """At every position token -> probability, the mass outside under "tail"; the target itself takes no part."""
        target = how.setdefault("target", Bigrams())
        settings = ["include_target=false", *TOKEN_BY_TOKEN, *switches]
        made = self.row(texts, sources, f"extraction.k={k}", *(f"methods.X.{s}" for s in settings), **how)
        targets = []
        for ids, p, tail in zip(made["ids"], made["p"], made["tail"], strict=True):
            entries = {target.tokens[i]: float(x) for i, x in zip(ids, p, strict=True) if i >= 0}
            targets.append(entries | ({"tail": float(tail)} if tail > 0 else {}))
        return targets


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Line:
    return Line(tmp_path, monkeypatch)


def near(**expected: float) -> Any:
    return pytest.approx(expected, abs=1e-3)


def test_map(line: Line) -> None:
    source = {"s": other({"<s>": {"ab": 0.5, "bcd": 0.25, "a": 0.125}})}
    first = {m: line.teaches(["ab"], source, f"map={m}", k=3)[0] for m in ("mined", "em", "first_piece")}
    assert first["mined"] == near(ab=0.5, cd=0.25, a=0.125, tail=0.125)  # cd is one letter from bcd, b two
    assert first["em"] == near(ab=0.5, a=0.125, tail=0.375)
    assert first["first_piece"] == near(ab=0.5, b=0.25, a=0.125, tail=0.125)  # the target writes bcd as b, cd


def test_map_on(line: Line) -> None:
    source = {"s": other({"<s>": {"ab": 0.5, "<end>": 0.25}})}
    assert line.teaches(["ab"], source, "map_on=bytes")[0] == pytest.approx(
        {"ab": 0.5, "</s>": 0.25, "tail": 0.25},
        abs=1e-3,  # by role: it ends texts
    )
    assert line.teaches(["ab"], source, "map_on=strings")[0] == pytest.approx(
        {"ab": 0.5, "<s>": 0.25, "tail": 0.25},
        abs=1e-3,  # by letters: three edits from <s> as from </s>, which is later
    )


def test_alignment(line: Line) -> None:
    # The target reads ab|cd|ab, the source ab|c|d|ab: after "abcd" both have read the same, but cd is not one of c, d.
    source = {"s": other({"d": {"a": 0.5}})}
    assert line.teaches(["abcdab"], source, "alignment=same_end", k=1)[2] == near(a=0.5, tail=0.5)
    assert line.teaches(["abcdab"], source, "alignment=dtw", k=1)[2] == {"ab": 1.0}


def test_projection(line: Line) -> None:
    # The target reads ab, the source a|b: it gave ab 0.5 * 0.8.
    source = {"s": other({"<s>": {"a": 0.5, "b": 0.25}, "a": {"b": 0.8}}, merges=())}
    assert line.teaches(["ab"], source, *ALONG_THE_TEXT)[0] == near(ab=0.4, a=0.1, b=0.25, tail=0.25)
    assert line.teaches(["ab"], source, *ALONG_THE_TEXT, "projection=token")[0] == near(a=0.5, b=0.25, tail=0.25)


def test_inside(line: Line) -> None:
    # The target reads a|b, the source ab. Of the 5/8 that begin with a, 4/5 go on with b.
    source = {"s": other({"<s>": {"ab": 0.5, "c": 0.25, "a": 0.125}})}
    target = Bigrams(merges=())
    assert line.teaches(["ab"], source, *ALONG_THE_TEXT, k=3, target=target)[1] == near(b=0.8, tail=0.2)
    assert line.teaches(["ab"], source, *ALONG_THE_TEXT, "inside=none", k=3, target=target)[1] == {"b": 1.0}


def test_true_token(line: Line) -> None:
    source = {"s": other({"<s>": {"b": 0.5, "c": 0.25, "ab": 0.125}})}
    assert line.teaches(["ab"], source, *ALONG_THE_TEXT)[0] == near(b=0.5, c=0.25, ab=0.125, tail=0.125)
    assert line.teaches(["ab"], source, *ALONG_THE_TEXT, "true_token=top_k")[0] == near(b=0.5, c=0.25, tail=0.25)


def test_unaligned(line: Line) -> None:
    values = {
        v: line.teaches(["abcdab"], {"s": other()}, "alignment=dtw", f"unaligned={v}") for v in ("next", "current")
    }
    assert values["next"][2] == {"ab": 1.0}
    assert values["current"][2] == {"cd": 1.0}


def test_unmapped(line: Line) -> None:
    source, target = {"s": other({"<s>": {"x": 0.75}})}, Bigrams({"<s>": {"b": 0.625}})
    values = {
        v: line.teaches(["ab"], source, "map=em", f"unmapped={v}", k=1, target=target)[0] for v in ("tail", "target")
    }
    assert values["tail"] == {"tail": 1.0}
    assert values["target"] == near(b=0.625, tail=0.375)


def test_duplicates(line: Line) -> None:
    source = {"s": other({"<s>": {"cc": 0.5, "c": 0.25}})}  # c is one letter from cc, and the first that is
    values = {v: line.teaches(["ab"], source, f"duplicates={v}")[0] for v in ("sum", "first")}
    assert values["sum"] == near(c=0.75, tail=0.25)
    assert values["first"] == near(c=0.5, tail=0.5)


def test_tail(line: Line) -> None:
    source = {"s": other({"<s>": {"a": 0.5, "b": 0.25}})}
    values = {v: line.teaches(["ab"], source, f"tail={v}")[0] for v in ("bucket", "renormalise", "gold")}
    assert values["bucket"] == near(a=0.5, b=0.25, tail=0.25)
    assert values["renormalise"] == near(a=2 / 3, b=1 / 3)
    assert values["gold"] == near(a=0.5, b=0.25, ab=0.25)


def test_level(line: Line) -> None:
    # In bits, `left` needs 1 + 2 + 1 for ab|c|d and 4 + 4 for b|a; `right` 4 + 1 + 1 and 2 + 1. What is most probable
    # says who was chosen.
    left = {"<s>": {"ab": 0.5, "b": 1 / 16}, "ab": {"c": 0.25}, "c": {"d": 0.5}, "b": {"c": 0.5, "a": 1 / 16}}
    left |= {"d": {"a": 0.5}, "a": {"a": 0.5}}
    right = {"<s>": {"b": 0.25, "ab": 1 / 16}, "ab": {"c": 0.5}, "c": {"d": 0.5}, "b": {"a": 0.5}}
    right |= {"d": {"b": 0.5}, "a": {"b": 0.5}}
    sources = {"left": other(left), "right": other(right)}
    by_left = [near(ab=0.5, tail=0.5), near(c=0.25, tail=0.75), near(a=0.5, tail=0.5)]
    by_right = [near(b=0.25, tail=0.75), near(c=0.5, tail=0.5), near(b=0.5, tail=0.5)]
    second = [near(b=0.25, tail=0.75), near(a=0.5, tail=0.5), near(b=0.5, tail=0.5)]  # by right, whatever the level
    values = {
        v: line.teaches(["abcd", "ba"], sources, f"select_over={v}", k=1) for v in ("passage", "token", "sequence")
    }
    assert values["passage"] == [*by_left, *second]
    assert values["sequence"] == [*by_right, *second]  # 12 bits against 9
    assert values["token"] == [by_left[0], *by_right[1:], *second]  # of ab: 1 against 4; of cd: 3 against 2


def test_choice_measures_bytes_or_own_tokens(line: Line) -> None:
    # `coarse` needs 7 bits for the three tokens ab|c|d, `fine` 8 for the four of a|b|c|d.
    coarse = other({"<s>": {"ab": 0.125, "cd": 0.5}, "ab": {"c": 0.25}, "c": {"d": 0.25}})
    fine = other({"<s>": {"a": 0.25}, "a": {"b": 0.25}, "b": {"c": 0.25}, "c": {"d": 0.25}}, merges=())
    sources = {"coarse": coarse, "fine": fine}
    values = {
        v: line.teaches(["abcd"], sources, f"select_by={v}", k=1)[0] for v in ("nats_per_byte", "mean_ce_bfloat16")
    }
    assert values["nats_per_byte"] == near(cd=0.5, tail=0.5)
    assert values["mean_ce_bfloat16"] == near(a=0.25, tail=0.75)


@pytest.mark.parametrize("probability", [0.125, 0.12499])  # the same in bfloat16; in float32 the second is the worse
def test_choice_breaks_ties_by_name_or_by_order(line: Line, probability: float) -> None:
    zebra, ant = other({"<s>": {"ab": probability, "a": 0.5}}), other({"<s>": {"ab": 0.125, "b": 0.5}})
    sources = {"zebra": zebra, "ant": ant}
    assert line.teaches(["ab"], sources, "select_by=nats_per_byte", k=1)[0] == near(b=0.5, tail=0.5)
    assert line.teaches(["ab"], sources, "select_by=mean_ce_bfloat16", k=1)[0] == near(a=0.5, tail=0.5)


# After the prefix two bytes follow, for which `one` needs 1 bit and `two` 3: half a bit against one and a half a byte.
PAIR = {"one": other({"<s>": {"ab": 0.5}}), "two": other({"<s>": {"b": 0.5, "ab": 0.125}})}


def mixed(first: float) -> Any:
    return near(ab=0.5 * first, b=0.5 * (1 - first), tail=0.5)


def test_fusion(line: Line) -> None:
    assert line.teaches(["ab"], PAIR, "fusion=mince", k=1)[0] == near(ab=0.5, tail=0.5)
    assert line.teaches(["ab"], PAIR, "fusion=avgce", "weight_temperature=1", k=1)[0] == mixed(
        2 / 3
    )  # a bit a byte: twice the weight


def test_weights(line: Line) -> None:
    values = {
        v: line.teaches(["ab"], PAIR, "fusion=avgce", "weight_temperature=1", f"weights={v}", k=1)[0]
        for v in ("nats_per_byte", "exp_ce")
    }
    assert values["nats_per_byte"] == mixed(2 / 3)
    assert values["exp_ce"] == mixed(1 / (1 + np.exp(1 / 8 - 1 / 2)))


@pytest.mark.parametrize(("temperature", "first"), [(1.0, 2 / 3), (0.5, 4 / 5), (2.0, 2**0.5 / (1 + 2**0.5))])
def test_weight_temperature(line: Line, temperature: float, first: float) -> None:
    targets = line.teaches(["ab"], PAIR, "fusion=avgce", f"weight_temperature={temperature}", k=1)
    assert targets[0] == mixed(first)


def test_positions(line: Line) -> None:
    for value, weight in (("with_next", [1, 1, 0]), ("all", [1, 1, 1])):
        made = line.row(["abcd"], {"s": other()}, f"methods.X.loss_positions={value}")
        assert made["weight"].tolist() == weight


def test_include_target(line: Line) -> None:
    source, target = {"s": other({"<s>": {"ab": 0.5}})}, Bigrams({"<s>": {"ab": 0.75}})
    for value, expected in (("false", near(ab=0.5, tail=0.5)), ("true", near(ab=0.75, tail=0.25))):
        assert line.teaches(["ab"], source, f"include_target={value}", k=1, target=target)[0] == expected


def test_sources(line: Line) -> None:
    assert line.teaches(["ab"], PAIR, "sources=[two]", k=1)[0] == near(b=0.5, tail=0.5)


def test_fewer_than_are_stored(line: Line) -> None:
    source = {"s": other({"<s>": {"a": 0.5, "b": 0.25}})}
    assert line.teaches(["ab"], source, k=2)[0] == near(a=0.5, b=0.25, tail=0.25)
    assert line.teaches(["ab"], source, "k=1", k=2)[0] == near(a=0.5, tail=0.5)


@pytest.mark.parametrize("lam", [0.25, 0.75])
def test_lambda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lam: float) -> None:
    # The target knows nothing (8 tokens of 1/8), the text is ab and its end, the source says b and nothing else.
    source = {"s": other({"<s>": {"b": 0.9, "ab": 0.05}})}
    settings = ["extraction.k=1", f"methods.X.lambda={lam}", "methods.X.tail=renormalise"]
    settings += ["methods.X.include_target=false", *(f"methods.X.{s}" for s in TOKEN_BY_TOKEN)]
    made = experiment(tmp_path, ["ab"], source, *settings)
    step, gradients = trained(made, monkeypatch)
    assert step["clm_nats_per_token"] == pytest.approx(np.log(8))
    assert step["fusion_nats_per_token"] == pytest.approx(np.log(8) / 2)  # one position, divided by two tokens
    tokens = Bigrams().tokens
    after_prefix = np.full(8, 1 / 8) - lam * np.eye(8)[tokens.index("ab")] - (1 - lam) * np.eye(8)[tokens.index("b")]
    after_ab = lam * (np.full(8, 1 / 8) - np.eye(8)[tokens.index("</s>")])
    on_head = gradients["lm_head.weight"].numpy() * 2 / np.sqrt(8)
    np.testing.assert_allclose(on_head[:, tokens.index("<s>")], after_prefix, atol=1e-5)
    np.testing.assert_allclose(on_head[:, tokens.index("ab")], after_ab, atol=1e-5)
    assert not on_head[:, tokens.index("b")].any()


@pytest.mark.parametrize("k", [1, 3])
def test_k(line: Line, k: int) -> None:
    source = {"s": other({"<s>": {"ab": 0.5, "a": 0.25, "b": 0.125}})}
    expected = [{"ab": 0.5, "tail": 0.5}, {"ab": 0.5, "a": 0.25, "b": 0.125, "tail": 0.125}]
    assert line.teaches(["ab"], source, k=k)[0] == near(**expected[k > 1])


@pytest.mark.parametrize(("bos", "prefix"), [("<s>", "<s>"), (None, "</s>")])
def test_prefix(line: Line, bos: str | None, prefix: str) -> None:
    """bos, else eos, before every passage: where sources are read, where the target is trained, where it is tested."""
    after = {"<s>": {"ab": 0.5, "a": 0.25}, "</s>": {"ab": 0.125, "b": 0.5}}
    own = Bigrams(after, bos=bos)
    texts = ["ab", "ba"]
    targets = line.teaches(texts, {"s": Bigrams(after, bos=bos)}, k=1, target=own)
    expected = near(ab=0.5, tail=0.5) if bos else near(b=0.5, tail=0.5)
    assert targets[0] == targets[2] == expected
    made = line.row(texts, {"s": other()}, target=own)
    at = own.tokens.index(prefix)
    assert made["input_ids"][[0, 2]].tolist() == [at, at] and made["position_ids"][[0, 2]].tolist() == [0, 0]
    as_is = experiment(line.folder, texts, {"s": other()}, "methods.X.method=as_is", target=own)
    (row,) = candidates(as_is)
    results = measure(as_is, evaluated_model(as_is, row.label, row.candidate))
    (measured,) = results["perplexity"].examples()
    # ab, and c after it
    assert measured.numerator == pytest.approx(
        -np.log(0.5 if bos else 0.125) + np.log(8), rel=1e-5
    )  # ab, and c after it


TOKEN_BY_TOKEN_ONLY = {"map=em", "map_on=strings", "alignment=dtw", "duplicates=first"}
SETTINGS = {
    "map=em",
    "map=byte_prefix",
    "map_on=strings",
    "alignment=dtw",
    "projection=token",
    "inside=none",
    "true_token=top_k",
    "unaligned=current",
    "unmapped=target",
    "duplicates=first",
    "tail=gold",
    "tail=renormalise",
    "fusion=avgce",
    "select_over=token",
    "select_over=sequence",
    "select_by=mean_ce_bfloat16",
    "weights=exp_ce",
    "weight_temperature=0.5",
    "loss_positions=all",
    "include_target=false",
    "control=shuffled",
    "sources=[s]",
    "k=2",
    "lambda=0.5",
    "balance=rescale",
    "training={learning_rate: 0.5}",
}


def test_no_two_settings_share_a_training(tmp_path: Path) -> None:
    """An artifact that another setting made would be taken for this one's."""

    def fingerprints(*settings: str) -> set[str]:
        made = experiment(tmp_path, ["ab"], {"s": other(), "t": other({"<s>": {"ab": 0.5}})}, *settings)
        return {p.spec.fingerprint for p in plan(made.config, tmp_path / "root") if p.spec.kind == "train"}

    # Not every value goes with a projection along the text.
    by_token = [f"methods.X.{setting}" for setting in ("projection=token", "inside=none", "map=mined")]
    found = [fingerprints(), fingerprints("extraction.k=3"), fingerprints(*by_token)]
    found += [
        fingerprints(*(by_token if setting in TOKEN_BY_TOKEN_ONLY else ()), f"methods.X.{setting}")
        for setting in SETTINGS
    ]
    assert [len(f) for f in found] == [1] * len(found)
    assert len(set().union(*found)) == len(found)
    every = {field.alias or name for name, field in FuseLLMParameters.model_fields.items()}
    assert {setting.split("=")[0] for setting in SETTINGS} == every - {
        "preset",  # sets some of these
        "warm_start",  # names another row: tests/harness/experiment/test_keys.py
    }
