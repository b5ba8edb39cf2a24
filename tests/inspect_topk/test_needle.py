"""Needle forensics: forced blocks, and on a real model where its answers come from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hysparse_cli.inspect_topk import inspect_topk
from hysparse_cli.inspect_topk.reading import read
from hysparse_cli.inspect_topk.result import Inspection
from hysparse_cli.model.attention import LayerCall
from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.model.loading import load_tokenizer
from hysparse_cli.model.modeling import make_sparse
from hysparse_cli.model.state import ForwardOptions, Variation
from hysparse_cli.recipe import ConvertOptions, InspectOptions
from hysparse_cli.texts.calibration import calibration_text
from hysparse_cli.texts.documents import read_documents
from tests.conftest import TINY_WORDS, Hysparse
from tests.model import tiny

SPEC = HysparseSpec("FSSF", block_size=8, top_k_tokens=16, window_tokens=8)


def forward(
    model: Any, ids: torch.Tensor, variation: Variation | None = None, **given: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits, and the lists that layer 1 reads."""
    lists: list[Any] = []

    def observer(call: LayerCall) -> torch.Tensor:
        if call.layer == 1:
            lists.append(call.block_idx)
        return call.attend()

    with torch.no_grad():
        options = ForwardOptions(observer=observer, variation=variation)
        logits = model(ids, hysparse=options, **given).logits
    return logits, lists[0]


@pytest.mark.parametrize("padded", [False, True])
def test_a_forced_block_is_in_every_list_of_who_sees_it(padded: bool) -> None:
    model: Any = tiny.dense_model("qwen3")
    make_sparse(model, SPEC)
    sparse = frozenset(SPEC.layers.sparse_layers)
    ids = torch.arange(3, 73)[None]
    first = 5 if padded else 0
    given = {"attention_mask": (torch.arange(70) >= first).long()[None]} if padded else {}
    plain, lists = forward(model, ids, **given)
    forced = Variation(SPEC, sparse, True, {0: (4,)})
    logits, more = forward(model, ids, forced, **given)
    begin = first + 4 * 8
    for t in range(70):
        for group in range(lists.shape[2]):
            before, after = lists[0, t, group].tolist(), more[0, t, group].tolist()
            added = {4} if t >= begin else set()
            assert {*after} - {-1} == ({*before} - {-1}) | added
            assert len([n for n in after if n >= 0]) == len({*after} - {-1})
    assert torch.equal(logits[:, first:begin], plain[:, first:begin])
    assert not torch.allclose(logits[:, begin:], plain[:, begin:])
    elsewhere = Variation(SPEC, sparse, True, {3: (4,)})  # a full layer that serves nobody
    same, _ = forward(model, ids, elsewhere, **given)
    assert torch.equal(same, plain)


def reading(tokenizer: Any, **options: Any) -> Any:
    return read(tokenizer, InspectOptions(**options), 512)


def test_needle_and_answer_are_found_token_by_token(tiny_original: Path) -> None:
    tokenizer = load_tokenizer(tiny_original)
    words = [f"w{i}" for i in range(30)]
    found = reading(tokenizer, prompt=" ".join(words), needle="w7 w8 w9", answer="w28 w29")
    assert found.asked.needle == (7, 10) and found.asked.answer == (28, 30)
    assert found.asked.queries == found.looking == [27, 28]
    added = reading(tokenizer, prompt=" ".join(words[:28]), needle="w7", answer=" w28 w29")
    assert added.ids == found.ids and added.asked.answer == (28, 30)
    made_up = reading(tokenizer, max_tokens=256)
    answers = calibration_text(
        tokenizer, data=None, text_field="", tokens=256, sequence_tokens=256, seed=0
    )
    assert made_up.ids == answers.rows[0].tolist()
    assert made_up.looking == [i - 1 for i, told in enumerate(answers.answers[0]) if told]
    following = reading(tokenizer, prompt=" ".join(words), needle="w29")
    assert following.asked.answer == (30, 30) and following.asked.queries == [29]


