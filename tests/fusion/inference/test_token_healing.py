"""What covers the end of a text, by hand: tokens of one vocabulary that go on where another's end."""

from collections.abc import Sequence

import pytest

from fusion.inference.token_healing import TokenHealing
from fusion.vocabulary.token_bytes import Vocabulary
from fusion.vocabulary.tokenization import encode, encode_all
from tests.fusion.tokenizers_for_tests import byte_level, sentencepiece_bpe


def vocabulary(*tokens: str) -> Vocabulary:
    """Plain strings and the bytes <0xNN>; `<s>` is a control token."""
    control = {i for i, token in enumerate(tokens) if token == "<s>"}
    return Vocabulary.from_tokens(tokens, space=" ", control=control, byte_fallback=True)


def longest_first(pivot: Vocabulary) -> "TokenHealing":
    """The overlaps of `OWN` with a pivot whose tokenizer always takes the longest token."""

    def encode_one(text: str) -> list[int]:
        found, rest = [], text.encode()
        while rest:
            passage = max((p for p in pivot.token_bytes if p and rest.startswith(p)), key=len)
            found.append(pivot.token_bytes.index(passage))
            rest = rest[len(passage) :]
        return found

    return TokenHealing(OWN, pivot, lambda texts: [encode_one(text) for text in texts])


OWN = vocabulary("<s>", " he", "l", "lo", "lot", " hello", " help", " hell", " held", "l!", "<0xE7>", "猫", "猫猫", "o")
PIVOT = vocabulary(
    "<s>", " hel", " he", "l", "lo", "o", "p", "p!", " held", "!", "d", "t", "<0xE7>", "<0x8C>", "<0xAB>"
)


def named(overlaps: TokenHealing, own: Sequence[str], text: Sequence[str], pivot: Vocabulary = PIVOT) -> list[set[str]]:
    """The covers as 'token>token', of token strings."""
    covering_tokens = overlaps.covering_tokens([OWN.ids[t] for t in own], [pivot.ids[t] for t in text])
    return [
        {f"{OWN.tokens[i]}>{pivot.tokens[onto]}" for i, onto in zip(ids.tolist(), tokens.tolist(), strict=True)}
        for ids, tokens in covering_tokens
    ]


def test_tokens_that_go_on_are_carried_onto_what_the_pivot_would_write() -> None:
    overlaps = longest_first(PIVOT)
    # " held" is a token of the pivot's, too, which it would have written.
    after_one = [{"lo>o", "lot>o", "l!>!"}, {" hello>lo", " help>p", " hell>l"}]
    assert named(overlaps, ["<s>", " he", "l"], ["<s>", " hel"]) == after_one
    # So would it "lo" for the end of a longer text; " hel" it writes otherwise, and is taken at its word.
    after_two = [{"l!>!"}, {" hello>lo", " help>p", " hell>l"}]
    assert named(overlaps, ["<s>", " he", "l"], ["<s>", " he", "l"]) == after_two


def test_a_token_does_not_count_where_the_pivots_longest_would_be_another() -> None:
    pivot = vocabulary("<s>", "he", "l", "lo", "o", " ", "hel", "p", "lp", "!", "t", "d")
    # " hel" would be " " and "hel", so that what follows is known by the lengths of the tokens alone.
    found = named(longest_first(pivot), ["<s>", " he", "l"], ["<s>", " ", "he", "l"], pivot)
    assert found == [{"l!>!"}, {" hello>lo", " hell>l", " held>d"}]


def test_the_bytes_of_a_character_are_part_of_it() -> None:
    overlaps = longest_first(PIVOT)
    expected = [{"猫><0x8C>", "猫猫><0x8C>"}]
    assert named(overlaps, ["<s>", "<0xE7>"], ["<s>", "<0xE7>"]) == expected


def test_what_the_pivots_tokenizer_cannot_write_is_known_by_length() -> None:
    """It may drop text, know no token for it, or have tokens that the model has no row for."""
    known = [PIVOT.ids["l"]]
    for lost in ([], [PIVOT.ids["<s>"]], [len(PIVOT)]):

        def encode_pivot(texts: Sequence[str], lost: list[int] = lost) -> list[list[int]]:
            if PIVOT.tokens[1] in texts:  # every token by itself
                return [[PIVOT.ids.get(text, 0)] for text in texts]
            return [[], known, *([*known, *lost] for _ in texts[2:])]

        overlaps = TokenHealing(OWN, PIVOT, encode_pivot)
        # "lo" is a token of the pivot's, and longer.
        assert named(overlaps, ["<s>", "l"], ["<s>", "l"]) == [{"l!>!"}]


def test_nothing_is_covered_beyond_what_is_known() -> None:
    overlaps = longest_first(PIVOT)
    one = [{"l!>!"}]
    assert named(overlaps, [" he", "l"], [" he", "l"]) == one  # nothing before " he" at which it would be likely
    assert named(overlaps, [" he", "<s>", "l"], [" he", "<s>", "l"]) == one
    assert named(overlaps, ["<s>", " he", "l"], ["l"]) == one  # the text is another
    assert named(overlaps, ["<s>", "l"], ["<s>", "o"]) == []
    assert named(overlaps, ["<s>", "l!"], ["<s>", "l", "!"]) == []
    assert named(overlaps, ["<s>"], ["<s>"]) == []
    short = TokenHealing(OWN, PIVOT, lambda texts: [[PIVOT.ids["l"]] for _ in texts], most=0)
    assert named(short, ["<s>", "l"], ["<s>", "l"]) == []


@pytest.mark.parametrize("dummy_prefix", [False, True])
def test_the_pivots_tokens_are_those_of_the_whole_text(dummy_prefix: bool) -> None:
    """Whether and how the pivot goes on is told from its last tokens only: mostly as if from the whole text."""
    tokenizer, other = sentencepiece_bpe(dummy_prefix), byte_level()
    pivot, own = Vocabulary.from_tokenizer(tokenizer), Vocabulary.from_tokenizer(other)
    overlaps = TokenHealing(own, pivot, lambda texts: encode_all(tokenizer, texts))
    text = "The lazy brown dogs; print(area(width, height)) and the quick foxes jump over crème"
    ids = encode(tokenizer, text)
    right = wrong = missed = 0
    for n in range(4, len(ids)):
        prefix = b"".join(pivot.token_bytes[i] or b"" for i in ids[:n])[dummy_prefix:]
        if not is_text(prefix):
            continue
        read = encode(other, prefix.decode())
        covering_tokens = overlaps.covering_tokens(read, ids[:n])
        for back in range(1, min(3, len(read) - 1) + 1):
            end = b"".join(own.token_bytes[i] or b"" for i in read[-back:])
            given = (
                dict(zip(*(part.tolist() for part in covering_tokens[back - 1]), strict=True))
                if back <= len(covering_tokens)
                else {}
            )
            for i, passage in enumerate(own.token_bytes):
                if passage and passage.startswith(end) and passage != end and is_text(rest := passage[len(end) :]):
                    whole = encode(tokenizer, (prefix + rest).decode())
                    expected = whole[n] if whole[:n] == ids[:n] else None
                    right += given.get(i) == expected is not None
                    wrong += i in given and given[i] != expected
                    missed += i not in given and expected is not None
    assert right > 20 and wrong + missed < right / 10


def is_text(spelled: bytes) -> bool:
    try:
        return bool(spelled.decode())
    except UnicodeDecodeError:
        return False
