// The cube core: loads fractals of 512 bytes from L1 into L0A and L0B, multiplies into L0C, and copies results from L0C to global memory.
//
// A fractal has 16 rows of 32 bytes. L1 holds a matrix of r rows as columns of fractals (DataCopy with Nd2NzParams). L0A wants rows of
// fractals, each [m 16][k c]; L0B rows of k, each fractal [n 16][k c]; L0C has columns of [16][16] floats. c = 32 bytes of elements.
#pragma once
#include <algorithm>

#include "tensor.h"

namespace AscendC {

struct LoadData2DParams {
  uint16_t startIndex = 0, dstGap = 0, srcStride = 0;
  bool ifTranspose = false;
  uint8_t repeatTimes = 0, sid = 0, addrMode = 0;
};

template <typename T>
struct LoadData3DParamsV2 {
  uint8_t padList[4] = {0, 0, 0, 0};
  uint16_t l1H = 0, l1W = 0, channelSize = 0, kExtension = 0, mExtension = 0, kStartPt = 0, mStartPt = 0;
  uint8_t strideW = 1, strideH = 1, filterW = 1, filterH = 1, dilationFilterW = 1, dilationFilterH = 1;
  bool enTranspose = false, enSmallK = false;
  T padValue{};
  bool filterSizeW = false, filterSizeH = false, fMatrixCtrl = false;
};

struct MmadParams {
  uint16_t m = 0, n = 0, k = 0;
  bool isBias = false;
  int32_t fmOffset = 0;
  bool enSsparse = false, enWinogradA = false, enWinogradB = false;
  uint8_t unitFlag = 0;
  bool kDirectionAlign = false, cmatrixSource = false, cmatrixInitVal = true;
};

template <typename T>
struct InitConstValueParams {
  uint16_t repeatTimes = 0, blockNum = 0, dstGap = 0;
  T initValue{};
};

struct FixpipeConfig {
  CO2Layout format;
};
constexpr FixpipeConfig CFG_NZ = {CO2Layout::NZ};
constexpr FixpipeConfig CFG_ROW_MAJOR = {CO2Layout::ROW_MAJOR};

struct FixpipeParamsV220 {
  uint16_t nSize = 0, mSize = 0, srcStride = 0;
  uint32_t dstStride = 0;
  QuantMode_t quantPre = QuantMode_t::NoQuant;
  uint64_t deqScalar = 0;
  uint16_t ndNum = 1, srcNdStride = 0, dstNdStride = 0;
  bool reluEn = false;
  uint8_t unitFlag = 0;
  bool isChannelSplit = false;
};

}  // namespace AscendC

namespace emulator {

enum : uint32_t { FRACTAL = 512 };

inline Work load_work(TPosition to, double start, uint32_t bytes) {
  return {0, start + bytes / (to == TPosition::A2 ? rates::L1_TO_L0A : rates::L1_TO_L0B), 0, "LoadData"};
}

template <typename T>
inline void load_operands(const AscendC::LocalTensor<T> &dst, const AscendC::LocalTensor<T> &src, Where where) {
  wants_position("LoadData", "dst", dst.GetPosition(), {TPosition::A2, TPosition::B2}, where);
  wants_position("LoadData", "src", src.GetPosition(), {TPosition::A1, TPosition::B1}, where);
  dst.aligned("LoadData", "dst", where, FRACTAL), src.aligned("LoadData", "src", where);
}

}  // namespace emulator

