import fnmatch

import pytest

# The files that take longest. Two processes of pytest-xdist that begin with them end at about the same time; in its own order, of most
# tests first, one would begin with a file of few and long tests when the other has nothing left.
LONGEST = (
    *("parallel/test_layouts.py", "experiments/test_train.py", "parallel/test_checkpoint.py", "parallel/test_manual.py"),
    *("parallel/test_collectives.py", "qwen3/test_model.py", "experiments/test_finetune.py", "experiments/test_dryrun.py"),
    *("ops/test_routing.py", "parallel/test_shard_lowering.py", "experiments/test_scoring.py", "experiments/test_notebooks.py"),
    *("experiments/test_pretrain_data.py", "experiments/test_bench.py", "ops/test_ascendc_cube.py", "ops/test_ascendc.py"),
    *("qwen3/test_engine.py", "layers/test_lora.py", "layers/test_moe.py", "experiments/test_resume.py"),
    *("experiments/test_launch.py", "qwen3/test_parity.py", "qwen3/test_engine_layouts.py", "experiments/test_serve.py"),
)


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items):
    for item in items:
        mark = item.get_closest_marker("extended")
        if mark and any(fnmatch.fnmatchcase(item.callspec.id, pattern) for pattern in mark.kwargs.get("but", ())):
            item.own_markers.remove(mark)
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get("/".join(item.path.parts[-2:]), len(place)))
