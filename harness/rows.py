"""Rows: pieces packed for training, with what the target is to learn at each of their positions.

Fusing is a pure function of stored extractions and maps, run here in the data loader; nothing dense is built.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fusion.errors import UserError
from fusion.fuse import Source, fuse_row
from fusion.targets import Reading, Switches
from fusion.vocabulary import Vocabulary, encode, prefix_id
from harness.corpus import Pieces
from harness.extraction import Extraction

IGNORED = -100  # what the Trainer does not count as a token


def pack(lengths: Sequence[int], row_length: int, *, window: int = 512) -> list[list[int]]:
    """Pieces of `lengths` positions in rows of at most `row_length`, each row a list of piece indices.

    First fit, the longest first, within consecutive windows of pieces: little is wasted, and memory stays bounded. The
    longest piece must fit.
    """
    rows: list[list[int]] = []
    for start in range(0, len(lengths), window):
        open_rows: list[tuple[int, list[int]]] = []  # (positions left, pieces)
        for piece in sorted(range(start, min(start + window, len(lengths))), key=lambda i: (-lengths[i], i)):
            for slot, (left, members) in enumerate(open_rows):
                if lengths[piece] <= left:
                    members.append(piece)
                    open_rows[slot] = (left - lengths[piece], members)
                    break
            else:
                open_rows.append((row_length - lengths[piece], [piece]))
        rows += [sorted(members) for _, members in open_rows]
    return rows


@dataclass(frozen=True)
class FusionData:
    """Everything the fused distributions are computed from."""

    target: str
    sources: list[Source]
    extractions: dict[str, Extraction]  # by name, the target's own included where it is needed
    switches: Switches
    k: int | None = None

    def readings(self, piece: int) -> dict[str, Reading]:
        """What every model says about a piece."""
        found = {name: extraction.reading(piece) for name, extraction in self.extractions.items()}
        return found if self.k is None else {name: reading.top(self.k) for name, reading in found.items()}


class Rows(Dataset[dict[str, np.ndarray]]):
    """Rows of `row_length` positions, ready for `fusion.heads.fused_forward`.

    Every piece is `[prefix] + tokens`; its last position's gold token is the end of text where the piece is its
    document's last, and none otherwise. Without `fusion` the same rows are plain continued training. Beyond the last
    row there are empty ones, which hold nothing to learn: where ranks share rows unevenly, they make up the number.

    Raises:
        UserError: a piece does not fit a row.
    """

    def __init__(
        self,
        pieces: Pieces,
        tokenizer: Any,
        vocabulary: Vocabulary,
        row_length: int,
        fusion: FusionData | None = None,
    ) -> None:
        self._pieces = pieces
        self._tokenizer = tokenizer
        self._prefix = prefix_id(tokenizer)
        self._eos = tokenizer.eos_token_id
        self._vocabulary = vocabulary
        self._fusion = fusion
        self.row_length = row_length
        self._lengths = lengths = list[int]()
        for piece in range(len(pieces)):
            ids = encode(tokenizer, pieces.text(piece))
            if max(ids, default=0) >= len(vocabulary):
                raise UserError(
                    f"the target's tokenizer gives token {max(ids)}, but its config.json has a vocabulary of "
                    f"{len(vocabulary)}: put the model's own tokenizer.json beside its weights."
                )
            lengths.append(1 + len(ids))
        longest = int(np.argmax(lengths))
        if lengths[longest] > row_length:
            raise UserError(
                f"{pieces.name(longest)} is {lengths[longest]} tokens and does not fit a row of {row_length}: "
                "lower pieces.max_bytes or raise training.row_length."
            )
        self.rows = pack(lengths, row_length)
        ends_text = sum(bool(last) for last in pieces.last) if self._eos is not None else 0
        self.n_tokens = sum(lengths) - len(lengths) + ends_text

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self[index] for index in range(len(self)))  # without it an empty row would follow for ever

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One row: input_ids, position_ids, labels [row_length] and, with fusion, ids, p [N, K], tail, weight [N]."""
        members, data = self.rows[index] if index < len(self.rows) else [], self._fusion
        if data is None:
            tokens = [np.array([self._prefix, *encode(self._tokenizer, self._pieces.text(p))]) for p in members]
            fused = {}
        else:
            readings = [data.readings(p) for p in members]
            # Encoding the text takes longer than fusing: the target's own reading holds what it gave.
            tokens = [piece[data.target].tokens for piece in readings]
            if [len(t) for t in tokens] != [self._lengths[p] for p in members]:
                raise UserError(
                    f"the extraction of {data.target} was made with another tokenizer than the target's own."
                )
            fused = self._fused(data, members, readings)
        n = sum(len(t) for t in tokens)
        left = self.row_length - n
        gold = [self._gold(t, bool(self._pieces.last[p])) for t, p in zip(tokens, members, strict=True)]
        # The padding at the end is a piece of its own, which no other piece sees.
        return {
            "input_ids": np.concatenate([*tokens, np.full(left, self._prefix)]),
            "position_ids": np.concatenate([*(np.arange(len(t)) for t in tokens), np.arange(left)]),
            "labels": np.concatenate([*gold, np.full(left, IGNORED)]),
            **fused,
        }

    def _gold(self, tokens: np.ndarray, last: bool) -> np.ndarray:
        end = self._eos if last and self._eos is not None else IGNORED
        return np.concatenate([tokens[1:], [end]])

    def _fused(self, data: FusionData, members: list[int], readings: list[dict[str, Reading]]) -> dict[str, np.ndarray]:
        if not members:
            none = np.zeros(0, np.float32)
            return {
                "fused_ids": np.zeros((0, 1), np.int32),
                "fused_p": none[:, None],
                "fused_tail": none,
                "fusion_weight": none,
            }
        fused = fuse_row(
            readings,
            [int(self._pieces.n_bytes[p]) for p in members],
            target=data.target,
            sources=data.sources,
            target_vocabulary=self._vocabulary,
            switches=data.switches,
        )
        return {
            "fused_ids": fused.targets.ids,
            "fused_p": fused.targets.p,
            "fused_tail": fused.targets.tail,
            "fusion_weight": fused.fusion_weight,
        }


def collate(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Rows stacked to [B, L], fused entries padded to the widest [B, L, K] with ids of -1."""
    batch = {
        name: torch.from_numpy(np.stack([r[name] for r in rows]).astype(np.int64))
        for name in ("input_ids", "position_ids", "labels")
    }
    if "fused_ids" in rows[0]:
        size, length = batch["labels"].shape
        width = max(r["fused_ids"].shape[1] for r in rows)
        ids = np.full((size, length, width), -1, np.int64)
        p = np.zeros((size, length, width), np.float32)
        tail, weight = np.zeros((size, length), np.float32), np.zeros((size, length), np.float32)
        for i, row in enumerate(rows):
            n, k = row["fused_ids"].shape
            ids[i, :n, :k], p[i, :n, :k] = row["fused_ids"], row["fused_p"]
            tail[i, :n], weight[i, :n] = row["fused_tail"], row["fusion_weight"]
        batch |= {
            "fused_ids": torch.from_numpy(ids),
            "fused_p": torch.from_numpy(p),
            "fused_tail": torch.from_numpy(tail),
            "fusion_weight": torch.from_numpy(weight),
        }
    return batch
