#include "decode.h"

#include <cstring>
#include <initializer_list>

namespace jaxembed {
namespace {

namespace ffi = xla::ffi;
using Type = ffi::DataType;

// Keeps every product of sizes below far from 2^63.
constexpr int64_t kMaxBagValues = int64_t{1} << 40;

std::string Named(Type type) {
  switch (type) {
    case Type::F32: return "float32";
    case Type::BF16: return "bfloat16";
    case Type::F16: return "float16";
    case Type::U8: return "uint8";
    case Type::S32: return "int32";
    case Type::S64: return "int64";
    default: return "element type " + std::to_string(static_cast<int>(type));
  }
}

std::string Described(const std::optional<ffi::AnyBuffer>& b) {
  if (!b) return "none";
  std::string text = Named(b->element_type()) + " [";
  for (size_t i = 0; i < b->dimensions().size(); ++i) text += (i ? ", " : "") + std::to_string(b->dimensions()[i]);
  return text + "]";
}

// Takes arguments one by one; the first that does not fit is kept in `wrong`.
struct Reader {
  const int64_t* meta;
  const ffi::RemainingArgs& args;
  std::string wrong;

  // The `count` values of an argument, or null. `form` says what it must be, up to the count.
  const void* Take(Field field, std::initializer_list<Type> types, int64_t count, const char* form,
                   Type* type = nullptr) {
    if (!wrong.empty()) return nullptr;
    const auto got = Get(meta[field]);
    for (Type t : types) {
      if (!got || got->element_type() != t || static_cast<int64_t>(got->element_count()) != count) continue;
      if (type) *type = t;
      return got->untyped_data();
    }
    wrong = form + (" [" + std::to_string(count) + "], got ") + Described(got);
    return nullptr;
  }

  const float* Floats(Field field, int64_t count, const char* form) {
    return static_cast<const float*>(Take(field, {Type::F32}, count, form));
  }

  Ints Integers(Field field, int64_t count, const char* form) {
    Type type = Type::S32;
    const void* data = Take(field, {Type::S32, Type::S64}, count, form, &type);
    return {data, type == Type::S64};
  }

  // Row splits [count], or one row of [F, count].
  Ints Splits(int64_t count) {
    const auto got = Get(meta[kBags]);
    const int64_t row = meta[kSplitsRow];
    if (!got || got->dimensions().size() != 2) {
      if (row == 0) return Integers(kBags, count, "row_splits must be int32 or int64 [B + 1] =");
    } else if (got->dimensions()[1] == count && row >= 0 && row < got->dimensions()[0]) {
      const bool wide = got->element_type() == Type::S64;
      if (wide || got->element_type() == Type::S32) {
        return {static_cast<const char*>(got->untyped_data()) + row * count * (wide ? 8 : 4), wide};
      }
    }
    if (wrong.empty()) {
      wrong = "row " + std::to_string(row) + " of row_splits must be one of int32 or int64 [F, B + 1] = [F, " +
              std::to_string(count) + "], got " + Described(got);
    }
    return {};
  }

