// MoE routing: the choice of experts, the permutation of tokens to them and back, and their gradients: definitions and tiling.
#include "routing_tiling.h"

#include "host.h"

namespace optiling {

REGISTER_TILING_DATA_CLASS(QwenTopK, TopKTiling)
REGISTER_TILING_DATA_CLASS(QwenTopKGrad, TopKTiling)
REGISTER_TILING_DATA_CLASS(QwenPermute, PermuteTiling)
REGISTER_TILING_DATA_CLASS(QwenPermuteGrad, PermuteTiling)
REGISTER_TILING_DATA_CLASS(QwenCombine, PermuteTiling)
REGISTER_TILING_DATA_CLASS(QwenCombineGrad, PermuteTiling)

constexpr uint32_t MOST_EXPERTS = 2040, MOST_CHOICES = 64, MOST_ROWS = 64;

// row: the bytes of UB that a row takes, fixed: those beside the rows.
static ge::graphStatus Choose(gert::TilingContext *context, uint32_t k, uint32_t shares, uint32_t row, uint32_t fixed) {
  TopKTiling tiling;
  const uint32_t rows = static_cast<uint32_t>(DimOf(context, 0, 0)), experts = static_cast<uint32_t>(DimOf(context, 0, 1));
  if (rows == 0 || experts == 0 || experts > MOST_EXPERTS) return Refuse(context, "there have to be rows, and 1 to 2040 experts");
  if (k == 0 || k > experts || k > MOST_CHOICES) return Refuse(context, "k has to be 1 to 64, and at most the number of experts");
  const uint32_t fit = (UbBytes(context) - UB_SPARE - fixed) / row, blocks = std::min(VectorCores(context), rows);
  if (fit < 8) return Refuse(context, "eight rows do not fit UB");
  tiling.set_rows(rows);
  tiling.set_experts(experts);
  tiling.set_k(k);
  tiling.set_tile(std::min({fit / 8 * 8, MOST_ROWS, RoundUp((rows + blocks - 1) / blocks, 8)}));
  tiling.set_shares(shares);
  return Finish(context, tiling, blocks, 0);
}

static ge::graphStatus TileTopK(gert::TilingContext *context) {
  const uint32_t k = static_cast<uint32_t>(*context->GetAttrs()->GetInt(0));
  const uint32_t shares = static_cast<uint32_t>(*context->GetAttrs()->GetInt(1));
  // Seven arrays of [rows, experts], five of [rows, k], lists of up to 32 pairs of each 32 experts while they are merged, and what lies
  // beside a row.
  const uint32_t padded = RoundUp(static_cast<uint32_t>(DimOf(context, 0, 1)), 32), choices = RoundUp(k, 8);
  const uint32_t merged = RoundUp(padded / 32, 4) * std::min(choices, 32u) * 8;
  return Choose(context, k, shares, 28 * padded + 20 * choices + merged + 32 + 108, 8 * padded);
}
static ge::graphStatus TileTopKGrad(gert::TilingContext *context) {
  // Six arrays of [rows, experts] and nine of [rows, k].
  const uint32_t padded = RoundUp(static_cast<uint32_t>(DimOf(context, 0, 1)), 8), k = static_cast<uint32_t>(DimOf(context, 1, 1));
  return Choose(context, k, static_cast<uint32_t>(*context->GetAttrs()->GetInt(0)), 24 * padded + 36 * RoundUp(k, 8) + 76, 0);
}

// choices: the input of [tokens, k]; rows: that of [..., width]; experts: 0 where their number does not matter.
static ge::graphStatus Permute(gert::TilingContext *context, uint32_t choices, uint32_t rows, uint32_t experts) {
  PermuteTiling tiling;
  const uint32_t tokens = static_cast<uint32_t>(DimOf(context, choices, 0)), k = static_cast<uint32_t>(DimOf(context, choices, 1));
  const uint32_t width = static_cast<uint32_t>(DimOf(context, rows, -1));
  if (tokens == 0 || k == 0 || width == 0) return Refuse(context, "there have to be tokens, choices and columns");
  if (experts > MOST_EXPERTS || k > MOST_CHOICES) return Refuse(context, "there are up to 2040 experts, and 64 choices of a token");
  const uint32_t blocks = std::min(VectorCores(context), tokens);
  tiling.set_tokens(tokens);
  tiling.set_k(k);
  tiling.set_experts(experts);
  tiling.set_width(width);
  tiling.set_rows(static_cast<uint32_t>(SizeOf(context, rows) / width));
  const size_t workspace = static_cast<size_t>(blocks) * RoundUp(experts, 8) * sizeof(int32_t);
  return Finish(context, tiling, blocks, DtypeKey(context->GetInputDesc(rows)->GetDataType()), workspace);
}

static ge::graphStatus TilePermute(gert::TilingContext *context) {
  StartTogether(context);
  return Permute(context, 1, 0, static_cast<uint32_t>(*context->GetAttrs()->GetInt(0)));
}
static ge::graphStatus TilePermuteGrad(gert::TilingContext *context) { return Permute(context, 2, 0, 0); }
static ge::graphStatus TileCombine(gert::TilingContext *context) { return Permute(context, 2, 0, 0); }

}  // namespace optiling

