"""What inspect-topk prints and writes: one set of numbers in every form."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from rich.console import Console

from hysparse_cli.inspect_topk.needle import FULL, OWN_KEYS, Effect
from hysparse_cli.inspect_topk.plot import BARS, as_figure
from hysparse_cli.inspect_topk.result import Inspection
from hysparse_cli.inspect_topk.run import inspect_topk
from hysparse_cli.inspect_topk.table import as_table
from hysparse_cli.recipe import ConvertOptions, InspectOptions
from hysparse_cli.texts.words import WORDS
from tests.conftest import Hysparse

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden.txt")
SCHEMA = json.loads((ROOT / "docs" / "schema" / "inspect-topk.json").read_text())
PROMPT = " ".join(f"w{11 * i % 61}" for i in range(90))
SIZES = ("--pattern", "FSSF", "--block-size", 8, "--top-k-tokens", 16, "--window-tokens", 8)
NEEDLE = ("--prompt", PROMPT, "--needle", "w33 w44", "--answer", "w60")


def test_the_terminal_shows_what_it_showed(
    hysparse: Hysparse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a change that is meant: rm golden.txt, run the test, and read what it has written."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(ROOT / "examples")
    pairs = zip(WORDS[::8], WORDS[3::8], strict=False)
    text = "".join(f"\n{key}: {value}" for key, value in pairs) + "\ncloud:"
    layout = ("--recipe", ROOT / "recipes" / "demo.yaml", "--device", "cpu")
    needle = ("--needle", "cloud: coast", "--answer", " coast")
    run = hysparse("inspect-topk", "demo-model", "--prompt", text, *layout, *needle)
    assert run.exit_code == 0, run.stderr
    lines = [line.rstrip() for line in run.stdout.splitlines()]
    assert max(map(len, lines)) <= 80 and len(lines) <= 24 and "…" not in run.stdout
    if not GOLDEN.exists():
        GOLDEN.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert lines == GOLDEN.read_text(encoding="utf-8").splitlines()


def drawn_at(width: int, found: Inspection) -> list[str]:
    console = Console(width=width, file=StringIO(), markup=False, emoji=False)
    console.print(as_table(found))
    assert isinstance(console.file, StringIO)
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    assert not any("…" in line for line in lines)
    return lines


def inspected(model: Path, pattern: str, **options: Any) -> Inspection:
    sizes = {"block_size": 8, "top_k_tokens": 16, "window_tokens": 8}
    planned = ConvertOptions(pattern=pattern, **sizes)
    return inspect_topk(str(model), InspectOptions(device="cpu", **options), planned)


@pytest.mark.parametrize("width", [40, 80, 140])
def test_each_full_layer_keeps_its_role_and_figures_at_any_width(
    width: int, tiny_original: Path
) -> None:
    found = inspected(tiny_original, "FSFS", prompt=PROMPT, needle="w33 w44", answer="w60")
    text = " ".join(" ".join(drawn_at(width, found)).split())
    for column in ("layer", "serves", "kept", "far", "all:", "answers:", "recall", "mass", "worst"):
        assert column in text
    for served in found.served_layers:
        for fit in (served.fit, served.answer_fit):  # each serves one layer: means are its own
            assert fit is not None
            for field in ("recall", "mass_selected", "mass_even", "mass_own_best"):
                assert f"{getattr(fit, field):.0%}" in text
            assert f"{fit.recall_random:.0%}" in text  # in the row of chance
        assert f"{served.layer}: {fit.mass_seen / fit.mass_own_best:.0%}" in text
    assert "Needle 'w33 w44' is" in text and "Sparse layer" in text and "--html PAGE" in text


def test_a_full_layer_more_is_a_row_more(tiny_original: Path) -> None:
    few, more = (
        drawn_at(80, inspected(tiny_original, pattern, prompt=PROMPT))
        for pattern in ("FSSS", "FSFS")
    )
    assert len(more) == len(few) + 1 <= 20


def test_the_terminal_names_the_page(tiny_original: Path) -> None:
    found = inspected(tiny_original, "FSSF", prompt="w1 w2", html="page.html")
    text = " ".join(drawn_at(80, found))
    assert "single layers: page.html" in text and "Up to 16 tokens every block is selected" in text
    found = inspected(tiny_original, "FSSF", prompt="w1 w2", png="x.png", npz="x.npz")
    assert "single layers: x.png, x.npz" in " ".join(drawn_at(80, found))


def effects(*next_tokens: str) -> list[Effect]:
    """Of full attention, of the selections as they are, and with the needle in all of them."""
    ways = ((FULL, []), (OWN_KEYS, []), (OWN_KEYS, [0]))
    return [
        Effect(attention, into, 0.5, 0.6, token, 0.7)
        for (attention, into), token in zip(ways, next_tokens, strict=True)
    ]


@pytest.mark.parametrize(
    ("next_tokens", "verdict"),
    [
        (("a", "a", "b"), "is still found"),
        (("a", "b", "a"), "is lost by the selection"),
        (("a", "b", "b"), "is lost even where it is selected"),
    ],
)
def test_the_verdict_goes_by_the_likeliest_token(
    next_tokens: tuple[str, ...], verdict: str, tiny_original: Path
) -> None:
    found = inspected(tiny_original, "FSSF", prompt=PROMPT, needle="w33 w44")
    assert found.needle is not None
    needle = replace(found.needle, effects=effects(*next_tokens))
    assert f"Needle 'w33 w44' {verdict}" in " ".join(drawn_at(140, replace(found, needle=needle)))


@pytest.mark.parametrize("kind", ["dense", "converted"])
@pytest.mark.parametrize(
    "text", [(), NEEDLE, ("--prompt", "w1 w2")], ids=["made up", "needle", "short"]
)
def test_json_is_as_its_schema_says(
    kind: str, text: tuple[str, ...], hysparse: Hysparse, tiny_original: Path, tiny_converted: Path
) -> None:
    model, layout = (tiny_converted, ()) if kind == "converted" else (tiny_original, SIZES)
    run = hysparse("inspect-topk", model, *layout, *text, "--max-tokens", 256, "--json")
    assert run.exit_code == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(found, SCHEMA)
    assert found["kind"] == kind
    short = text[-1:] == ("w1 w2",)
    assert (found["overlap"] is None) is short and (found["needle"] is None) is (text != NEEDLE)
    first, second = found["served_layers"]
    assert [first["layer"], second["layer"], first["server"]] == [1, 2, 0]
    assert (first["fit"] is None) is short and (first["branches"] is None) is (kind == "dense")
    assert (first["answer_fit"] is None) is short
    (full,) = found["full_layers"]
    assert (full["layer"], full["serves"], len(full["heads"])) == (0, [1, 2], 2)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found | {"more": 1}, SCHEMA)


def test_every_file_holds_the_numbers_of_the_json(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path
) -> None:
    paths = {kind: tmp_path / f"out.{kind}" for kind in ("html", "png", "npz", "lists")}
    files = [word for kind, path in paths.items() for word in (f"--{kind}", path)]
    run = hysparse("inspect-topk", tiny_original, *SIZES, *NEEDLE, *files, "--json")
    assert run.exit_code == 0, run.stderr
    found = json.loads(run.stdout)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        p.name for p in paths.values()
    )
    page = paths["html"].read_text()
    held = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert [json.loads(text) for text in held] == [found]
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    arrays = np.load(paths["npz"])
    (full,) = found["full_layers"]
    maps = np.array([head["map"] for head in full["heads"]], float)
    np.testing.assert_allclose(arrays["map.0"], maps, rtol=1e-4)
    for name in ("overlap", "answer_overlap"):
        np.testing.assert_allclose(arrays[name], found[name], rtol=1e-4)
    moves = [head["movement"] for head in full["heads"]]
    np.testing.assert_allclose(
        arrays["kept.0"], np.array([m["kept"] for m in moves], float), rtol=1e-4
    )
    np.testing.assert_allclose(arrays["distances.0"], [m["distances"] for m in moves], rtol=1e-4)
    selected = arrays["selected.0"]
    assert selected.shape == (90, 2, 2) and selected.dtype == np.int32


def test_the_picture_draws_the_numbers_of_the_json(tiny_original: Path) -> None:
    found = inspected(tiny_original, "FSSF", prompt=PROMPT)
    data = found.as_json()
    figure = as_figure(found)
    shown = [axes for axes in figure.axes if axes.axison and axes.get_label() != "<colorbar>"]
    overlap, served, picture = shown
    drawn = overlap.images[0].get_array()
    assert drawn is not None
    for a in range(4):
        for b in range(a + 1, 4):
            assert drawn[a, b] == pytest.approx(data["overlap"][a][b], rel=1e-4)
    for field, bars in zip(BARS, served.containers, strict=True):
        heights = [bar.get_height() for bar in bars]
        expected = [layer["fit"][field] for layer in data["served_layers"]]
        assert heights == pytest.approx(expected, rel=1e-4)
    (full,) = data["full_layers"]
    maps = np.array([head["map"] for head in full["heads"]], float)
    np.testing.assert_allclose(picture.images[0].get_array(), maps.mean(0), rtol=1e-4)


def in_chromium(page: Path) -> tuple[str, str]:
    """The page as drawn, and what the browser logged."""
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if browser is None:
        pytest.skip("needs Chromium, which is not installed")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    flags += [
        f"--user-data-dir={page.parent / 'profile'}",
        "--virtual-time-budget=3000",
        "--dump-dom",
    ]
    run = subprocess.run(
        [browser, *flags, page.as_uri()], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    return run.stdout, run.stderr


def test_the_page_opens_in_chromium_and_shows_the_numbers(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    run = hysparse("inspect-topk", tiny_original, *SIZES, *NEEDLE, "--html", page, "--json")
    found = json.loads(run.stdout)
    addresses = set(re.findall(r"[a-z]+://[^\"'`\s]+", page.read_text()))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which nothing is fetched from
    drawn, log = in_chromium(page)
    assert "CONSOLE" not in log
    cells = re.findall(r'data-a="(\d+)" data-b="(\d+)" data-v="([^"]+)"', drawn)
    expected = found["answer_overlap"]
    assert len(cells) == 6
    assert all(float(value) == expected[int(a)][int(b)] for a, b, value in cells)
    for field in ("recall", "mass_selected", "mass_seen", "mass_first_block"):
        shown = [float(v) for v in re.findall(rf'data-field="{field}" data-v="([^"]+)"', drawn)]
        assert shown == [layer["answer_fit"][field] for layer in found["served_layers"]]
    ranks = [float(v) for v in re.findall(r'data-field="rank" data-v="([^"]+)"', drawn)]
    assert ranks == [
        layer["rank"] for block in found["needle"]["blocks"] for layer in block["layers"]
    ]
    chances = [float(v) for v in re.findall(r'data-field="probability" data-v="([^"]+)"', drawn)]
    assert chances == [effect["probability"] for effect in found["needle"]["effects"]]


def test_a_page_with_an_error_would_be_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<script>console.error('no')</script>")
    assert "CONSOLE" in in_chromium(page)[1]


def test_text_cannot_break_out_of_the_page(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    words = "w1 </script><b>w2 " * 20
    assert (
        hysparse("inspect-topk", tiny_original, *SIZES, "--prompt", words, "--html", page).exit_code
        == 0
    )
    assert page.read_text().count("</script>") == 2


@pytest.mark.parametrize(
    ("args", "exit_code", "message"),
    [
        (["--prompt", "w1", "--data", "x.txt"], 3, "either --prompt or --data"),
        (["--prompt", " "], 7, "the prompt holds no text"),
        (["--data", "absent.txt"], 7, "absent.txt"),
        (["--html", "no/such/page.html"], 3, "html no/such/page.html can't be written"),
        (["--png", "no/x.png"], 3, "png no/x.png can't be written"),
        (["--pattern", "FSSF", "--ratio", "1:3"], 3, "both place the full layers"),
        (["--prompt", "w1", "--block-size", "8"], 3, "--block-size would plan one for a dense"),
        (["--max-tokens", "2,3"], 3, "not one length"),
    ],
)
def test_errors_are_one_line(
    hysparse: Hysparse, tiny_converted: Path, args: list[str], exit_code: int, message: str
) -> None:
    run = hysparse("inspect-topk", tiny_converted, *args)
    assert run.exit_code == exit_code
    assert message in run.stderr and run.stderr.count("\n") == 1 and run.stdout == ""


def test_a_folder_is_not_written_over(
    hysparse: Hysparse, tiny_converted: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    run = hysparse("inspect-topk", tiny_converted, "--prompt", PROMPT, "--npz", tmp_path / "taken")
    assert run.exit_code == 3 and "can't be written: it is a folder" in run.stderr
    assert run.stderr.count("\n") == 1 and run.stdout == ""
    assert [path.name for path in tmp_path.iterdir() if path.name != "converted"] == ["taken"]


def test_layouts_that_select_nothing_are_refused(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path
) -> None:
    swa = tmp_path / "swa"
    assert hysparse("convert", tiny_original, swa, "--layout", "hybrid-swa").exit_code == 0
    for run in (
        hysparse("inspect-topk", swa, "--prompt", "w1"),
        hysparse("inspect-topk", tiny_original, "--set", "convert.layout=hybrid-swa"),
    ):
        assert run.exit_code == 3 and run.stdout == ""
        assert "hybrid-swa" in run.stderr and run.stderr.count("\n") == 1
