"""Pretrain the dense model of the demo, which recalls from its context, and save it.

python examples/01_pretrain_demo_model.py examples/demo-model
"""

import random
import sys

import torch
from recall_text import WORDS, Lesson, build_tokenizer, training_row
from torch.nn.functional import cross_entropy
from transformers import Qwen3Config, Qwen3ForCausalLM

LESSONS = [Lesson(32, 128, 0.0), Lesson(64, 128, 0.0), Lesson(64, 256, 0.2)]
LESSONS += [Lesson(tokens, len(WORDS), 0.5) for tokens in (128, 256, 512)]
# On to the next lesson once the share KNOWN of the answers is right.
KNOWN, LAST_STEPS, RATES = 0.8, 400, (0.02, 3e-3)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH_TOKENS = 8192 if DEVICE == "cuda" else 1024
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "head_dim": 32}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.08}

torch.manual_seed(0)
rng = random.Random(0)
tokenizer = build_tokenizer()
end = {"eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": True}
sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048}
model = Qwen3ForCausalLM(Qwen3Config(**shape, **heads, **end, **sizes)).to(DEVICE)
matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
others = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
muon = torch.optim.Muon(matrices, weight_decay=0.01)
adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)

lesson = step = last = 0
known = 0.0
while last < LAST_STEPS:
    now, is_last = LESSONS[lesson], lesson == len(LESSONS) - 1
    unknown = 0.05 if is_last else 0.0
    size = range(max(4, BATCH_TOKENS // now.tokens))
    rows = [training_row(now, tokenizer, unknown, rng) for _ in size]
    ids, weights = (torch.tensor(part, device=DEVICE) for part in zip(*rows, strict=True))
    wanted = weights[:, 1:] > 0
    labels, weights = ids[:, 1:][wanted], weights[:, 1:][wanted]
    logits = model.lm_head(model.model(ids).last_hidden_state[:, :-1][wanted])
    loss = (cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, rate in zip((muon, adamw), RATES, strict=True):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 50) * (1 - last / LAST_STEPS)
        optimizer.step()
        optimizer.zero_grad()
    right = (logits.argmax(-1) == labels)[weights == 1].float().mean().item()
    known, step, last = 0.9 * known + 0.1 * right, step + 1, last + is_last
    if step % 50 == 0:
        print(f"step {step}: {now}, loss {loss.item():.3f}, {known:.1%} known", flush=True)
    if known > KNOWN and not is_last:
        lesson, known = lesson + 1, 0.0
model.save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