namespace ops {

class QwenTopK : public OpDef {
 public:
  explicit QwenTopK(const char *name) : OpDef(name) {
    Declare(*this, {{"logits", 'f'}, {"bias", 'f'}}, {{"probs", 'f'}, {"expert", 'i'}, {"weight", 'f'}}, optiling::TileTopK);
    this->Attr("k").AttrType(REQUIRED).Int();
    this->Attr("shares").AttrType(REQUIRED).Int();
  }
};
OP_ADD(QwenTopK);

class QwenTopKGrad : public OpDef {
 public:
  explicit QwenTopKGrad(const char *name) : OpDef(name) {
    Declare(*this, {{"probs", 'f'}, {"expert", 'i'}, {"weight", 'f'}, {"dprobs", 'f'}, {"dweight", 'f'}}, {{"dlogits", 'f'}},
            optiling::TileTopKGrad);
    this->Attr("shares").AttrType(REQUIRED).Int();
  }
};
OP_ADD(QwenTopKGrad);

class QwenPermute : public OpDef {
 public:
  explicit QwenPermute(const char *name) : OpDef(name) {
    Declare(*this, {{"x", 'T'}, {"expert", 'i'}}, {{"rows", 'T'}, {"slot", 'i'}, {"group", 'i'}}, optiling::TilePermute);
    this->Attr("experts").AttrType(REQUIRED).Int();
  }
};
OP_ADD(QwenPermute);

class QwenPermuteGrad : public OpDef {
 public:
  explicit QwenPermuteGrad(const char *name) : OpDef(name) {
    Declare(*this, {{"drows", 'T'}, {"slot", 'i'}, {"expert", 'i'}}, {{"dx", 'T'}}, optiling::TilePermuteGrad);
  }
};
OP_ADD(QwenPermuteGrad);

class QwenCombine : public OpDef {
 public:
  explicit QwenCombine(const char *name) : OpDef(name) {
    Declare(*this, {{"y", 'T'}, {"slot", 'i'}, {"weight", 'f'}}, {{"out", 'T'}}, optiling::TileCombine);
  }
};
OP_ADD(QwenCombine);

class QwenCombineGrad : public OpDef {
 public:
  explicit QwenCombineGrad(const char *name) : OpDef(name) {
    Declare(*this, {{"y", 'T'}, {"slot", 'i'}, {"weight", 'f'}, {"dout", 'T'}}, {{"dy", 'T'}, {"dweight", 'f'}}, optiling::TileCombine);
  }
};
OP_ADD(QwenCombineGrad);

}  // namespace ops