@pytest.fixture(scope="module")
def haystack(
    novels_25m: Path, gutenberg_dev: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A page of a book with two facts, one of them asked for at its end."""
    book = next(read_documents(gutenberg_dev))[100_000:101_500]
    cuts = [book.index(" ", place) for place in (400, 900)]
    fact = " One of the special magic numbers for {} is: {}."
    text = book[: cuts[0]] + fact.format("wall-monkey", 8922960) + book[cuts[0] : cuts[1]]
    text += fact.format("oak-lamp", 1730455) + book[cuts[1] :]
    text += (
        " What is the special magic number for wall-monkey mentioned in the provided text? The "
        "special magic number for wall-monkey mentioned in the provided text is: "
    )
    path = tmp_path_factory.mktemp("needle") / "haystack.txt"
    path.write_text(text, encoding="utf-8")
    return path


def look_for_it(model: Path, haystack: Path, pattern: str) -> Inspection:
    options = InspectOptions(
        data=str(haystack),
        needle="One of the special magic numbers for wall-monkey is: 8922960.",
        answer="8922960",
        device="cpu",
    )
    sizes = {"block_size": 32, "top_k_tokens": 128, "window_tokens": 64}
    return inspect_topk(str(model), options, ConvertOptions(pattern=pattern, **sizes))


def answers(found: Inspection) -> dict[tuple[str, tuple[int, ...]], float]:
    assert found.needle is not None
    return {
        (effect.attention, tuple(effect.forced_into)): effect.probability or 0.0
        for effect in found.needle.effects
    }


def test_layer_8_does_not_select_what_9_and_10_look_for(novels_25m: Path, haystack: Path) -> None:
    found = look_for_it(novels_25m, haystack, "FSSSFSSSFSSF")
    needle = found.needle
    assert needle is not None and needle.text.strip().endswith("8922960.")
    value = needle.blocks[-1].layers  # the block that holds the number
    assert max(layer.top_head_mass for layer in value[9:11]) > 0.8
    assert value[9].selected_for_top_head is not None and value[9].selected_for_top_head < 0.5
    assert value[8].selected == value[9].selected == value[10].selected
    assert value[11].selected is None and value[8].gate is None
    chance = answers(found)
    assert chance["full attention", ()] > 0.9
    assert chance["own keys", ()] < 0.1
    assert chance["own keys", (8,)] > 0.9 and chance["own keys", (0, 4, 8)] > 0.9
    assert chance["own keys", (0,)] < 0.1 and chance["own keys", (4,)] < 0.1


def test_a_layout_that_keeps_9_and_10_full_needs_no_help(novels_25m: Path, haystack: Path) -> None:
    chance = answers(look_for_it(novels_25m, haystack, "FSSSSSSSSFFF"))
    assert chance["full attention", ()] > 0.9 and chance["own keys", ()] > 0.9


def test_a_converted_models_needle_says_what_its_branches_read(
    hysparse: Hysparse, tiny_converted: Path
) -> None:
    words = " ".join(f"w{11 * i % 61}" for i in range(60))
    args = ("inspect-topk", tiny_converted, "--prompt", words, "--json")
    needle = json.loads(hysparse(*args, "--needle", "w33 w44").stdout)["needle"]
    assert needle["answer"] == "" and needle["queries"] == [59]
    (block,) = needle["blocks"]
    assert block["block"] == 0 and [layer["layer"] for layer in block["layers"]] == [0, 1, 2, 3]
    for layer in block["layers"]:
        sparse = layer["layer"] in (1, 2)
        assert (layer["gate"] == 0.5) is sparse and (layer["read"] is not None) is sparse
        if sparse and layer["selected"] == 0:
            assert layer["read"] == 0
        if sparse and layer["selected"] == 1:
            assert 0 < layer["read"] <= layer["top_head_read"] <= 0.5
    names = [(effect["attention"], effect["forced_into"]) for effect in needle["effects"]]
    assert names == [
        ("full attention", []),
        *(("own keys", into) for into in ([], [0])),
        *(("as it is", into) for into in ([], [0])),
    ]
    assert all(effect["probability"] is None for effect in needle["effects"])


def test_a_planned_layout_runs_as_convert_would_write_it(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "convert: {pattern: FSFS, last_layer_full: false, block_size: 8, top_k_tokens: 16,\n"
        "  window_tokens: 8, init: copy, calibration_tokens: 512,\n"
        "  calibration_sequence_tokens: 256}\n"
    )
    out = tmp_path / "out"
    assert hysparse("convert", tiny_original, out, "--recipe", recipe).exit_code == 0
    words = [f"w{11 * i % 61}" for i in range(60)]
    args = ("--prompt", " ".join(words), "--needle", words[30], "--answer", " ".join(words[-2:]))
    effects = []
    for model in (tiny_original, out):
        run = hysparse("inspect-topk", model, "--recipe", recipe, *args, "--json")
        assert run.exit_code == 0, run.stderr
        found = json.loads(run.stdout)["needle"]["effects"]
        effects.append({(e["attention"], tuple(e["forced_into"])): e for e in found})
    planned, written = effects
    everywhere = [("own keys", ()), ("own keys", (0, 2)), ("as it is", ()), ("as it is", (0, 2))]
    assert [*planned] == [
        ("full attention", ()),
        *everywhere[:2],
        *(("own keys", (server,)) for server in (0, 2)),
        *everywhere[2:],
    ]
    assert [*written] == [
        ("full attention", ()),
        *everywhere,
        *(("as it is", (server,)) for server in (0, 2)),
    ]
    for way in everywhere:
        assert planned[way]["nats"] == pytest.approx(written[way]["nats"], abs=1e-4)
    assert planned["own keys", ()]["nats"] != planned["own keys", (0, 2)]["nats"]

    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(tiny_original)
    ids = torch.tensor([[TINY_WORDS.index(word) for word in words]])
    with torch.no_grad():
        log_p = model(ids).logits[0].log_softmax(-1)
    of_answer = log_p[[57, 58], ids[0, 58:]]
    dense = planned["full attention", ()]
    assert dense["nats"] == pytest.approx(-float(of_answer.mean()), rel=1e-4)
    assert dense["probability"] == pytest.approx(float(of_answer.sum().exp()), rel=1e-3)
    assert dense["next_token"] == TINY_WORDS[int(log_p[57].argmax())]
    assert dense["next_probability"] == pytest.approx(float(log_p[57].exp().max()), rel=1e-4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", "w1 w2 w3", "--needle", "w9"], "'w9' is not in the text"),
        (["--prompt", "w1 w2 w3", "--answer", "w3"], "give --needle too"),
        (["--needle", "w1"], "give --prompt or --data"),
        (["--prompt", "w1 w2 w3", "--needle", "w3", "--answer", "w3"], "before the answer"),
        (["--prompt", "w1 " * 90, "--needle", "w1", "--max-tokens", "50"], "cuts the answer off"),
    ],
)
def test_needles_that_cannot_be_looked_for_are_one_line(
    hysparse: Hysparse, tiny_converted: Path, args: list[str], message: str
) -> None:
    run = hysparse("inspect-topk", tiny_converted, *args)
    assert run.exit_code == 3 and run.stdout == ""
    assert message in run.stderr and run.stderr.count("\n") == 1
