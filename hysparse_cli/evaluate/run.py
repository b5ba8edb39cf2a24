"""Runs ``hysparse eval``: checkpoints side by side on text, retrieval and tasks of lm-eval."""

from collections.abc import Sequence
from pathlib import Path

from hysparse_cli.devices import describe
from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.evaluate.eval_set import EvalSet
from hysparse_cli.evaluate.harness import Harness
from hysparse_cli.evaluate.requirements import DENSE, Requirement, judge, parse_requirements
from hysparse_cli.evaluate.result import Evaluation, metric_names
from hysparse_cli.evaluate.score import Progress, Scorer
from hysparse_cli.evaluate.state import FINISHED, State
from hysparse_cli.files.checkpoint import open_checkpoint
from hysparse_cli.files.output import keeping
from hysparse_cli.files.source import locate
from hysparse_cli.model.loading import resolve_device, short_names
from hysparse_cli.recipe import EvalOptions
from hysparse_cli.texts.documents import BadRows, read_documents


def evaluate(
    checkpoints: Sequence[str],
    options: EvalOptions,
    on_progress: Progress = lambda what, done, total: None,
) -> Evaluation:
    """Evaluate ``checkpoints``, one after the other, on the same windows and questions.

    Args:
        on_progress: told what is running, how much of it is done, and of how much.
    Raises: UnreadableInput, UnsupportedModel, OutOfResources, InvalidRecipe; Interrupted where what
        is finished is kept in ``options.output``.
    """
    if options.data is None and not options.retrieval_tokens and not options.lm_eval:
        raise InvalidRecipe(
            "nothing to evaluate: give --data, --retrieval-tokens or --lm-eval, or several"
        )
    names = short_names(checkpoints)
    requirements = parse_requirements(options.require, names, metric_names(options))
    trusted = options.trust_remote_code
    folders = [locate(name, trust_remote_code=trusted).folder for name in checkpoints]
    dense = ["hysparse" not in open_checkpoint(folder).config for folder in folders]
    references = _references(requirements, names, dense)
    bad_rows = BadRows(options.skip_bad_rows, "--skip-bad-rows")
    documents = _read(options, bad_rows, on_progress) if options.data is not None else None
    harness = Harness(options, folders[0]) if options.lm_eval else None
    state = State(Path(options.output) if options.output else None)
    environment = describe(resolve_device(options.device))
    scorer = Scorer(EvalSet(documents, options), harness, state, options, environment, on_progress)
    with keeping(state.folder and state.folder / FINISHED):
        scores = [scorer.score(*pair) for pair in zip(checkpoints, folders, strict=True)]
    verdicts = judge(requirements, [score.metrics() for score in scores], references)
    evaluation = Evaluation(options, environment, scores, verdicts, bad_rows)
    state.write_result(evaluation.as_json())
    return evaluation


def _references(
    requirements: Sequence[Requirement], names: Sequence[str], dense: Sequence[bool]
) -> dict[str, int]:
    """The places of what requirements compare with."""
    places = {name: place for place, name in enumerate(names)}
    if DENSE not in places and True in dense:
        places[DENSE] = dense.index(True)
    for requirement in requirements:
        if requirement.reference is not None and requirement.reference not in places:
            raise InvalidRecipe(
                f"require {requirement.text!r}: no checkpoint is dense: give one, or name another"
            )
    return places


def _read(options: EvalOptions, bad_rows: BadRows, on_progress: Progress) -> list[str]:
    assert options.data is not None

    def on_read(done: int, total: int) -> None:
        on_progress("reading data, MiB", done >> 20, max(1, total >> 20))

    texts = read_documents(
        Path(options.data), options.text_field, bad_rows=bad_rows, on_read=on_read
    )
    if documents := list(texts):
        return documents
    raise bad_rows.no_text(options.data)
