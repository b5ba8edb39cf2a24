"""RULER's families: exact lengths, answers that are there, scores as RULER's."""

import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from hysparse_cli.errors import InvalidRecipe, UnsupportedModel
from hysparse_cli.evaluate.scoring import count_found
from hysparse_cli.evaluate.statistics import Sample
from hysparse_cli.model.loading import load
from hysparse_cli.recipe import EvalOptions
from hysparse_cli.recipe.evaluate import FAMILIES, Family
from hysparse_cli.texts.documents import read_documents
from hysparse_cli.texts.facts import Task, write_context
from hysparse_cli.texts.ruler import Prompt, write_prompt
from tests.texts.test_facts import FILLERS, tokenizer

__all__ = ["tokenizer"]  # a fixture

SHORT, LONG = 1700, 4096


def _text(prompt: Prompt, tokenizer: Any) -> str:
    return str(tokenizer.decode(prompt.input_ids, skip_special_tokens=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("filler", FILLERS)
@pytest.mark.parametrize("tokens", [SHORT, LONG])
def test_prompt_and_room_fill_the_context_and_the_answers_are_in_it(
    tokenizer: Any, family: Family, filler: str, tokens: int
) -> None:
    lengths = set()
    for index in range(2):
        prompt = write_prompt(Task(family, tokens), index, tokenizer, FILLERS[filler])
        text = _text(prompt, tokenizer)
        assert len(prompt.input_ids) + prompt.max_new_tokens == tokens
        assert prompt.input_ids[0] == tokenizer("a")["input_ids"][0]
        assert all(answer in text for answer in prompt.answers)
        assert len(set(prompt.answers)) == len(prompt.answers)
        assert text.endswith((" is:", " are:"))
        lengths.add(len(prompt.input_ids))
    assert len(lengths) == 1  # so that they share a batch


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_follows_from_the_seed(tokenizer: Any, family: Family) -> None:
    task = Task(family, SHORT)
    first = write_prompt(task, 0, tokenizer)
    assert write_prompt(task, 0, tokenizer) == first
    assert write_prompt(task, 1, tokenizer) != first
    assert write_prompt(task, 0, tokenizer, seed=1) != first


@pytest.mark.parametrize(
    ("family", "facts", "asked"),
    [("single-needle", 1, 1), ("multi-key", 6, 1), ("multi-value", 3, 3), ("multi-query", 6, 3)],
)
def test_needles_are_planted_and_asked_for(
    tokenizer: Any, family: Family, facts: int, asked: int
) -> None:
    prompt = write_prompt(Task(family, 1200, facts=6, questions=3), 0, tokenizer)
    text, _, question = _text(prompt, tokenizer).partition(" What ")
    planted = dict(_pairs(text))
    keys = {key for key in planted.values() if key in question}
    assert len(planted) == facts and len(prompt.answers) == asked
    assert keys == {planted[answer] for answer in prompt.answers}


def _pairs(text: str) -> list[tuple[str, str]]:
    found = re.findall(r"magic numbers for (\S+-\S+) is: (\d{7})\.", text)
    return [(value, key) for key, value in found]


def test_variables_are_assigned_in_a_chain_from_the_value(tokenizer: Any) -> None:
    prompt = write_prompt(Task("variable-tracking", SHORT), 0, tokenizer)
    text = _text(prompt, tokenizer)
    chain = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text)
    assert tuple(name for name, _ in chain) == prompt.answers
    value, *names = [source for _, source in chain]
    assert tuple(names) == prompt.answers[:-1]
    assert f"the value {value} in" in text


@pytest.mark.parametrize("tokens", [1300, SHORT, LONG])
def test_common_words_are_ten_times_as_common(tokenizer: Any, tokens: int) -> None:
    prompt = write_prompt(Task("common-words", tokens), 0, tokenizer)
    counts = _listed(_text(prompt, tokenizer))
    common, rare = set(prompt.answers), set(counts) - set(prompt.answers)
    (often,) = {counts[word] for word in common}
    (seldom,) = {counts[word] for word in rare}
    assert len(common) == 10 <= len(rare) and often == 10 * seldom


def test_frequent_words_are_the_three_most_frequent(tokenizer: Any) -> None:
    prompt = write_prompt(Task("frequent-words", SHORT), 0, tokenizer)
    ranked = _listed(_text(prompt, tokenizer)).most_common(4)
    assert tuple(word for word, _ in ranked[:3]) == prompt.answers
    assert len({count for _, count in ranked}) == 4


def _listed(text: str) -> Counter[str]:
    """The pairs of words between the announcement and the question."""
    return Counter(re.findall(r"[a-z]+-[a-z]+", text.split("more often than")[1]))


@pytest.mark.parametrize("family", ["common-words", "frequent-words"])
def test_lists_fill_most_of_a_long_context(tokenizer: Any, family: Family) -> None:
    prompt = write_prompt(Task(family, 16_384), 0, tokenizer)
    text = _text(prompt, tokenizer)
    assert len(text.split("Below is")[0]) < 0.1 * len(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_does_not_fit_is_refused_at_once(tokenizer: Any, family: Family) -> None:
    begun = time.monotonic()
    with pytest.raises(InvalidRecipe, match=f"50 is too short for the {family} form") as refusal:
        write_prompt(Task(family, 50), 0, tokenizer)
    assert time.monotonic() - begun < 2
    enough = int(re.findall(r"at least about (\d+)", str(refusal.value))[0])
    prompt = write_prompt(Task(family, enough), 0, tokenizer)
    assert len(prompt.input_ids) + prompt.max_new_tokens == enough


def test_a_tokenizer_that_reads_nothing_is_refused() -> None:
    blind = Tokenizer(models.WordLevel({"word": 0}))
    blind.normalizer = normalizers.Replace(Regex(r"[\s\S]"), "")
    nothing: Any = PreTrainedTokenizerFast(tokenizer_object=blind)  # type: ignore[no-untyped-call]
    with pytest.raises(UnsupportedModel, match="makes next to no tokens"):
        write_prompt(Task("single-needle", 512), 0, nothing)
    with pytest.raises(UnsupportedModel, match="makes next to no tokens"):
        write_context(Task("recall", 512), 0, nothing)


def test_answers_count_wherever_they_appear_and_capitals_do_not() -> None:
    prompt = Prompt([1], ("Oak-lion", "1234567"), 4)
    assert prompt.found_in("it is OAK-LION, or 1234567?") == 2
    assert prompt.found_in("oak-lion") == 1
    assert prompt.found_in("oak lion 123456") == 0


def test_a_model_that_retrieves_finds_needles(novels_25m: Path, gutenberg_dev: Path) -> None:
    loaded = load(str(novels_25m), dtype="float32", device="cpu")
    filler = [next(read_documents(gutenberg_dev))]
    tokenizer = loaded.tokenizer
    task = Task("multi-key", 512, facts=4)
    prompts = [write_prompt(task, index, tokenizer, filler) for index in range(2)]
    assert count_found(loaded.model, tokenizer, prompts) == Sample([1.0, 1.0], [1, 1])
    wrong = [Prompt(prompt.input_ids, ("0000000",), prompt.max_new_tokens) for prompt in prompts]
    assert count_found(loaded.model, tokenizer, wrong) == Sample([0.0, 0.0], [1, 1])


def test_answers_are_greedy_whatever_the_checkpoint_prefers(tiny_original: Path) -> None:
    loaded = load(str(tiny_original), dtype="float32", device="cpu")
    ids = list(range(5, 25))
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
    written = loaded.tokenizer.decode(ids[20:])
    prompt = Prompt(ids[:20], (written, "w1 w1 w1 w1"), 3)
    prefers = {"do_sample": True, "temperature": 9.0, "top_k": 3, "repetition_penalty": 9.0}
    loaded.model.generation_config.update(**prefers)
    assert count_found(loaded.model, loaded.tokenizer, [prompt]) == Sample([1.0], [2])


def test_ruler_names_all_families_once() -> None:
    forms = EvalOptions(retrieval_forms=["recall", "ruler", "multi-key"]).retrieval_forms
    assert forms == ["recall", *FAMILIES]
