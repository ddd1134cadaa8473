"""What a member with another tokenizer adds to an ensemble, by how the text so far is put to it: nats a byte.

PackLLM turns every token of the context into the member's token most like it; the harness has the member read the text
in its own tokens, without and with what covers the text's end (`fusion.inference.token_healing`).
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.errors import UserError
from fusion.inference.token_healing import MOST
from harness.config.schema import CorpusConfig
from harness.data.corpus import Document, documents
from harness.models.checkpoints import load_model, load_tokenizer
from harness.models.resolution import ModelSpec, resolve
from harness.runtime.progress import notify

if TYPE_CHECKING:
    from fusion.inference.ensembles import CrossTokenizerMember
    from fusion.inference.prefix_cache import PrefixCachedModel
    from fusion.vocabulary.token_bytes import Vocabulary

DOMAINS = ["wiki", "code", "news"]
TOKEN_BY_TOKEN = "token by token (PackLLM)"
WINDOW = 512


@dataclass
class Model:
    """A model with its tokenizer, loaded when it is first needed."""

    name: str
    root: Path
    dtype: Any

    @cached_property
    def network(self) -> Any:
        return load_model(self._resolved, self.dtype)

    @cached_property
    def reader(self) -> "PrefixCachedModel":
        from fusion.inference.prefix_cache import PrefixCachedModel

        return PrefixCachedModel(self.network)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self._resolved)

    @cached_property
    def vocabulary(self) -> "Vocabulary":
        from fusion.vocabulary.token_bytes import Vocabulary

        return Vocabulary.from_tokenizer(self.tokenizer, self.network.get_output_embeddings().weight.shape[0])

    @cached_property
    def _resolved(self) -> Any:
        return resolve(ModelSpec(name=self.name, dtype=self.dtype), self.root / "models")

    def encode(self, text: str) -> list[int]:
        from fusion.vocabulary.tokenization import encode

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


def translators(
    pivot: Model, member: Model, given: Sequence[Document], most: Sequence[int]
) -> dict[str, "CrossTokenizerMember"]:
    """The member as it is asked in each way, by what that is called."""
    import torch

    from fusion.inference.ensembles import CrossTokenizerMember
    from fusion.vocabulary.maps import build_map
    from fusion.vocabulary.tokenization import encode_all, prefix_id

    class OneToOne(CrossTokenizerMember):
        to_own: dict[int, int]

        def encode(self, texts: Sequence[Sequence[int]]) -> list[list[int]]:
            return [[self.to_own[i] for i in text] for text in texts]

    onto = build_map(
        "first_piece", member.vocabulary, pivot.vocabulary, encode_target=partial(encode_all, pivot.tokenizer)
    )

    def made(kind: type[CrossTokenizerMember], overlaps: int) -> Any:
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
    own = build_map("mined", pivot.vocabulary, member.vocabulary)
    one_to_one.to_own = {i: int(own[i]) for i in ids} | {prefix_id(pivot.tokenizer): prefix_id(member.tokenizer)}
    found = {TOKEN_BY_TOKEN: one_to_one, "the text so far, without overlaps": made(CrossTokenizerMember, 0)}
    for number in most:
        found[f"the text so far, overlaps of up to {number} token{'s' * (number > 1)}"] = made(
            CrossTokenizerMember, number
        )
    return found


def nats(reader: Any, model: Model, given: Sequence[Document]) -> np.ndarray:
    """float64[N] of the texts, which the reader reads in the model's tokens."""
    from fusion.inference.likelihood import document_nats
    from fusion.vocabulary.tokenization import prefix_id

    return document_nats(
        reader,
        [model.encode(document.text) for document in given],
        prefix=prefix_id(model.tokenizer),
        window=WINDOW,
        batch_tokens=WINDOW,
    )


def page(title: str, given: Sequence[Document], found: Mapping[str, np.ndarray], seconds: Mapping[str, float]) -> str:
    """Nats a byte by domain, and in how many texts each reader beats PackLLM's way."""
    domains = sorted({document.domain for document in given}, key=DOMAINS.index)
    of = {domain: np.array([document.domain == domain for document in given]) for domain in domains}
    sizes = np.array([len(document.text.encode()) for document in given])
    names = [f"{domain}, of {of[domain].sum()}" for domain in domains]
    lines = [f"| {title}, nats a byte | {' | '.join(domains)} | s |", f"| --- |{' ---: |' * (len(domains) + 1)}"]
    for name, one in found.items():
        values = " | ".join(f"{one[some].sum() / sizes[some].sum():.4f}" for some in of.values())
        lines.append(f"| {name} | {values} | {seconds[name]:.0f} |")
    lines += ["", f"| likelier than token by token | {' | '.join(names)} |", f"| --- |{' ---: |' * len(domains)}"]
    for name, one in found.items():
        if name != TOKEN_BY_TOKEN:
            better = one < found[TOKEN_BY_TOKEN]
            lines.append(f"| {name} | {' | '.join(str(better[some].sum()) for some in of.values())} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints two Markdown tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ensembles", description=__doc__)
    parser.add_argument("--pivot", default="SmolLM2-135M-Instruct")
    parser.add_argument("--member", default="Qwen2.5-Coder-0.5B-Instruct")
    parser.add_argument("--root", type=Path, default=Path("work"), help="folder that holds models/")
    parser.add_argument("--data-root", type=Path, default=Path("../shared/data/hub"))
    parser.add_argument("--texts", type=int, default=30, help="in all, as many of each domain")
    parser.add_argument("--bytes", type=int, default=400, help="how much of each text is read")
    parser.add_argument("--overlaps", type=int, nargs="+", default=[MOST], help="last tokens that may be covered")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    options = parser.parse_args(arguments)
    from fusion.inference.ensembles import PrefixCachedEnsemble

    try:
        pivot, member = (Model(name, options.root, options.dtype) for name in (options.pivot, options.member))
        given = texts(options.data_root, options.texts, options.bytes)
        asked: dict[str, tuple[Any, Model]] = {
            f"{one.name} alone": (PrefixCachedEnsemble([(one.reader, 1)]), one) for one in (pivot, member)
        }
        for name, translated in translators(pivot, member, given, options.overlaps).items():
            asked[name] = PrefixCachedEnsemble([(pivot.reader, 0.5)], [(translated, 0.5)]), pivot
        found, seconds = {}, {}
        for name, (reader, model) in asked.items():
            notify(name)
            started = time.perf_counter()
            found[name] = nats(reader, model, given)
            seconds[name] = time.perf_counter() - started
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    print(page(f"{pivot.name} with {member.name}", given, found, seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
