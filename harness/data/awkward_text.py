"""Made-up documents of the kinds that a large corpus has and a small one lacks, for the profile `rehearsal`.

Digits, hexadecimal and base64 without a space, Chinese characters, emoji, deep indentation, decomposed accents, control
characters, texts that spell control tokens, nothing but spaces, a single letter, nothing at all, and one line of 3 MB.
The same call gives the same texts on every machine.
"""

import base64
import hashlib

LINE_BYTES = 3_000_000
_BYTES = {"train": 4_000, "validation": 600, "test": 600}
_EMOJI = ("😀", "👩‍💻", "👍🏽", "🇨🇭", "🏳️‍🌈", "❤️", "1️⃣", "🧑‍🤝‍🧑")
_CONTROL_TOKENS = ("<s>", "</s>", "<unk>", "<0x41>", "<|endoftext|>", "<|padding|>", "<pad>", "▁▁", "Ġ")
_ODD = ("\x00", "\x1f", "\x7f", "\u00a0", "\u200b", "\u2028", "\ufeff", "\ufffd", "\ue000", "\U0010fffd", "\r", "\x0b")
# Long ones, which tokenizers that are trained on the sample make one token each: the long line costs less that way.
_WORDS = (
    "administration characteristics communications configuration constitutional consideration demonstration "
    "environmental establishment implementation infrastructure international investigation manufacturers "
    "nevertheless organizations participation pharmaceutical photographs predominantly professional "
    "qualifications recommendations representatives responsibility satisfaction significantly sophisticated "
    "specifications straightforward telecommunications transformation transportation understanding unfortunately"
)


def awkward_texts(split: str) -> list[tuple[str, str]]:
    """(name, text) of each awkward document of a split; of the long line a sample. The last has no text."""
    size = _BYTES[split]

    def digest(kind: str, n: int) -> bytes:
        return hashlib.shake_256(f"{split}: {kind}".encode()).digest(n)

    def draw(kind: str, choices: tuple[str, ...], n: int) -> str:
        return "".join(choices[byte % len(choices)] for byte in digest(kind, n))

    ideographs = digest("ideographs", size // 3 * 2)
    texts = {
        "digits": draw("digits", tuple("0123456789"), size),
        "amounts": draw("amounts", (*"0123456789", ",000.", " ", "-", "\n"), size),
        "hexadecimal": digest("hexadecimal", size // 2).hex(),
        "base64": base64.b64encode(digest("base64", size // 4 * 3)).decode(),
        "ideographs": "".join(
            chr(0x4E00 + (high * 256 + low) % 0x5000)
            for high, low in zip(ideographs[::2], ideographs[1::2], strict=True)
        ),
        "emoji": draw("emoji", _EMOJI, size // 12),
        "indentation": "".join(f"{' ' * (byte % 40)}\tif x[{byte}]:\r\n" for byte in digest("indentation", size // 30)),
        "accents": draw("accents", ("cafe\u0301", "e\u0302\u0323", "\u1112\u1161\u11ab", "ﬁ", "Å", " "), size // 5),
        "controls": draw("controls", (*_ODD, "word", " ", "\n"), size // 3),
        "control-tokens": draw("control tokens", (*_CONTROL_TOKENS, " ", "word"), size // 8),
        "spaces": draw("spaces", (" ", "  ", "\t", "\n", "\n\n"), size // 2),
        "records": long_line(5 * size, split),
        "letter": {"train": "a", "validation": "b", "test": "c"}[split],
        "nothing": "",
    }
    return list(texts.items())


def long_line(n_bytes: int = LINE_BYTES, name: str = "line") -> str:
    """A line of JSON records of `n_bytes` bytes (ASCII) without a line end; another for each name."""
    record, words = 60, _WORDS.split()
    records: list[str] = []
    size = 0
    while size < n_bytes:
        drawn = hashlib.shake_256(f"{name}: record {len(records)}".encode()).digest(record)
        text = " ".join(words[byte % len(words)] for byte in drawn)
        records.append(f'{{"id":{len(records)},"text":"{text}"}},')
        size += len(records[-1])
    return "".join(records)[:n_bytes]
