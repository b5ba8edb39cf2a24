"""Writes the README.md of a converted checkpoint: its model card."""

import re

import yaml

from hysparse_cli.convert.plan import Plan
from hysparse_cli.printable import printable
from hysparse_cli.units import format_bytes, format_tokens

_MARKUP = re.compile(r"[`|<>\[\]&\\*#{}$]")

_BODY = """\
# {name}, retrofitted into HySparse

`{name}` with {sparse} of its {layers} attention layers made sparse (layout `{layout}`).{training}

| | |
|---|---|
| base model | `{name}`{revision} |
| pattern | `{pattern}` (F: full attention, S: sparse attention) |
| selection | {selection} |
| sliding window | {window} tokens |{swapped}
| weights | {dtype} |

## KV cache

Bytes of keys and values for one sequence, in {dtype}:

| context | dense | this model | smaller by |
|---|---|---|---|
{kv}

## How to load it

    pip install hysparse

```python
import hysparse_cli  # teaches transformers to load it
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

The attention is that of "HySparse: A Hybrid Sparse Attention Architecture with Oracle Token
Selection and KV Cache Sharing". `hysparse_recipe.yaml` makes this checkpoint again, and
`hysparse_report.json` says what it was made from.
"""
UNTRAINED = """

**It has not been trained since**: the new layers start from the dense weights, and answers are poor
until it is healed with `hysparse finetune`."""


def model_card(plan: Plan) -> str:
    """The model card: what it is, its KV cache against the dense model's, and how to load it."""
    spec, source = plan.spec, plan.dense.source
    from_hub = source.revision is not None
    blocks = f"{spec.top_k_blocks} blocks of {spec.block_size} tokens for each query and KV head"
    swapped = ", ".join(f"layer {a} with {b}" for a, b in spec.swapped)
    front = {
        **({"base_model": source.name} if from_hub else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hysparse", "sparse-attention", plan.config["base_model_type"]],
    }
    body = _BODY.format(
        name=_plain(source.name if from_hub else source.folder.resolve().name),
        revision=f" at revision {_plain(source.revision)}" if from_hub else "",
        sparse=len(spec.layers.sparse_layers),
        layers=plan.num_layers,
        layout=spec.layout,
        training=UNTRAINED if spec.layers.sparse_layers else "",
        pattern=spec.pattern,
        selection=blocks if spec.selects else "none",
        window=spec.window_tokens,
        swapped=f"\n| attention swapped | {swapped} |" if spec.swapped else "",
        dtype=plan.dtype,
        kv="\n".join(_kv_row(plan, context) for context in plan.contexts),
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n{body}"


def _plain(name: object) -> str:
    """``name`` without what Markdown or HTML would read as their own."""
    return _MARKUP.sub("_", printable(name))


def _kv_row(plan: Plan, context: int) -> str:
    dense = plan.dense.kv.total_bytes(context, plan.itemsize)
    ours = plan.kv.total_bytes(context, plan.itemsize)
    name = format_tokens(context)
    return f"| {name} | {format_bytes(dense)} | {format_bytes(ours)} | {dense / ours:.2f}x |"
