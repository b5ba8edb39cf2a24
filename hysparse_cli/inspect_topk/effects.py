"""What becomes of an answer when the needle's blocks are forced into the selections."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hysparse_cli.inspect_topk.reading import Asked
from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.model.logits import hidden_states, logits_of
from hysparse_cli.model.state import ForwardOptions, Variation

FULL, OWN_KEYS, AS_IT_IS = "full attention", "own keys", "as it is"
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Effect:
    """The answer in one forward.

    attention: how the sparse layers attend: "full attention", to all of their own keys; "own keys",
    to those at the selected blocks and in the window, as one softmax: what selection alone does;
    "as it is", with shared keys and values, gates and sinks.
    forced_into: the full layers whose selections were given the needle's blocks. nats: of the
    answer's tokens, mean; probability: of the whole answer; None without one. next_token: the
    likeliest where the answer begins, or after the text.
    """

    attention: str
    forced_into: list[int]
    nats: float | None
    probability: float | None
    next_token: str
    next_probability: float


@torch.no_grad()
def answer_in(
    model: Any, tokenizer: Any, ids: list[int], asked: Asked, hidden: Tensor
) -> tuple[float | None, float | None, str, float]:
    """nats, probability, next token and its probability, of the answer.

    Args:
        hidden: (1, T, hidden), as ``hidden_states`` gives.
    """
    log_p = F.log_softmax(logits_of(model, hidden[:, asked.queries])[0].float(), -1)
    likeliest = int(log_p[0].argmax())
    following = tokenizer.decode([likeliest]), float(log_p[0, likeliest].exp())
    begin, end = asked.answer
    if begin == end:
        return None, None, *following
    answer = torch.tensor(ids[begin:end], device=log_p.device)
    of_answer = log_p.gather(1, answer[:, None]).double()
    return -float(of_answer.mean()), float(of_answer.sum().exp()), *following


def measure_effects(
    model: Any,
    tokenizer: Any,
    spec: HysparseSpec,
    ids: list[int],
    asked: Asked,
    blocks: list[int],
    by_server: str,
    on_progress: OnProgress,
) -> list[Effect]:
    """The answer with the selections as they are, and with ``blocks`` forced into all of them.

    Args:
        model: with sparse attention layers.
        by_server: OWN_KEYS or AS_IT_IS: for that, they are also forced into one layer's alone.
        on_progress: told forwards done, and of how many.
    """
    forwards = list(_forwards(spec, blocks, by_server))
    input_ids = torch.tensor([ids], device=model.device)
    effects = []
    for i, (name, variation) in enumerate(forwards):
        on_progress(i, len(forwards))
        with torch.no_grad():
            hidden = hidden_states(model, input_ids, hysparse=ForwardOptions(variation=variation))
        answer = answer_in(model, tokenizer, ids, asked, hidden)
        effects.append(Effect(name, sorted(variation.forced_blocks), *answer))
    on_progress(len(forwards), len(forwards))
    return effects


def _forwards(
    spec: HysparseSpec, blocks: list[int], by_server: str
) -> Iterator[tuple[str, Variation]]:
    layout = spec.layers
    sparse, servers = frozenset(layout.sparse_layers), [*filter(layout.serves, layout.full_layers)]
    own = replace(spec, sparse_kv="own", window_kv="none" if spec.window_kv == "none" else "own")
    for name, switches in ((OWN_KEYS, own), (AS_IT_IS, spec)):
        each = [[server] for server in servers] if name == by_server and len(servers) > 1 else []
        for into in ([], servers, *each):
            forced = dict.fromkeys(into, tuple(blocks))
            yield name, Variation(switches, sparse, switches is spec, forced)
