"""The emulator of AscendC: what is wrong in a kernel is found, and the message names the kernel's line."""

import re
from pathlib import Path

import numpy as np
import pytest

from ops.ascendc import build
from tests.ops.emulated import call, cores, machine

SOURCE = Path(__file__).parent / "faults.cc"
# fault: what the message says. The line named is the one that bears the fault's name in the source.
COPY = {
    "MISALIGNED": "Muls: dst begins at byte 260, which is not a multiple of 32",
    "UB_OVERRUN": "InitBuffer: 196608 bytes more than the 512 in use make the UB overrun its 196352",
    "BUFFER_OVERRUN": "Muls: 288 bytes from byte 0 of a buffer of 256 bytes in UB .VECOUT.: it overruns the buffer",
    "ENQUEUED_TWICE": r"EnQue: a tensor that was enqueued at faults.cc:\d+",
    "NOT_FREED": "deadlock: AllocTensor waits for ever: all 1 buffers of the queue are in use.*FreeTensor is missing",
    "WRONG_POSITION": "DataCopy: dst is in VECOUT and has to be in VECIN or VECCALC",
    "PAST_THE_ARRAY": "DataCopy reads 256 bytes from byte 260 of array 0 of the kernel, which has 512",
    "NOT_ENQUEUED": r"Muls reads bytes of UB that the MTE2 pipe may still be writing .faults.cc:\d+.: no queue or flag from MTE2 to vector",
    "NO_BARRIER": r"Muls reads bytes of UB that the vector pipe may still be writing .*: no PipeBarrier<PIPE_V> lies between",
    "NO_SCALAR_WAIT": "GetValue reads bytes of UB that the vector pipe may still be writing .*: no queue or flag from vector to scalar",
    "FREED": r"Muls: a tensor that was freed at faults.cc:\d+",
    "NEVER_SET": "WaitFlag of vector to scalar, event 0, which nothing set",
    "LEFT_SET": "SetFlag of vector to scalar, event 0, that nothing waited for",
    "SOME_SYNC": "vector core 0 waits in SyncAll",
    "EMPTY_QUEUE": "DeQue: the queue is empty",
    "OVERLAP": "Muls: dst and src overlap in part",
    "DEPTH": "EnQue: 1 tensors wait already, and the queue's depth is 1",
    "EVENTS_SPENT": "InitBuffer: 9 buffers of queues from MTE2 to vector, each of which needs an event; a pair of pipes has 8",
    "SYNC_ALONE": "SyncAll in a kernel of KERNEL_TYPE_AIV_ONLY",
    "NO_BATCH": r"SyncAll in an operator whose tiling function does not call SetScheduleMode.1.",
    "INIT_AGAIN": "InitBuffer of a queue a second time: after Reset too it goes on from the buffer it was at; use another queue",
    "SMALL_WORK": "ReduceMax: sharedTmpBuffer has 8 elements and needs 16: a value and an index for each of 5 repeats",
    "ODD_LIST": "Sort32: src0 begins at byte [0-9]+, which is not a multiple of 128",
    "MERGED_IN_PLACE": "MrgSort: dst overlaps a list of src",
    "FAR_GATHER": "Gather: 4 bytes from byte 4[0-9]+ of a buffer of 1312 bytes in UB .VECCALC.: it overruns the buffer",
    "ADDED_COPY": "DataCopy after SetAtomicAdd: the emulator adds what Fixpipe writes alone",
    "ODD_COPY": "DataCopy: 252 bytes are no whole blocks of 32",
}
MIXED = {
    "L1_OVERRUN": "InitBuffer: 525312 bytes more than the 0 in use make the L1 overrun its 524288",
    "NO_CROSS_WAIT": r"cube core of block \d may still be writing.*no flag between the cores orders them|"
    r"reads bytes of global memory that vector core",
    "NO_CROSS_SET": "vector core 0 of block 0 waits in CrossCoreWaitFlag of flag 3",
    "WRONG_MATRIX": "Mmad: fm is in B2 and has to be in A2",
    "ONE_ROW": "Mmad: m is 1",
    "CUBE_EVENTS_SPENT": "InitBuffer: 6 buffers of queues from MTE1 to cube, .* a pair of pipes has 8, of which TPipe takes 3",
    "NO_LOAD_WAIT": r"LoadData: a tensor that was enqueued at faults.cc:\d+",
}
FAULTS = re.search(r"enum Fault : uint32_t \{(.*?)\};", SOURCE.read_text(), re.S)[1]
NUMBER = {name: i for i, name in enumerate(re.findall(r"[A-Z][A-Z_0-9]+", re.sub(r"//.*", "", FAULTS)))}


