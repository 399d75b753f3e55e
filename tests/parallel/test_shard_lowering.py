"""Two-layer train steps compiled for one rank of a simulated Ascend cluster, in both lowerings: parameter slices, every collective, and the
kernels of MindSpore's own that ops/ maps to, forward and backward.

Simulation computes nothing, so this holds shapes, groups and counts; that the numbers are right, the manual lowering shows on processes.
Expected counts are sums over what the layers do; L is the number of layers.
"""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from experiments.layout import traffic as layout_traffic
from parallel.placement import local_shape, place
from parallel.simulation import standin
from parallel.trees import tree_leaves
from qwen3.model import param_specs
from tests.parallel.shard_step import CASES

ROOT = Path(__file__).parent.parent.parent
WORLD = 4
RANKS = {"shard": 0, "manual": 3, "generate": 0}  # whose program is compiled
FAST = {"shard": ("moe-sp",), "manual": ()}  # the default tests of the dry run compile one of the manual lowering
PLANTED = ("unscattered", "summed_twice", "unannotated")
SLOW = {"shard": ("dense", "dense-sp", "moe", "moe-ep-sp", *PLANTED), "manual": ("dense", "dense-sp", "moe-ep-sp")}
SLOW_OPS = {
    "shard": ("references", "ascendc", "lengths"),
    "manual": ("dense-scan", "float32", "ascendc", "lengths", "lengths-ring"),
    "generate": ("generate",),
}
SLOW_TRAFFIC = (*SLOW["manual"], "zero1", "zero2", "zero3", "cp-ring", "cp-ulysses")

pytestmark = [pytest.mark.extended, pytest.mark.skipif(standin.unavailable() is not None, reason=str(standin.unavailable()))]


def cases(table):
    return [(lowering, name) for lowering, names in table.items() for name in names]


ALL = [*cases(FAST), *(pytest.param(*case, marks=pytest.mark.slow) for case in cases(SLOW))]
SOUND = [case for case in ALL if (case.values if hasattr(case, "values") else case)[1] not in PLANTED]


def compile_one(lowering, name, folder):
    """What shard_step found, in a process of its own: the partitioner keeps something from one program to the next."""
    folder.mkdir()
    env = {**os.environ, **standin.environment(WORLD, RANKS[lowering]), "GLOG_v": "3", "MS_DEV_SAVE_GRAPHS_PATH": str(folder)}
    env.update(MS_DEV_SAVE_GRAPHS="2", MS_DEV_DUMP_IR_PASSES="validate")  # the last pass' graph alone, which saves most of the time
    if CASES[name].compiles_only():
        env["MS_SIMULATION_LEVEL"] = "0"
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env["PYTHONPATH"]])
    command = [sys.executable, "-m", "tests.parallel.shard_step", lowering, name]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return json.loads(done.stdout.rpartition("RESULT ")[2])