  std::optional<ffi::AnyBuffer> Get(int64_t position) const {
    if (position < 0 || position >= static_cast<int64_t>(args.size())) return std::nullopt;
    const auto got = args.get<ffi::AnyBuffer>(position);
    return got.has_value() ? std::optional<ffi::AnyBuffer>(*got) : std::nullopt;
  }
};

std::string DecodeStatic(const int64_t* meta, Bag* bag) {
  const struct {
    Field field;
    int64_t from, to;
    const char* name;
  } ranges[] = {{kLayout, 0, static_cast<int64_t>(Layout::kSparse), "layout"},
                {kCombiner, 0, static_cast<int64_t>(Combiner::kSqrtn), "combiner"},
                {kRowType, 0, static_cast<int64_t>(RowType::kCodes4), "row type"},
                {kNumBags, 0, INT32_MAX - 1, "num_bags"},
                {kSequenceLength, 0, INT32_MAX, "sequence_length"},
                {kDim, 1, INT32_MAX, "dim"}};
  for (const auto& range : ranges) {
    if (meta[range.field] < range.from || meta[range.field] > range.to) {
      return range.name + (" must be in [" + std::to_string(range.from)) + ", " + std::to_string(range.to) + "], got " +
             std::to_string(meta[range.field]);
    }
  }
  if (meta[kSequenceLength] * meta[kDim] > kMaxBagValues) {
    return "a sequence of " + std::to_string(meta[kSequenceLength]) + " rows of " + std::to_string(meta[kDim]) +
           " is too large";
  }
  bag->layout = static_cast<Layout>(meta[kLayout]);
  bag->combiner = static_cast<Combiner>(meta[kCombiner]);
  bag->prune_ids = meta[kPruneIds];
  bag->prune_weights = meta[kPruneWeights];
  bag->num_bags = meta[kNumBags];
  bag->sequence_length = meta[kSequenceLength];
  bag->table.dim = meta[kDim];
  bag->table.type = static_cast<RowType>(meta[kRowType]);
  if (bag->layout == Layout::kDense && bag->sequence_length) return "the dense layout has no sequences";
  return "";
}

Type StoredAs(RowType type) {
  switch (type) {
    case RowType::kF32: return Type::F32;
    case RowType::kBF16: return Type::BF16;
    case RowType::kF16: return Type::F16;
    default: return Type::U8;
  }
}

constexpr int64_t kMaxVocabulary = int64_t{1} << 40;

bool HasCodebook(RowType type) { return type == RowType::kCodes8 || type == RowType::kCodes4; }

std::string DecodeResident(Reader& read, Table* table) {
  const auto all = read.Get(read.meta[kRows]);
  const int64_t row = read.meta[kTableRow], vocabulary = read.meta[kVocabulary];
  if (!all || all->element_type() != Type::S32 || all->dimensions().size() != 2 || all->dimensions()[1] != 4 || row < 0 ||
      row >= all->dimensions()[0] || vocabulary > kMaxVocabulary) {
    return "addresses of tables must be int32 [T, 4] with T above " + std::to_string(row) + ", for a table of " +
           std::to_string(vocabulary) + " rows, got " + Described(all);
  }
  uint64_t at[2];
  std::memcpy(at, static_cast<const char*>(all->untyped_data()) + row * sizeof at, sizeof at);
  table->rows = reinterpret_cast<const void*>(at[0]);
  table->codebook = reinterpret_cast<const float*>(at[1]);
  table->vocabulary = vocabulary;
  if (!table->rows || (HasCodebook(table->type) && !table->codebook)) {
    return "row " + std::to_string(row) + " of the addresses of tables holds none";
  }
  return "";
}

std::string DecodeTable(Reader& read, Table* table) {
  if (read.meta[kVocabulary] >= 0) return DecodeResident(read, table);
  const auto rows = read.Get(read.meta[kRows]);
  const Type type = StoredAs(table->type);
  const int64_t columns = table->row_bytes() / static_cast<int64_t>(ffi::ByteWidth(type));
  if (!rows || rows->dimensions().size() != 2 || rows->dimensions()[1] != columns || rows->element_type() != type) {
    return "a table of dim " + std::to_string(table->dim) + " must be " + Named(type) + " [V, " +
           std::to_string(columns) + "], got " + Described(rows);
  }
  table->rows = rows->untyped_data();
  table->vocabulary = rows->dimensions()[0];
  if (table->type == RowType::kCodes8) {
    table->codebook = read.Floats(kCodebook, 256, "a codebook must be float32");
  } else if (table->type == RowType::kCodes4) {
    table->codebook = read.Floats(kCodebook, 16, "a codebook must be float32");
  }
  return read.wrong;
}

std::string DecodeOutput(const int64_t* meta, ffi::RemainingRets& rets, int64_t outs, Bag* bag) {
  std::optional<ffi::AnyBuffer> out;
  if (meta[kOut] >= 0 && meta[kOut] < outs) {
    auto got = rets.get<ffi::AnyBuffer>(meta[kOut]);
    if (got.has_value()) out = **got;
  }
  const bool half = bag->table.type == RowType::kBF16 || bag->table.type == RowType::kF16;
  const Type type = half ? StoredAs(bag->table.type) : Type::F32;
  const int64_t want = bag->table.dim * (bag->sequence_length ? bag->sequence_length : 1), from = meta[kColumn];
  // Values of a bag: [B, D], [B, L, D], or [B, columns of all features].
  int64_t width = out ? 1 : 0;
  if (out) {
    for (size_t i = 1; i < out->dimensions().size(); ++i) width *= out->dimensions()[i];
  }
  if (!out || out->element_type() != type || out->dimensions().size() == 0 || out->dimensions()[0] != bag->num_bags ||
      width < want || from < 0 || from > width - want) {
    return "the output must hold " + std::to_string(want) + " columns of " + Named(type) + " from " +
           std::to_string(from) + " on for each of " + std::to_string(bag->num_bags) + " bags, got " + Described(out);
  }
  bag->out = static_cast<char*>(out->untyped_data()) + from * static_cast<int64_t>(ffi::ByteWidth(type));
  bag->out_stride = width;
  return "";
}

}  // namespace

std::string Decode(const int64_t* meta, const ffi::RemainingArgs& args, ffi::RemainingRets& rets, int64_t outs,
                   Bag* bag) {
  std::string wrong = DecodeStatic(meta, bag);
  if (!wrong.empty()) return wrong;
  Reader read{meta, args, ""};
  wrong = DecodeTable(read, &bag->table);
  if (!wrong.empty()) return wrong;
  const auto ids = read.Get(meta[kIds]);
  if (!ids) return "ids must be int32 or int64 [N], got none";
  const int64_t n = bag->num_ids = ids->element_count();
  if (n > INT32_MAX) return "at most 2^31 - 1 ids, got " + std::to_string(n) + "; look the batch up in parts";
  bag->ids = read.Integers(kIds, n, "ids must be int32 or int64 [N] =");
  if (bag->layout == Layout::kRagged) {
    bag->bags = read.Splits(bag->num_bags + 1);
  } else if (bag->layout == Layout::kSparse) {
    bag->bags = read.Integers(kBags, n, "row ids must be int32 or int64 [N] =");
    if (bag->sequence_length) bag->columns = read.Integers(kColumns, n, "columns must be int32 or int64 [N] =");
  } else if (n != bag->num_bags) {
    return "the dense layout needs as many bags as ids, got " + std::to_string(bag->num_bags) + " bags for " +
           std::to_string(n) + " ids";
  }
  const bool combined = bag->layout != Layout::kDense && !bag->sequence_length;
  if (combined && meta[kWeights] >= 0) bag->weights = read.Floats(kWeights, n, "weights must be float32 [N] =");
  if (!read.wrong.empty()) return read.wrong;
  return DecodeOutput(meta, rets, outs, bag);
}

}  // namespace jaxembed
