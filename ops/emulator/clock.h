// How long things take on Ascend 910B: the rates of the emulator's clock. Times are in cycles of 1.85 GHz.
//
// Sources, all public:
//   [arch]   pto-isa, include/pto/costmodel/arch_config.hpp and a2a3/cce_costmodel: rates of paths, and of vector instructions
//   [add]    asc-devkit, examples/.../add_high_performance: an addition of 8192 x 8192 on A2, measured in seven forms
//   [copy]   asc-devkit, examples/.../data_copy: copies of 12288 x 12288 on A2, measured
//   [matmul] asc-devkit, examples/.../matmul_basic_api_high_performance and matmul_high_performance: products of 8192^3 on A2, measured
//   [load]   asc-devkit, tests/perf/load_data_perf: rates and latencies of LoadData for dav-2201
//   [fa]     pto-isa, kernels/manual/common/flash_atten: a cost model fitted to measured attention
// What none of them says is an assumption, and its name begins with ASSUMED.
#pragma once
#include <cstdint>

namespace emulator::rates {

constexpr double CYCLES_A_SECOND = 1.85e9;  // [arch], [add], [matmul]

// Memory. Bytes a cycle.
constexpr double HBM = 1.5e12 / CYCLES_A_SECOND;  // of all cores: [copy] 302 MB in 203 us; [add] reads and writes 403 MB in 258 us
constexpr double L2 = 5.2e12 / CYCLES_A_SECOND;   // of all cores: [copy], [matmul] 5 to 5.2 TB/s
constexpr uint64_t L2_BYTES = 192ull << 20;       // [copy]
constexpr uint32_t ASSUMED_LINE = 256;            // bytes that L2 keeps together
constexpr double GM_TO_UB = 58.6;                 // of a core: [arch] 100.9 GiB/s
constexpr double GM_TO_L1 = 78.4;                 // [arch] 135 GiB/s
constexpr double UB_TO_GM = 109.4;                // [arch] 188.46 GiB/s
constexpr double L0C_TO_GM = 64.0;                // [matmul] 85 results of 64 KiB a core in 47 us; [fa] agrees, [arch] has 40.7
constexpr double COPY = 20;                       // the least that a copy occupies its pipe: [copy] copies of 128 bytes
constexpr double ROW_TO_L1 = 5.3;                 // the least for a row on its way into L1: [copy] rows of 128 bytes
constexpr double READ_LATENCY = 420;              // of the first byte from HBM: [add], one core, copies of 8 KiB
constexpr double ASSUMED_L2_LATENCY = 280;        // and from L2
constexpr double WRITE_LATENCY = 220;             // [add], one core

// The cube, and what feeds it.
constexpr double L1_TO_L0A = 256, L1_TO_L0B = 128;  // bytes a cycle: [load]
constexpr double LOAD_2D = 28, LOAD_3D = 50;        // before the first byte: [load]; part of the pipe's time, as [matmul]'s MTE1 times say
constexpr double MMAD_START = 6;                    // [arch]
constexpr double ASSUMED_MMAD_LATENCY = 20;         // until what reads L0C may begin
constexpr double ASSUMED_FIX_START = 20;            // [load]'s fixpipe_perf has 20 for the way to L1
constexpr double FILL = 18.6;                       // bytes a cycle of constants into L1: [arch] 32 GiB/s

// The vector unit: cycles before the first repeat, for each repeat of 256 bytes, and after the last, before what waits for it may begin.
struct Vector {
  double head, repeat, tail;
};
constexpr Vector ADD = {10, 2, 14}, MUL = {10, 2, 15}, DIV = {11, 4, 19}, ADDS = {13, 1, 18}, MULS = {11, 1, 15};  // [arch], all of these
constexpr Vector MAXS = {10, 1, 13}, MINS = {14, 1, 16}, EXP = {13, 2, 18}, LN = {13, 2, 20}, ABS = {13, 1, 16}, SQRT = {14, 2, 25};
constexpr Vector DUPLICATE = {11, 1, 13}, BRCB = {6, 1, 18}, CAST = {14, 2, 18}, SUM = {14, 7, 32}, MOST = {14, 2, 32};
constexpr Vector BLOCK_SUM = {14, 1, 24}, BLOCK_MOST = {14, 1, 17}, SELECT = {13, 2, 14}, GATHER = {24, 2, 20}, PICK = {14, 14, 20};
constexpr Vector COPY_LOCAL = {11, 1, 13};
constexpr Vector ASSUMED_AXPY = {10, 2, 15}, ASSUMED_COMPARE = {10, 2, 14}, ASSUMED_SORT = {14, 32, 20}, ASSUMED_INDEX = {11, 4, 13};
constexpr Vector ASSUMED_SHIFT = {13, 1, 18};
constexpr double MERGE_START = 20, ASSUMED_MERGE = 78.0 / 128;  // of a merge, and for each pair: [arch] 20 + 78 for four lists of 32
constexpr double ODD_COUNT = 16;  // more for an operation of two tensors on a count that is no whole number of repeats: [arch]

// The scalar unit and what joins pipes and cores.
constexpr double ISSUE = 10;               // of an instruction: [add], [matmul] time of the scalar unit over what it issues
constexpr double ASSUMED_SET = 2;          // of SetFlag, WaitFlag and PipeBarrier, for the scalar unit
constexpr double LOCAL = 10;               // an access to local memory: [add], 67 M additions by the scalar unit in 1.23 s
constexpr double ASSUMED_QUEUE = 15;       // of AllocTensor, EnQue, DeQue or FreeTensor; [matmul]'s library takes 95 a step with its own
constexpr double ASSUMED_FLAG = 10;        // from SetFlag to what waited
constexpr double ASSUMED_GLOBAL = 400;     // a scalar read of global memory that its cache of 64-byte lines does not hold
constexpr double CROSS = 250;              // a flag between cores: [fa] 1000 cycles a tile of four of them
constexpr double ASSUMED_SYNC_ALL = 1000;  // of SyncAll, after the last core has come
constexpr int WAITING = 32;                // instructions that wait for a pipe: [matmul]

}  // namespace emulator::rates
