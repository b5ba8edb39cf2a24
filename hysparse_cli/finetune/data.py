"""Packs documents into rows of a fixed length, whose order a saved state can go on from."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.recipe import FinetuneOptions
from hysparse_cli.texts.corpus import Corpus, Position, corpus_of
from hysparse_cli.texts.documents.pieces import PIECE_CHARACTERS, Piece, encode_piece

IGNORED = -100
DOCUMENTS_AT_ONCE = 16  # a fast tokenizer reads them on all cores

Row = dict[str, Tensor]


class PackedRows:
    """Endless rows of ``sequence_tokens`` tokens, filled with one document after the other.

    ``position_ids`` restart at each document, which is how models tell packed documents apart, and
    where a document goes on in the next row. ``labels`` are the tokens themselves, ignored at each
    restart, since nothing before it is seen. A document ends with the tokenizer's end token, if it
    has one. After the last document comes the first again.

    A document may be of any length: it is read in pieces (documents/pieces.py), which rows don't
    show. ``corpus`` is what the options name, where it is open already.

    Rows come at random out of a buffer of ``shuffle_rows``; with 1 they come in the data's order.

    Raises: as ``corpus_of``; UnreadableInput while iterating, where the data is unreadable or holds
        no text.
    """

    def __init__(self, options: FinetuneOptions, tokenizer: Any, corpus: Corpus | None = None):
        self.corpus = corpus_of(options) if corpus is None else corpus
        self.tokenizer = tokenizer
        self.sequence_tokens, self.shuffle_rows = options.sequence_tokens, options.shuffle_rows
        self._generator = torch.Generator().manual_seed(options.seed)
        self._buffer: list[Row] = []
        # where the next row that is read begins: a piece, None is the first, and a token of it
        self._place: Position | None = None
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
            "document": self._place,
            "token": self._token,
            "buffer": list(self._buffer),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._place, self._token = state["document"], state["token"]
        self._buffer = list(state["buffer"])
        self._generator.set_state(state["generator"])

    def _in_order(self) -> Iterator[Row]:
        ids: list[int] = []
        positions: list[int] = []
        position = 0
        while True:
            from_the_start = self._place is None
            found = False
            for place, piece, tokens in self._encoded(self.corpus.pieces(self._place)):
                if not piece.before or not ids:
                    position = 0
                begin, self._token = self._token, 0
                found = found or bool(tokens)
                while begin < len(tokens):
                    taken = tokens[begin : begin + self.sequence_tokens - len(ids)]
                    begin += len(taken)
                    ids += taken
                    positions += range(position, position + len(taken))
                    position += len(taken)
                    if len(ids) == self.sequence_tokens:
                        self._place, self._token = place, begin
                        yield _row(ids, positions)
                        self._token = position = 0
                        ids, positions = [], []
            if from_the_start and not found:
                raise self.corpus.bad_rows.no_text(self.corpus.name)
            self._place, self._token = None, 0

    def _encoded(
        self, pieces: Iterable[tuple[Position | None, Piece]]
    ) -> Iterator[tuple[Position | None, Piece, list[int]]]:
        end = self.tokenizer.eos_token_id
        for group in _groups(pieces):
            whole = [piece.text for _, piece in group if piece.is_whole]
            encoded = iter(self.tokenizer(whole, verbose=False)["input_ids"] if whole else ())
            for place, piece in group:
                ids = next(encoded) if piece.is_whole else encode_piece(self.tokenizer, piece)
                ended = bool(piece.after) or end is None or ids[-1:] == [end]
                yield place, piece, ids if ended else [*ids, end]


def rows_of_step(options: FinetuneOptions, num_processes: int) -> int:
    """How many rows a step reads, in all processes together.

    Raises: InvalidRecipe where they can't be shared out evenly.
    """
    size = options.sequence_parallel_size
    if num_processes % size:
        raise InvalidRecipe(
            f"finetune.sequence_parallel_size is {size}, but the run has {num_processes} "
            f"process{'es' * (num_processes > 1)}: make their number a multiple of it "
            "(--nproc-per-node)"
        )
    rows = options.batch_size * options.gradient_accumulation
    data_parallel_size = num_processes // size
    if rows % data_parallel_size:
        who = f"{data_parallel_size} processes"
        if size > 1:
            who = f"{data_parallel_size} groups of {size} processes"
        raise InvalidRecipe(
            f"a step reads {rows} rows (finetune.batch_size {options.batch_size} x "
            f"gradient_accumulation {options.gradient_accumulation}), which {who} can't share "
            "evenly: make it a multiple of them"
        )
    return rows


def own_batches(step: list[Row], rank: int, size: int, batch_size: int) -> Iterator[Row]:
    """The rows of a step that one of ``size`` data-parallel ranks computes, (B, T) each.

    Rank r takes rows r, r + size, ...: so a step has the same rows whatever ``size`` is. They come
    in equal batches of at most ``batch_size``. Context-parallel processes are one rank together.
    """
    own = step[rank::size]
    largest = next(n for n in range(batch_size, 0, -1) if len(own) % n == 0)
    for begin in range(0, len(own), largest):
        rows = own[begin : begin + largest]
        yield {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _groups(
    pieces: Iterable[tuple[Position | None, Piece]],
) -> Iterator[list[tuple[Position | None, Piece]]]:
    """Pieces to be tokenized at once: as many as fill the cores, or as much as memory holds."""
    group, characters = [], 0
    for placed in pieces:
        group.append(placed)
        characters += len(placed[1].text)
        if len(group) == DOCUMENTS_AT_ONCE or characters >= PIECE_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _row(ids: list[int], positions: list[int]) -> Row:
    input_ids, position_ids = torch.tensor(ids), torch.tensor(positions)
    labels = input_ids.masked_fill(position_ids == 0, IGNORED)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
