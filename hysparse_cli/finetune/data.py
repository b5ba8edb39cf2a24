"""Documents packed into rows of a fixed length, in an order that a saved state can go on from."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from hysparse_cli.errors import UnreadableInput
from hysparse_cli.finetune.corpus import Position, corpus_of
from hysparse_cli.recipe import FinetuneOptions

IGNORED = -100
DOCUMENTS_AT_ONCE = 16  # a fast tokenizer reads them on all cores

Row = dict[str, Tensor]


class PackedRows:
    """Endless rows of ``sequence_tokens`` tokens, filled with one document after the other.

    ``position_ids`` restart at each document, which is how models tell packed documents apart, and
    where a document goes on in the next row. ``labels`` are the tokens themselves, ignored at each
    restart, since nothing before it is seen. A document ends with the tokenizer's end token, if it
    has one. After the last document comes the first again.

    Rows come at random out of a buffer of ``shuffle_rows``; with 1 they come in the data's order.

    Raises: as ``corpus_of``; UnreadableInput while iterating, where the data is unreadable or holds
        no text.
    """

    def __init__(self, options: FinetuneOptions, tokenizer: Any):
        self.corpus = corpus_of(options)
        self.tokenizer = tokenizer
        self.sequence_tokens, self.shuffle_rows = options.sequence_tokens, options.shuffle_rows
        self._generator = torch.Generator().manual_seed(options.seed)
        self._buffer: list[Row] = []
        # where the next row that is read begins: a document, None is the first, and a token of it
        self._document: Position | None = None
        self._token = 0

    def __iter__(self) -> Iterator[Row]:
        rows = self._in_order()
        while True:
            while len(self._buffer) < self.shuffle_rows:
                self._buffer.append(next(rows))
            pick = int(torch.randint(len(self._buffer), (), generator=self._generator))
            self._buffer[pick], self._buffer[-1] = self._buffer[-1], self._buffer[pick]
            yield self._buffer.pop()

    def state_dict(self) -> dict[str, Any]:
        """Where the rows go on, the buffer included."""
        return {
            "document": self._document,
            "token": self._token,
            "buffer": list(self._buffer),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._document, self._token = state["document"], state["token"]
        self._buffer = list(state["buffer"])
        self._generator.set_state(state["generator"])

    def _in_order(self) -> Iterator[Row]:
        ids: list[int] = []
        positions: list[int] = []
        while True:
            from_the_start = self._document is None
            found = False
            for document, tokens in self._encoded(self.corpus.documents(self._document)):
                begin, self._token = self._token, 0
                found = found or bool(tokens)
                while begin < len(tokens):
                    taken = tokens[begin : begin + self.sequence_tokens - len(ids)]
                    begin += len(taken)
                    ids += taken
                    positions += range(len(taken))
                    if len(ids) == self.sequence_tokens:
                        self._document, self._token = document, begin
                        yield _row(ids, positions)
                        self._token = 0
                        ids, positions = [], []
            if from_the_start and not found:
                raise UnreadableInput(f"data {self.corpus.name} holds no text")
            self._document, self._token = None, 0

    def _encoded(
        self, documents: Iterable[tuple[Position | None, str]]
    ) -> Iterator[tuple[Position | None, list[int]]]:
        end, stream = self.tokenizer.eos_token_id, iter(documents)
        while group := list(islice(stream, DOCUMENTS_AT_ONCE)):
            encoded = self.tokenizer([text for _, text in group], verbose=False)["input_ids"]
            for (document, _), ids in zip(group, encoded, strict=True):
                yield document, ids if end is None or ids[-1:] == [end] else [*ids, end]


def _row(ids: list[int], positions: list[int]) -> Row:
    input_ids, position_ids = torch.tensor(ids), torch.tensor(positions)
    labels = input_ids.masked_fill(position_ids == 0, IGNORED)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
