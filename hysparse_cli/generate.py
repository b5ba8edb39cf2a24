"""Generates text with a checkpoint, dense or converted, and hands it on as it comes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from hysparse_cli.devices import out_of_memory_is
from hysparse_cli.errors import InvalidRecipe, UnreadableInput
from hysparse_cli.model.kv_cache import held_kv_bytes
from hysparse_cli.model.loading import Loaded, load
from hysparse_cli.printable import single_line
from hysparse_cli.recipe import GenerateOptions
from hysparse_cli.texts.chat import render_chat

OnText = Callable[[str], None]
OnStage = Callable[[str, int, int], None]

_NO_PROMPT = "there is no prompt: give one with --prompt or on stdin"


@dataclass(frozen=True)
class Generation:
    """``text`` without the prompt. ``kv_bytes`` is what the cache holds at the end."""

    checkpoint: str
    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    kv_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second, reading the prompt included."""
        return self.new_tokens / self.seconds

    def summary(self) -> str:
        """The figures in one line."""
        return (
            f"{self.prompt_tokens} prompt tokens, {self.new_tokens} new ones at "
            f"{self.tokens_per_second:.1f} tokens/s, {self.kv_bytes:,} bytes of keys and values"
        )

    def as_json(self) -> dict[str, Any]:
        """Text and figures."""
        return {
            "schema": "hysparse.generate/1",
            "checkpoint": self.checkpoint,
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "kv_bytes": self.kv_bytes,
        }


def generate(
    checkpoint: str,
    options: GenerateOptions,
    on_text: OnText,
    on_stage: OnStage = lambda stage, done, total: None,
) -> Generation:
    """Continue ``options.prompt``, or answer it with ``chat``.

    Args:
        checkpoint: a folder or hub id.
        on_text: gets the text piece by piece; with beam search whole, at the end.
        on_stage: told what is going on, and new tokens of how many.
    Raises: InvalidRecipe where the prompt is empty or too long, or there is no chat template;
        OutOfResources; what ``load`` raises.
    """
    loaded = load(
        checkpoint,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )
    tokens = _encode(loaded, checkpoint, options)
    prompt_tokens = tokens["input_ids"].shape[1]
    longest = getattr(loaded.model.config, "max_position_embeddings", None)
    if longest is not None and prompt_tokens + options.max_new_tokens > longest:
        raise InvalidRecipe(
            f"{prompt_tokens} prompt tokens and max_new_tokens {options.max_new_tokens} are more "
            f"than the {longest} that {checkpoint} takes: shorten one"
        )
    streams = options.num_beams == 1
    torch.manual_seed(options.seed)

    def on_token(count: int) -> None:
        on_stage("generating", count, options.max_new_tokens)

    on_token(0)
    begun = time.perf_counter()
    with out_of_memory_is(
        f"out of memory with {prompt_tokens} prompt tokens: shorten the prompt, use fewer beams or "
        "dtype bfloat16"
    ):
        try:
            output = loaded.model.generate(
                **{name: tensor.to(loaded.model.device) for name, tensor in tokens.items()},
                max_new_tokens=options.max_new_tokens,
                num_beams=options.num_beams,
                return_dict_in_generate=True,
                streamer=_Streamer(loaded.tokenizer, on_text, on_token) if streams else None,
                trust_remote_code=False,  # or a way of decoding may be fetched from the hub
                **_sampling(options),
            )
        except ValueError as error:
            raise UnreadableInput(
                f"{checkpoint} can't generate as its generation_config.json says: "
                f"{single_line(error)}"
            ) from error
    seconds = time.perf_counter() - begun
    new = output.sequences[0, prompt_tokens:]
    text = loaded.tokenizer.decode(new, skip_special_tokens=True)
    if not streams:
        on_text(text)
    return Generation(
        checkpoint, text, prompt_tokens, len(new), seconds, held_kv_bytes(output.past_key_values)
    )


class _Streamer(TextStreamer):
    def __init__(self, tokenizer: Any, on_text: OnText, on_token: Callable[[int], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text, self.on_token, self.count = on_text, on_token, -1

    def put(self, value: Tensor) -> None:
        super().put(value)  # type: ignore[no-untyped-call]
        self.count += 1  # the prompt comes first
        self.on_token(self.count)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(text)


def _encode(loaded: Loaded, checkpoint: str, options: GenerateOptions) -> dict[str, Tensor]:
    if options.prompt is None:
        raise InvalidRecipe(_NO_PROMPT)
    if not options.chat:
        tokens = loaded.tokenizer(options.prompt, return_tensors="pt")
    else:
        text = _in_template(loaded.tokenizer, options.prompt, checkpoint)
        tokens = loaded.tokenizer(text, add_special_tokens=False, return_tensors="pt")
    if tokens["input_ids"].shape[1] == 0:
        raise InvalidRecipe(_NO_PROMPT)
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def _in_template(tokenizer: Any, prompt: str, checkpoint: str) -> str:
    if tokenizer.chat_template is None:
        raise InvalidRecipe(f"{checkpoint} has no chat template: leave --chat out")
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # several, and none is the default
        raise UnreadableInput(f"{checkpoint}: {single_line(error)}") from None
    variables = {"add_generation_prompt": True, **tokenizer.special_tokens_map}
    conversation = [{"role": "user", "content": prompt}]
    text = next(render_chat(template, [conversation], variables, checkpoint))
    if not text:
        raise UnreadableInput(f"the chat template of {checkpoint} makes no text of a prompt")
    return text


def _sampling(options: GenerateOptions) -> dict[str, Any]:
    if options.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
