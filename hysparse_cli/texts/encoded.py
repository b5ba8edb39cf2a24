"""Tokenizes text, and keeps which characters each token stands for."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hysparse_cli.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """``ids`` with the character range [begin, end) of each.

    The first ``num_special`` are the tokenizer's own; none of its own follow the text.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    num_special: int

    def tokens_of(self, begin: int, end: int) -> tuple[int, int]:
        """The token range [first, last) that holds the characters [begin, end)."""
        touched = [
            i
            for i in range(self.num_special, len(self.ids))
            if self.offsets[i][0] < end and self.offsets[i][1] > begin
        ]
        return touched[0], touched[-1] + 1

    def content_tokens_before(self, character: int) -> int:
        """How many tokens of text end at or before ``character``."""
        return sum(end <= character for _, end in self.offsets[self.num_special :])

    def without_head(self, tokens: int) -> list[int]:
        """The ids without the first ``tokens`` tokens of text; special tokens stay."""
        return self.ids[: self.num_special] + self.ids[self.num_special + tokens :]


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> Encoded:
    """``text`` as the tokenizer reads it, leading special tokens included, trailing ones not.

    Raises: UnsupportedModel where the tokenizer gives no character offsets.
    """
    if not tokenizer.is_fast:
        raise UnsupportedModel(
            f"tokenizer {type(tokenizer).__name__} gives no character offsets, which retrieval "
            "needs: save the checkpoint with its fast tokenizer"
        )
    output = tokenizer(
        text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False
    )
    ids, offsets, special = (
        output["input_ids"],
        output["offset_mapping"],
        output["special_tokens_mask"],
    )
    num_special = special.index(0) if 0 in special else len(ids)
    end = len(ids)
    while end > num_special and special[end - 1]:
        end -= 1
    return Encoded(ids[:end], offsets[:end], num_special)
