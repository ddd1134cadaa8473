"""What a member with another tokenizer adds to an ensemble, by how the text so far is put to it: nats a byte.

PackLLM turns every token of the context into the member's token most like it; the harness has the member read the text
in its own tokens, without and with what covers the text's end (`fusion.overlaps`).
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError
from harness.corpus import CorpusConfig, Document, documents
from harness.models import ModelSpec, load_model, load_tokenizer, resolve
from harness.progress import say

if TYPE_CHECKING:
    from fusion.ensemble import Translator
    from fusion.prefixes import PrefixReader
    from fusion.vocabulary import Vocabulary

DOMAINS = ["wiki", "code", "news"]
WINDOW = 512


@dataclass
class Model:
    """A model with its tokenizer, loaded when it is first needed."""

    name: str
    root: Path
    dtype: Any

    @cached_property
    def reader(self) -> "PrefixReader":
        from fusion.prefixes import PrefixReader

        return PrefixReader(load_model(self._resolved, self.dtype))

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self._resolved)

    @cached_property
    def vocabulary(self) -> "Vocabulary":
        from fusion.vocabulary import Vocabulary

        return Vocabulary.from_tokenizer(self.tokenizer, self.reader.vocabulary)

    @cached_property
    def _resolved(self) -> Any:
        return resolve(ModelSpec(name=self.name, dtype=self.dtype), self.root / "models")

    def encode(self, text: str) -> list[int]:
        from fusion.vocabulary import encode

        return encode(self.tokenizer, text)


def texts(data_root: Path, number: int, size: int) -> list[Document]:
    """The first bytes of test documents, as many of each domain."""
    config = CorpusConfig(
        path="corpora/mixed",
        split="test",
        domain_column="source",
        domains=DOMAINS,
        per_domain=max(1, number // len(DOMAINS)),
        first_bytes=size,
    )
    return list(documents(config, data_root))


def translators(pivot: Model, member: Model, given: Sequence[Document], most: Sequence[int]) -> dict[str, "Translator"]:
    """The member as it is asked in each way, by what that is called."""
    import torch

    from fusion.ensemble import Translator
    from fusion.maps import build_map
    from fusion.vocabulary import encode_all, prefix_id

    class OneToOne(Translator):
        to_own: dict[int, int]

        def encode(self, texts: Sequence[Sequence[int]]) -> list[list[int]]:
            return [[self.to_own[i] for i in text] for text in texts]

    onto = build_map("first_piece", member.vocabulary, pivot.vocabulary, encode_target=pivot.encode)

    def made(kind: type[Translator], overlaps: int) -> Any:
        return kind(
            member.reader,
            member.tokenizer,
            member.vocabulary,
            pivot.vocabulary,
            torch.from_numpy(onto).long(),
            encode_pivot=partial(encode_all, pivot.tokenizer),
            prefix=prefix_id(member.tokenizer),
            label=member.name,
            overlaps=overlaps,
        )

    one_to_one = made(OneToOne, 0)
    ids = sorted({i for document in given for i in pivot.encode(document.text)})
    own = build_map("mined", pivot.vocabulary, member.vocabulary, only=torch.tensor(ids).numpy())
    one_to_one.to_own = {i: int(own[i]) for i in ids} | {prefix_id(pivot.tokenizer): prefix_id(member.tokenizer)}
    found = {"token by token (PackLLM)": one_to_one, "the text so far, without overlaps": made(Translator, 0)}
    for number in most:
        found[f"the text so far, overlaps of up to {number} token{'s' * (number > 1)}"] = made(Translator, number)
    return found


def nats_a_byte(reader: Any, model: Model, given: Sequence[Document]) -> dict[str, float]:
    """By domain; the texts are in the model's tokens."""
    from fusion.inference import document_nats
    from fusion.vocabulary import prefix_id

    nats = document_nats(
        reader,
        [model.encode(document.text) for document in given],
        prefix=prefix_id(model.tokenizer),
        window=WINDOW,
        batch_tokens=WINDOW,
    )
    found = {}
    for domain in sorted({document.domain for document in given}, key=DOMAINS.index):
        some = [i for i, document in enumerate(given) if document.domain == domain]
        found[domain] = float(nats[some].sum()) / sum(len(given[i].text.encode()) for i in some)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ensembles", description=__doc__)
    parser.add_argument("--pivot", default="SmolLM2-135M-Instruct")
    parser.add_argument("--member", default="Qwen2.5-Coder-0.5B-Instruct")
    parser.add_argument("--root", type=Path, default=Path("work"), help="folder that holds models/")
    parser.add_argument("--data-root", type=Path, default=Path("../shared/data/hub"))
    parser.add_argument("--texts", type=int, default=30, help="in all, as many of each domain")
    parser.add_argument("--bytes", type=int, default=400, help="how much of each text is read")
    parser.add_argument("--overlaps", type=int, nargs="+", default=[3], help="last tokens that may be covered")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    options = parser.parse_args(arguments)
    from fusion.ensemble import JointReader

    try:
        pivot, member = (Model(name, options.root, options.dtype) for name in (options.pivot, options.member))
        given = texts(options.data_root, options.texts, options.bytes)
        asked: dict[str, tuple[Any, Model]] = {
            f"{one.name} alone": (JointReader([(one.reader, 1)]), one) for one in (pivot, member)
        }
        for name, translator in translators(pivot, member, given, options.overlaps).items():
            asked[name] = JointReader([(pivot.reader, 0.5)], [(translator, 0.5)]), pivot
        rows = []
        for name, (reader, model) in asked.items():
            say(name)
            started = time.perf_counter()
            found = nats_a_byte(reader, model, given)
            seconds = time.perf_counter() - started
            rows.append(f"| {name} | {' | '.join(f'{value:.4f}' for value in found.values())} | {seconds:.0f} |")
            domains = list(found)
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    print(f"| {options.pivot} with {options.member}, nats a byte | {' | '.join(domains)} | s |")
    print(f"| --- |{' ---: |' * (len(domains) + 1)}")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
