"""transformers' auto classes on a converted checkpoint, and what a HySparse model can't give."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

from hysparse_cli.model.config import HysparseSpec
from tests.model.equivalences import SPEC, ids
from tests.model.tiny import TINY, hysparse_model

HEADS = (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
)


def padded() -> dict[str, torch.Tensor]:
    x = ids()
    mask = torch.ones_like(x)
    mask[0, :5] = 0
    return {"input_ids": x, "attention_mask": mask}


def load(auto: Any, path: Path, **options: Any) -> Any:
    return auto.from_pretrained(path, experts_implementation="eager", **options).eval()


@torch.no_grad()
@pytest.mark.parametrize("family", TINY)
def test_auto_model_is_the_decoder_of_the_language_model(family: str, tmp_path: Path) -> None:
    model = hysparse_model(family, SPEC, torch.float32)
    model.save_pretrained(tmp_path / "whole")
    decoder = load(AutoModel, tmp_path / "whole")
    decoder.save_pretrained(tmp_path / "decoder")
    expected = model.base_model(**padded(), output_hidden_states=True)
    for loaded in (decoder, load(AutoModel, tmp_path / "decoder")):
        found = loaded(**padded(), output_hidden_states=True)
        assert found.last_hidden_state.equal(expected.last_hidden_state)
        assert len(found.hidden_states) == 6
        for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
            assert ours.equal(theirs)
    assert type(decoder).__name__.startswith("HySparse")
    assert (
        load(AutoModelForCausalLM, tmp_path / "decoder")
        .base_model(**padded())
        .last_hidden_state.equal(expected.last_hidden_state)
    )


@torch.no_grad()
@pytest.mark.parametrize("auto", HEADS)
@pytest.mark.parametrize("family", ["gpt_neox", "mistral"])
def test_a_head_of_the_family_reads_the_same_decoder(
    family: str, auto: Any, tmp_path: Path
) -> None:
    model = hysparse_model(family, SPEC, torch.float32)
    model.save_pretrained(tmp_path)
    headed, info = auto.from_pretrained(
        tmp_path, experts_implementation="eager", output_loading_info=True
    )
    assert all(
        name.startswith(("score.", "qa_outputs.", "classifier.")) for name in info["missing_keys"]
    )
    expected = model.base_model(**padded()).last_hidden_state
    assert headed.eval().base_model(**padded()).last_hidden_state.equal(expected)
    headed(**padded())


def test_a_head_that_would_find_no_weights_is_refused(tmp_path: Path) -> None:
    hysparse_model("llama", SPEC, torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Unrecognized configuration class .*Llama"):
        AutoModelForQuestionAnswering.from_pretrained(tmp_path)


def test_a_head_that_the_family_lacks_is_refused(tmp_path: Path) -> None:
    hysparse_model("cohere", SPEC, torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Unrecognized configuration class .*Cohere"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_classifier_trains_its_decoder(tmp_path: Path) -> None:
    hysparse_model("llama", SPEC, torch.float32).save_pretrained(tmp_path)
    model = load(AutoModelForSequenceClassification, tmp_path, num_labels=3)
    model(**padded(), labels=torch.tensor([0, 2])).loss.backward()
    gates = [p.grad for name, p in model.named_parameters() if "hysparse.gate" in name]
    assert gates and all(gradient.abs().sum() > 0 for gradient in gates)


def test_attention_maps_are_refused_and_a_full_layout_gives_them(tmp_path: Path) -> None:
    model, x = hysparse_model("llama", SPEC), ids()
    message = "output_attentions=True: HySparse never builds attention maps"
    with pytest.raises(ValueError, match=message):
        model(x, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True
    model(x, output_attentions=False)
    full = hysparse_model("llama", HysparseSpec("FFFFF", layout="full"), torch.float32)
    full.set_attn_implementation("eager")
    assert len(full(x, output_attentions=True).attentions) == 5


def test_the_decoder_alone_takes_no_other_attention(tmp_path: Path) -> None:
    hysparse_model("llama", SPEC, torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'eager' can't run HySparse layers"):
        AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
    decoder = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path))
    assert decoder.config._attn_implementation == "hysparse"


def test_pipelines_generate_and_extract_features(tiny_converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_converted)
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(tiny_converted)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (said,) = generate("w1 w2", max_new_tokens=3, do_sample=False)
    assert said["generated_text"].startswith("w1 w2")
    decoder = AutoModel.from_pretrained(tiny_converted)
    extract = pipeline("feature-extraction", model=decoder, tokenizer=tokenizer)
    (features,) = extract("w1 w2 w3")
    assert torch.tensor(features).shape == (3, 32)