def lines_of(fault):
    return [i for i, line in enumerate(SOURCE.read_text().splitlines(), 1) if re.search(rf"// .*\b{fault}\b", line)]


def run(kernel, fault):
    x = np.arange(128 if kernel == "copy" else 256, dtype=np.float32) % 7
    y = np.zeros_like(x)
    library = build.built("faults", f'#include "{SOURCE}"\n', (SOURCE,))
    return x, y, call(library, kernel, [x], [y], [NUMBER[fault]])


def test_sound_kernels_run():
    x, y, message = run("copy", "NONE")
    assert message == ""
    np.testing.assert_array_equal(y, 2 * x)
    x, y, message = run("mixed", "NONE")
    assert message == ""
    np.testing.assert_array_equal(y.reshape(16, 16), x.reshape(16, 16) @ x.reshape(16, 16).T)


@pytest.mark.parametrize("kernel, fault, text", [*(("copy", *f) for f in COPY.items()), *(("mixed", *f) for f in MIXED.items())])
def test_a_fault_is_found_and_its_line_named(kernel, fault, text):
    _, _, message = run(kernel, fault)
    assert re.search(text, message), message
    assert any(f"faults.cc:{line}:" in message for line in lines_of(fault)), (message, lines_of(fault))


def test_cores_that_no_flag_orders():
    """Whichever core comes first: the other reads what is being written, or is not written yet."""
    _, _, message = run("copy", "NO_SYNC")
    text = r"faults.cc:\d+: DataCopy (reads|writes) bytes of global memory that vector core \d may still be (reading|writing)"
    assert re.search(text, message), message


def test_additions_in_global_memory_that_nothing_ends():
    _, _, message = run("copy", "ADDS_LEFT")
    assert "SetAtomicAdd holds at the end of the kernel: SetAtomicNone is missing" in message


def test_flags_that_nothing_waited_for():
    _, _, message = run("mixed", "CROSS_LEFT")
    assert "flag 3 between the cores is set and was not waited for" in message


def test_a_kernel_that_does_not_end():
    machine().emulator_set_seconds(0.2)
    try:
        _, _, message = run("copy", "ENDLESS")
    finally:
        machine().emulator_set_seconds(300.0)
    assert f"faults.cc:{lines_of('ENDLESS')[0]}: still running after 0 s" in message


KINDS = ("barriers", "flags", "queues", "crossings")  # emulator::Sync


def attention_and_its_gradient(library):
    """The emulator's messages for both, for 150 tokens of two heads over one."""
    S, rng = 150, np.random.default_rng(0)
    q, k, v, dout = (rng.normal(0, 1, (1, S, heads, 16)).astype(np.float32) for heads in (2, 1, 1, 2))
    ones, order = np.ones((1, S), np.int32), np.arange(S, dtype=np.int32)[None]
    o, lse = np.empty_like(q), np.empty((1, 2, S), np.float32)
    inputs = [q, k, v, ones, ones, order, order]
    yield lambda: call(library, "qwen_attention", inputs, [o, lse], [0.3, 0])
    yield lambda: call(
        library, "qwen_attention_grad", [*inputs, o, lse, dout, np.zeros_like(lse)], [np.empty_like(x) for x in (q, k, v)], [0.3, 0]
    )


@pytest.mark.slow
def test_a_kernel_that_lacks_a_synchronisation_is_caught():
    """Of attention's, one in seven each on its own is made to have no effect. Not every one is needed: what a flag orders, a later one may
    order too; a buffer's first use waits for nothing. Without one that is, a kernel computes the same here, and is refused."""
    library, emulator, found = build.emulated("attention"), machine(), {}
    with cores(2):
        for run in attention_and_its_gradient(library):
            assert run() == ""
            counts = [emulator.emulator_syncs(kind) for kind in range(len(KINDS))]
            for kind, count in enumerate(counts):
                for n in range(0, count, 7):
                    emulator.emulator_drop(kind, n)
                    try:
                        message = run()
                    finally:
                        emulator.emulator_drop(-1, 0)
                    assert message == "" or "may still be" in message, message
                    found.setdefault(KINDS[kind], []).append(message != "")
    share = {kind: np.mean(caught) for kind, caught in found.items()}
    print({kind: f"{sum(caught)} of {len(caught)}" for kind, caught in found.items()})
    assert min(share[kind] for kind in ("barriers", "flags", "crossings")) > 0.5 and share["queues"] > 0.3, share
