"""Lists what a stage may minimise, a row each, and refuses models that an objective can't serve."""

from collections.abc import Callable
from typing import Any

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.finetune.align import align_sums
from hysparse_cli.finetune.context_parallel import LocalBatch
from hysparse_cli.finetune.losses import LossSums, distill_sums, next_token_sums
from hysparse_cli.model.config import spec_of
from hysparse_cli.recipe.finetune import Stage

Objective = Callable[[Any, LocalBatch, Any, Stage], LossSums]  # of model, batch, teacher, stage

OBJECTIVES: dict[str, Objective] = {
    "align": lambda model, batch, teacher, stage: align_sums(model, batch, teacher),
    "distill": lambda model, batch, teacher, stage: distill_sums(
        model,
        batch,
        teacher,
        distill_weight=stage.distill_weight,
        hidden_weight=stage.hidden_weight,
    ),
    "train": lambda model, batch, teacher, stage: next_token_sums(model, batch),
}


def check_objectives(stages: list[Stage], model: Any, teacher: Any | None) -> None:
    """Refuse stages that this model and this teacher can't run.

    Args:
        teacher: None where no stage needs one.
    Raises: InvalidRecipe.
    """
    for stage in stages:
        layer_by_layer = stage.objective == "align" or stage.hidden_weight > 0
        if not layer_by_layer:
            continue
        assert teacher is not None, "a stage that needs a teacher has one"
        what = "objective align" if stage.objective == "align" else "hidden_weight"
        if stage.objective == "align" and not _num_sparse(model):
            raise InvalidRecipe(
                "finetune: objective align needs a checkpoint with sparse layers: convert it "
                "first, or leave that stage out"
            )
        if stage.objective == "align" and _num_sparse(teacher):
            raise InvalidRecipe(
                "finetune: objective align needs a dense teacher, but this one has sparse layers: "
                "give the model that was converted as finetune.teacher"
            )
        swapped = _swapped(model)
        if stage.objective == "align" and swapped:
            raise InvalidRecipe(
                "finetune: objective align compares layer with layer, but the checkpoint's layers "
                f"{swapped} hold attention that was swapped (swap_attention): use objective "
                "distill, which compares what the models predict"
            )
        if (sizes := _sizes(teacher)) != _sizes(model):
            raise InvalidRecipe(
                f"finetune: {what} compares layer with layer, but the teacher has {sizes[0]} of "
                f"{sizes[1]} where the checkpoint has {_sizes(model)[0]} of {_sizes(model)[1]}: "
                "give the model that was converted as finetune.teacher"
            )


def _num_sparse(model: Any) -> int:
    spec = spec_of(model.config)
    return 0 if spec is None else len(spec.layers.sparse_layers)


def _swapped(model: Any) -> str:
    spec = spec_of(model.config)
    return "" if spec is None else ", ".join(f"{a} and {b}" for a, b in spec.swapped)


def _sizes(model: Any) -> tuple[int, int]:
    return model.config.num_hidden_layers, model.config.hidden_size