def compile_all(table, folder):
    """Yields {(lowering, case): future of what shard_step found}, and waits for all."""
    with ThreadPoolExecutor(2) as pool:
        yield {case: pool.submit(compile_one, *case, folder / "-".join(case)) for case in cases(table)}


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    yield from compile_all(FAST, tmp_path_factory.mktemp("fast"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    more = {"manual": SLOW_TRAFFIC, "shard": SLOW["shard"]}
    every = {lowering: (*names, *more.get(lowering, ())) for lowering, names in SLOW_OPS.items()}
    yield from compile_all(every, tmp_path_factory.mktemp("slow"))


@pytest.fixture
def compiled(request):
    """f(lowering, case) -> what shard_step found"""

    def of(*case):
        return request.getfixturevalue("fast" if case in cases(FAST) else "slow")[case].result()

    return of


def counted(found, mesh):
    """{(kind, axes): calls}"""
    names = {mesh.members(axes): "+".join(axes) for axes in (("tp",), ("dp",), ("dp", "tp"))}
    return Counter((kind, names[tuple(ranks)]) for kind, ranks, _, _ in found["collectives"])


def expected(case, lowering):
    """The same, from what the model is made of."""
    out, shard, sp, L = Counter(), lowering == "shard", case.seq_parallel, case.cfg.num_layers
    rows = "dp+tp" if sp else "dp"  # the axes that rows are split over
    # Attention and the feed-forward each begin with the rows of the tp group and end in a sum over it; so do, the other way round, the
    # embedding, which ends in one, and the head, which begins so. Their transposes come in the backward.
    blocks = 2 * L + 1
    if sp:
        out["AllGather", "tp"] += 2 * blocks
        out["ReduceScatter", "tp"] += 2 * blocks
    else:
        out["AllReduce", "tp"] += 2 * blocks
    # MindSpore's partitioner gives a sum's operand the sum of the cotangents, ours the cotangent, which is the same on all ranks
    twice = 2 if shard else 1
    out["AllReduce", "tp"] += 1 + 2 * twice  # cross-entropy: the largest logit; the sum of exponentials, the target's logit
    out["AllReduce", "dp"] += 1 + twice  # the mean: the sum of weights, which has no gradient, and the weighted sum
    if case.cfg.moe_layers:
        out["AllReduce", rows] += L * twice  # router statistics
        if sp:  # the tp group's choices, ids and weights; the weights' cotangents are scattered
            out["AllGather", "tp"] += 2 * L
            out["ReduceScatter", "tp"] += L
        if case.mesh().ep > 1:  # tokens, their experts' ids, and results; the backward of the first and the last; lost assignments
            out["AlltoAll", "dp"] += 5 * L
            out["AllReduce", "dp"] += L
    return out + (shard_gradients(case) if shard else manual_gradients(case))


def shard_gradients(case):
    """MindSpore sums each parameter's gradient by itself, over all ranks that hold it alike."""
    out = Counter()
    for p in placed(case, "shard"):
        split = {atom[:2] for atoms in p.used for atom in atoms}
        alike = [axis for axis in ("dp", "tp") if axis not in split]
        out.update([("AllReduce", "+".join(alike))] if alike else [])
    return out


def manual_gradients(case):
    """Over tp where the op is used for a part of the rows or heads; over dp in one bucket; and the norm."""
    heads = sum(p.path.endswith(("q_norm", "k_norm")) for p in placed(case, "manual"))
    rows = sum(p.spec.dims in (("embed",), ("embed", "router")) for p in placed(case, "manual")) if case.seq_parallel else 0
    return Counter({("AllReduce", "tp"): heads + rows, ("AllReduce", "dp"): 1, ("AllReduce", "dp+tp"): 1})


def placed(case, lowering):
    return tree_leaves(place(case.sharding(lowering, RANKS[lowering]), param_specs(case.cfg)))


@pytest.mark.extended
@pytest.mark.parametrize("lowering, name", SOUND)
def test_every_collective_is_accounted_for(compiled, lowering, name):
    case = CASES[name]
    assert counted(compiled(lowering, name), case.mesh(RANKS[lowering])) == expected(case, lowering)


@pytest.mark.parametrize("lowering, name", SOUND)
def test_parameters_are_cut_as_their_specs_say(compiled, lowering, name):
    shapes, mesh = compiled(lowering, name)["slices"], CASES[name].mesh(RANKS[lowering])
    assert {path: tuple(shape) for path, shape in shapes.items()} == {
        p.path: local_shape(mesh, p.spec, p.stored) for p in placed(CASES[name], lowering)
    }
    assert shapes["layers.0.attention.wq"] == [32, 32] and shapes["embed"] == [31, 32]  # 61 padded to 62, half of it


@pytest.mark.parametrize("lowering, name", SOUND)
def test_no_op_is_split_unless_its_annotation_says_so(compiled, lowering, name):
    assert compiled(lowering, name)["invented"] == []


def difference(compiled, name):
    case = CASES[name]
    found, sound = counted(compiled("shard", name), case.mesh()), expected(case, "shard")
    return {key: found[key] - sound[key] for key in found | sound if found[key] != sound[key]}


@pytest.mark.slow
def test_a_result_left_whole_changes_the_counts(compiled):
    """Row-parallel matmuls whose annotation lacks >rows, two in this layer: their sums, and the sums of their cotangents, are whole."""
    assert difference(compiled, "unscattered") == {("ReduceScatter", "tp"): -2, ("AllGather", "tp"): -2, ("AllReduce", "tp"): 4}


@pytest.mark.slow
def test_a_sum_made_twice_changes_the_counts(compiled):
    """In a region, the sum of the embedding; and its backward."""
    assert difference(compiled, "summed_twice") == {("AllReduce", "tp"): 2}


@pytest.mark.slow
def test_an_op_without_annotation_is_seen(compiled):
    """The residual addition after the feed-forward: MindSpore splits its first dim over as many ranks as it can."""
    assert compiled("shard", "unannotated")["invented"] == ["Add ((4, 1), (4, 1))"]


@pytest.mark.parametrize("name", [*FAST["manual"], *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_TRAFFIC)])
def test_the_traffic_of_a_layout_is_what_its_graph_sends(compiled, name):
    """Every call: its kind, ranks, payload and dtype, and how often; predicted from signatures and specs."""
    case, predicted, found = CASES[name], Counter(), Counter()
    sharding = case.sharding("manual", RANKS["manual"])
    for call, count in layout_traffic.step_calls(case.config(), case.cfg, sharding).items():
        predicted[call.kind, sharding.mesh.members(call.atoms), call.elements, call.itemsize] += count
    for kind, ranks, dtype, shape in compiled("manual", name)["collectives"]:
        whole = math.prod(shape) * (len(ranks) if kind == "AllGather" else 1)
        found[kind, tuple(ranks), whole, 2 if dtype == "bfloat16" else 4] += 1
    assert found == predicted


REFERENCES = ("BatchMatMul", "SiLU", "SiLUGrad", "Rsqrt", "TopK", "Sort")  # what the references of these ops have, and nothing else has


def vendor_primitives(case):
    """{name: how often} of MindSpore's own kernels, forward and backward."""
    cfg, L, moe = case.cfg, case.cfg.num_layers, case.cfg.moe_layers
    # of a layer: two norms of heads and one or two of the residual stream, one of which adds to it first; of the model, a last one
    out = {"RmsNorm": 3 * L + 1, "AddRmsNorm": L, "RmsNormGrad": 4 * L + 1, "Swiglu": L, "SwigluGrad": L}
    out |= {"RotaryPositionEmbedding": 2 * L, "RotaryPositionEmbeddingGrad": 2 * L}
    if cfg.compute_dtype != "float32":
        out |= {"FlashAttentionScore": L, "FlashAttentionScoreGrad": L}
    if moe:
        out["GroupedMatmulV4"] = 3 * 3 * L  # three products, each with the gradients of both factors
    if moe and case.mesh().ep == 1:
        permute = ("MoeTokenPermute", "MoeTokenPermuteGrad", "InnerMoeTokenUnpermute", "MoeTokenUnpermuteGrad")
        out |= dict.fromkeys(("MoeGatingTopKSoftmax", *permute), L)
    return out


def of_vendor(found):
    """The same of a graph, whatever it has of such kernels."""
    kinds = ("RmsNorm", "Swiglu", "RotaryPosition", "FlashAttention", "GroupedMatmul", "Gmm", "Moe")
    return {name: n for name, n in found["primitives"].items() if any(kind in name for kind in kinds)}


@pytest.mark.parametrize("lowering, name", [case for case in SOUND if "zero" not in str(case)])
def test_mindspores_own_kernels_are_in_the_graph_and_the_references_are_not(compiled, lowering, name):
    case, found = CASES[name], compiled(lowering, name)
    assert of_vendor(found) == vendor_primitives(case)
    left = {"TopK", "Sort"} if case.mesh().ep > 1 else set()  # experts over ranks have the references of routing
    assert set(REFERENCES) & set(found["primitives"]) == left
    if case.cfg.moe_layers:
        assert found["dtypes"]["GroupedMatmulV4"] == ["BFloat16"]
    assert found["dtypes"]["FlashAttentionScore"] == found["dtypes"]["AddRmsNorm"] == found["dtypes"]["Swiglu"] == ["BFloat16"]
    assert found["dtypes"]["RotaryPositionEmbedding"] == ["Float32"]


@pytest.mark.slow
@pytest.mark.parametrize("lowering, name", [("manual", "lengths"), ("shard", "lengths"), ("manual", "lengths-ring")])
def test_attention_by_lengths_has_no_mask(compiled, lowering, name):
    """One call a layer, differentiated by MindSpore; in a ring of two ranks another for the keys that arrive, by the kernel's gradient."""
    case, found = CASES[name], compiled(lowering, name)
    calls = case.cfg.num_layers * (2 if name == "lengths-ring" else 1)
    flash = {kind: n for kind, n in found["primitives"].items() if "FlashAttention" in kind}
    assert flash == {"FlashAttentionScore": calls, "FlashAttentionScoreGrad": calls}
    assert found["masks"] == [] and "BatchMatMul" not in found["primitives"]


@pytest.mark.slow
def test_documents_by_segments_have_a_mask_of_all_pairs(compiled):
    found = compiled("manual", "dense-sp")
    assert found["masks"]


@pytest.mark.slow
def test_asked_for_references_are_in_the_graph_and_nothing_else(compiled):
    found = compiled("shard", "references")
    assert of_vendor(found) == {} and set(REFERENCES) <= set(found["primitives"])


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["manual", "shard"])
def test_our_own_kernels_are_in_the_graph_as_often_as_layers_call_them(compiled, lowering):
    """Two layers with experts: forward and backward, and the last norm and the loss."""
    found, L = compiled(lowering, "ascendc"), CASES["ascendc"].cfg.num_layers
    layer = {
        "RmsNorm": 1,
        "AddRmsNorm": 1,
        "RopeNorm": 2,
        "Attention": 1,
        "TopK": 1,
        "Permute": 1,
        "Combine": 1,
        "Swiglu": 1,
        "GroupedMatmul": 3,
    }
    expected = {f"aclnnQwen{name}": L * n for name, n in layer.items()}
    expected.update({f"aclnnQwen{name}Grad": L * n for name, n in layer.items() if name != "GroupedMatmul"})
    expected.update({f"aclnnQwenGroupedMatmul{kind}": 3 * L for kind in ("Dx", "Dw")})
    for last in ("RmsNorm", "CrossEntropy"):
        for name in (f"aclnnQwen{last}", f"aclnnQwen{last}Grad"):
            expected[name] = expected.get(name, 0) + 1
    assert found["customs"] == expected and found["primitives"]["Custom"] == sum(expected.values())
    assert of_vendor(found) == {} and "BatchMatMul" not in found["primitives"]


@pytest.mark.slow
def test_in_float32_attention_is_the_reference(compiled):
    """MindSpore's flash attention computes in half precision alone; the other kernels serve."""
    found = compiled("manual", "float32")
    assert of_vendor(found) == vendor_primitives(CASES["float32"]) and "BatchMatMul" in found["primitives"]


@pytest.mark.slow
def test_one_layer_looped_over_has_them_in_its_handwritten_backward(compiled):
    """The layer is in the graph once forward, and once more before its backward; the last norm only once."""
    found, one_layer = of_vendor(compiled("manual", "dense-scan")), vendor_primitives(CASES["zero2"])
    twice = {name: n * (1 if name.endswith("Grad") else 2) for name, n in one_layer.items()}
    assert found == {**twice, "RmsNorm": twice["RmsNorm"] - 1}


@pytest.mark.slow
def test_generation_has_them_too(compiled):
    found, L = of_vendor(compiled("generate", "generate")), CASES["generate"].cfg.num_layers
    expected = {name: n for name, n in vendor_primitives(CASES["generate"]).items() if not name.endswith("Grad")}
    assert found == expected and expected["FlashAttentionScore"] == L
