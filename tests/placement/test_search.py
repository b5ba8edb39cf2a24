"""Greedy and restoring paths, on costs that are known."""

from hysparse_cli.placement.search import greedy_path, path_steps, restore_path

# what each layer costs where it is sparse
COSTS = {1: 5.0, 2: 1.0, 3: 3.0, 4: 2.0}


def cost(pattern: str) -> float:
    return sum(COSTS[layer] for layer, kind in enumerate(pattern) if kind == "S")


def test_greedy_makes_the_cheapest_layer_sparse_first() -> None:
    assert greedy_path(6, cost) == ["FFFFFF", "FFSFFF", "FFSFSF", "FFSSSF", "FSSSSF"]


def test_restoring_makes_the_dearest_layer_full_first() -> None:
    assert restore_path(6, cost) == ["FSSSSF", "FFSSSF", "FFSFSF", "FFSFFF", "FFFFFF"]


def test_steps_are_counted_and_small_models_have_a_path() -> None:
    for num_layers in (1, 2, 3, 6):
        seen: list[str] = []
        greedy_path(num_layers, lambda pattern, seen=seen: seen.append(pattern) or 0.0)  # type: ignore[misc,func-returns-value]
        assert len(seen) == path_steps(num_layers)
    assert greedy_path(1, cost) == ["F"] and restore_path(2, cost) == ["FF"]