namespace AscendC {

// repeatTimes fractals, `srcStride` fractals apart in L1, `dstGap` fractals between in L0.
template <typename T>
inline void LoadData(const LocalTensor<T> &dst, const LocalTensor<T> &src, const LoadData2DParams &p, EMULATOR_HERE) {
  using namespace emulator;
  load_operands(dst, src, where);
  if (p.repeatTimes < 1) fail(where, text("LoadData: repeatTimes is %u, and it is 1 to 255", p.repeatTimes));
  if (p.ifTranspose && sizeof(T) != 2) fail(where, "LoadData: ifTranspose is for types of 2 bytes");
  issue(PIPE_MTE1, where, load_work(dst.GetPosition(), rates::LOAD_2D, p.repeatTimes * FRACTAL));
  if (dry) return;
  constexpr uint32_t n = FRACTAL / sizeof(T);
  for (uint32_t r = 0; r < p.repeatTimes; r++) {
    const T *from = src.touch("LoadData", PIPE_MTE1, (p.startIndex + r * p.srcStride) * n, n, false, where);
    T *to = dst.touch("LoadData", PIPE_MTE1, r * (p.dstGap + 1) * n, n, true, where);
    for (uint32_t i = 0; i < n; i++) to[i] = p.ifTranspose ? from[i % 16 * 16 + i / 16] : from[i];
  }
}

// As a convolution of 1 x 1: the matrix of l1H * l1W rows and channelSize columns in L1. Of it mExtension rows from mStartPt and kExtension
// columns from kStartPt go to L0A, as they are or transposed (enTranspose), or to L0B, whose fractals are always transposed.
template <typename T>
inline void LoadData(const LocalTensor<T> &dst, const LocalTensor<T> &src, const LoadData3DParamsV2<T> &p, EMULATOR_HERE) {
  using namespace emulator;
  load_operands(dst, src, where);
  constexpr uint32_t c = BLOCK / sizeof(T);
  const uint32_t rows = p.l1H * p.l1W, m = p.mExtension, k = p.kExtension;
  if (p.strideW != 1 || p.strideH != 1 || p.filterW != 1 || p.filterH != 1 || p.dilationFilterW != 1 || p.dilationFilterH != 1)
    fail(where, "LoadData: the emulator knows filters and strides of 1 by 1");
  if (rows < 1 || rows > 32767 || p.channelSize % c || k % c || m % 16)
    fail(where, text("LoadData: %u rows (1 to 32767), channelSize %u and kExtension %u (multiples of %u), mExtension %u (of 16)", rows,
                     p.channelSize, k, c, m));
  if (p.mStartPt + m > (rows + 15) / 16 * 16 || p.kStartPt + k > p.channelSize)
    fail(where, text("LoadData: rows %u to %u of %u, columns %u to %u of %u", p.mStartPt, p.mStartPt + m, rows, p.kStartPt, p.kStartPt + k,
                     p.channelSize));
  const bool to_b = dst.GetPosition() == TPosition::B2;
  const bool as_it_is = !to_b && !p.enTranspose;
  if (!as_it_is && k % 16) fail(where, text("LoadData: kExtension %u is no multiple of 16, the rows or columns of the fractals made", k));
  issue(PIPE_MTE1, where, load_work(dst.GetPosition(), rates::LOAD_3D, m * k * sizeof(T)));
  if (dry) return;
  const T *from = src.touch("LoadData", PIPE_MTE1, 0, (p.channelSize / c) * rows * c, false, where);
  T *to = dst.touch("LoadData", PIPE_MTE1, 0, m * k, true, where);
  for (uint32_t i = 0; i < m; i++)
    for (uint32_t j = 0; j < k; j++) {
      const uint32_t row = p.mStartPt + i, column = p.kStartPt + j;
      const T value = row < rows ? from[(column / c * rows + row) * c + column % c] : T{};
      if (as_it_is) {  // [i / 16][j / c][i % 16][j % c]
        to[(i / 16 * (k / c) + j / c) * 16 * c + i % 16 * c + j % c] = value;
        continue;
      }
      // rows are the product's k. L0A: [j / 16][i / c][j % 16][i % c]; L0B: [i / c][j / 16][j % 16][i % c]
      const uint32_t fractal = to_b ? i / c * (k / 16) + j / 16 : j / 16 * (m / c) + i / c;
      to[fractal * 16 * c + j % 16 * c + i % c] = value;
    }
}

// repeatTimes times blockNum blocks of 32 bytes of L1, dstGap blocks between.
template <typename T>
inline void InitConstValue(const LocalTensor<T> &dst, const InitConstValueParams<T> &p, EMULATOR_HERE) {
  using namespace emulator;
  wants_position("InitConstValue", "dst", dst.GetPosition(), {TPosition::A1, TPosition::B1}, where);
  dst.aligned("InitConstValue", "dst", where);
  if (p.repeatTimes < 1 || p.repeatTimes > 32767 || p.blockNum < 1 || p.blockNum > 32767)
    fail(where, text("InitConstValue: repeatTimes %u and blockNum %u; each is 1 to 32767", p.repeatTimes, p.blockNum));
  issue(PIPE_MTE2, where, {0, p.repeatTimes * p.blockNum * BLOCK / rates::FILL, 0, "InitConstValue"});
  if (dry) return;
  constexpr uint32_t c = BLOCK / sizeof(T);
  for (uint32_t r = 0; r < p.repeatTimes; r++)
    std::fill_n(dst.touch("InitConstValue", PIPE_MTE2, r * (p.blockNum + p.dstGap) * c, p.blockNum * c, true, where), p.blockNum * c,
                p.initValue);
}

// dst (+)= a b, [m, k] by [k, n].
template <typename T>
inline void Mmad(const LocalTensor<float> &dst, const LocalTensor<T> &a, const LocalTensor<T> &b, const MmadParams &p, EMULATOR_HERE) {
  using namespace emulator;
  static_assert(is_one_of<T, float, half, bfloat16_t>, "Mmad does not take this type");
  wants_position("Mmad", "dst", dst.GetPosition(), {TPosition::CO1}, where);
  wants_position("Mmad", "fm", a.GetPosition(), {TPosition::A2}, where);
  wants_position("Mmad", "filter", b.GetPosition(), {TPosition::B2}, where);
  dst.aligned("Mmad", "dst", where, 1024), a.aligned("Mmad", "fm", where, FRACTAL), b.aligned("Mmad", "filter", where, FRACTAL);
  if (p.m < 1 || p.m > 4095 || p.n < 1 || p.n > 4095 || p.k < 1 || p.k > 4095)
    fail(where, text("Mmad: m %u, n %u, k %u; each is 1 to 4095", p.m, p.n, p.k));
  if (p.m == 1) fail(where, "Mmad: m is 1, for which the chip takes the first matrix as a vector in another layout; make m 16");
  if (p.kDirectionAlign && sizeof(T) != 4) fail(where, "Mmad: kDirectionAlign is for float");
  constexpr uint32_t c = BLOCK / sizeof(T);
  const uint32_t mb = (p.m + 15) / 16, nb = (p.n + 15) / 16, kb = (p.k + c - 1) / c,
                 kb_of_a = p.kDirectionAlign ? (p.k + 15) / 16 * 16 / c : kb;
  // The cube keeps products of one result in order, but for small ones, as CANN's library says.
  if (mb * nb >= 10) in_order(PIPE_M);
  issue(PIPE_M, where, {rates::MMAD_START, mb * nb * kb * (sizeof(T) == 4 ? 2.0 : 1.0), rates::ASSUMED_MMAD_LATENCY, "Mmad"});
  multiplied(static_cast<uint64_t>(p.m) * p.n * p.k);
  if (dry) return;
  const T *x = a.touch("Mmad", PIPE_M, 0, mb * kb_of_a * 16 * c, false, where),
          *y = b.touch("Mmad", PIPE_M, 0, kb * nb * 16 * c, false, where);
  if (!p.cmatrixInitVal) dst.touch("Mmad", PIPE_M, 0, mb * nb * 256, false, where);
  float *z = dst.touch("Mmad", PIPE_M, 0, mb * nb * 256, true, where);
  static thread_local std::vector<float> rows, columns;
  rows.resize(p.m * p.k), columns.resize(p.k * nb * 16);
  for (uint32_t i = 0; i < p.m; i++)
    for (uint32_t k = 0; k < p.k; k++) rows[i * p.k + k] = to_float(x[((i / 16 * kb_of_a + k / c) * 16 + i % 16) * c + k % c]);
  for (uint32_t k = 0; k < p.k; k++)
    for (uint32_t j = 0; j < nb * 16; j++) columns[k * nb * 16 + j] = to_float(y[((k / c * nb + j / 16) * 16 + j % 16) * c + k % c]);
  for (uint32_t i = 0; i < p.m; i++)
    for (uint32_t block = 0; block < nb; block++) {
      float *to = z + (block * mb + i / 16) * 256 + i % 16 * 16, sum[16];
      for (int j = 0; j < 16; j++) sum[j] = p.cmatrixInitVal ? 0.0f : to[j];
      for (uint32_t k = 0; k < p.k; k++)
        for (int j = 0; j < 16; j++) sum[j] += rows[i * p.k + k] * columns[k * nb * 16 + block * 16 + j];
      for (int j = 0; j < 16; j++) to[j] = sum[j];
    }
  for (uint32_t i = p.m; i < mb * 16; i++)  // the rest of the last fractals is nobody's
    for (uint32_t block = 0; block < nb; block++) std::fill_n(z + (block * mb + i / 16) * 256 + i % 16 * 16, 16, std::nanf(""));
}

// mSize rows of nSize out of L0C, dstStride elements apart, rounded to T.
template <typename T, typename U, const FixpipeConfig &config = CFG_NZ>
inline void Fixpipe(const GlobalTensor<T> &dst, const LocalTensor<U> &src, const FixpipeParamsV220 &p, EMULATOR_HERE) {
  using namespace emulator;
  static_assert(std::is_same_v<U, float>, "the emulator has floats in L0C");
  static_assert(config.format == CO2Layout::ROW_MAJOR, "the emulator writes rows: CFG_ROW_MAJOR");
  wants_position("Fixpipe", "src", src.GetPosition(), {TPosition::CO1}, where);
  src.aligned("Fixpipe", "src", where, 64);
  const QuantMode_t wanted = std::is_same_v<T, half>         ? QuantMode_t::F322F16
                             : std::is_same_v<T, bfloat16_t> ? QuantMode_t::F322BF16
                                                             : QuantMode_t::NoQuant;
  if (p.quantPre != wanted) fail(where, text("Fixpipe: quantPre does not make %s", type_name<T>()));
  if (p.nSize < 1 || p.nSize > 4095 || p.mSize < 1 || p.mSize > 8192 || p.ndNum != 1 || p.srcStride % 16 || p.srcStride < p.mSize)
    fail(where, text("Fixpipe: nSize %u (1 to 4095), mSize %u (1 to 8192), srcStride %u (a multiple of 16, at least mSize), ndNum %u (1)",
                     p.nSize, p.mSize, p.srcStride, p.ndNum));
  issue(PIPE_FIX, where, {rates::ASSUMED_FIX_START, std::max(rates::COPY, p.mSize * p.nSize * sizeof(T) / rates::L0C_TO_GM), 0, "Fixpipe"});
  for (uint32_t i = 0; i < p.mSize; i++) {
    T *to = dst.address() + static_cast<size_t>(i) * p.dstStride;
    if (core().adds) global_access("Fixpipe", PIPE_FIX, to, p.nSize * sizeof(T), false, where);
    global_access("Fixpipe", PIPE_FIX, to, p.nSize * sizeof(T), true, where);
    if (dry) continue;
    for (uint32_t j = 0; j < p.nSize; j += 16) {
      const uint32_t n = std::min<uint32_t>(16, p.nSize - j);
      const float *from = src.touch("Fixpipe", PIPE_FIX, j * p.srcStride + i * 16, n, false, where);
      for (uint32_t e = 0; e < n; e++) to[j + e] = from_float<T>(core().adds ? to_float(to[j + e]) + from[e] : from[e]);
    }
  }
  copied(PIPE_FIX);
}

}  // namespace AscendC
