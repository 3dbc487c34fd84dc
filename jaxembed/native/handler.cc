// The XLA FFI handler: one call runs the embedding_bags of all features.
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "bag.h"
#include "decode.h"
#include "place.h"
#include "schedule.h"
#include "xla/ffi/api/ffi.h"

namespace jaxembed {
namespace {

namespace ffi = xla::ffi;

// Below this many bytes a call stays on its thread: waking another costs more.
constexpr int64_t kInlineBytes = 1 << 17;

struct Work {
  std::vector<Bag> bags;
  std::vector<Placed> placed;
  Plan plan;
  std::unique_ptr<std::atomic<int64_t>[]> bad;
  std::atomic<size_t> next{0}, done{0};
  std::atomic<bool> out_of_memory{false};

  // Takes tasks until none is left. A thread that comes late finds none and touches nothing else.
  void Run() {
    for (size_t i = next.fetch_add(1); i < plan.tasks.size(); i = next.fetch_add(1)) {
      const Task& task = plan.tasks[i];
      try {
        const int64_t bad_ids = RunBag(bags[task.feature], placed[task.feature], task);
        if (bad_ids) bad[task.feature].fetch_add(bad_ids, std::memory_order_relaxed);
      } catch (const std::bad_alloc&) {
        out_of_memory = true;
      }
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

// Names are not known here.
ffi::Error Invalid(int64_t feature, int64_t features, const std::string& what) {
  return ffi::Error::InvalidArgument("jaxembed: embedding_bag of feature " + std::to_string(feature) + " (from 0, of " +
                                     std::to_string(features) + " that the kernel looks up, in the order of their keys): " + what);
}

// What is wrong with operands, and what to do where that is not said.
std::string WithAdvice(const std::string& wrong) {
  if (wrong.find(';') != std::string::npos) return wrong;
  return wrong + "; make the operands fit the Bag, or export the program anew with this jaxembed";
}

// Small calls: all on this thread.
void RunInline(const std::vector<Bag>& bags, const std::vector<Placed>& all_placed, int32_t* bad) {
  for (size_t f = 0; f < bags.size(); ++f) {
    const Bag& bag = bags[f];
    const Placed& placed = all_placed[f];
    if (!bag.num_bags) continue;
    const bool dense = bag.layout == Layout::kDense;
    const int64_t begin = dense ? 0 : placed.splits[0], end = dense ? bag.num_ids : placed.splits[bag.num_bags];
    bad[f] =
        static_cast<int32_t>(RunBag(bag, placed, {static_cast<int32_t>(f), 0, bag.num_bags, begin, end, nullptr}));
  }
}

void RunShared(ffi::ThreadPool& pool, const std::shared_ptr<Work>& work, int64_t cost, int32_t* bad) {
  const int64_t features = static_cast<int64_t>(work->bags.size());
  Cut cut{std::max<int64_t>(pool.num_threads(), 2) * 3 / 2, cost};
  for (int64_t f = 0; f < features; ++f) {
    AddTasks(static_cast<int32_t>(f), work->bags[f], work->placed[f], &cut, &work->plan);
  }
  PlacePartials(work->bags.data(), &work->plan);
  work->bad = std::make_unique<std::atomic<int64_t>[]>(features);
  const size_t tasks = work->plan.tasks.size();
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), static_cast<int64_t>(tasks)) - 1;
  ScheduleAll(pool, helpers, [work] { work->Run(); });
  work->Run();
  for (int spins = 0; work->done.load(std::memory_order_acquire) < tasks; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
  for (const Shared& shared : work->plan.shared) {
    FinishBag(work->bags[shared.feature], shared.bag, work->plan.partials.data() + shared.first_partial, shared.count);
  }
  for (int64_t f = 0; f < features; ++f) bad[f] = static_cast<int32_t>(work->bad[f].load());
}

ffi::Error OutOfMemory() { return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jaxembed: out of memory"); }

ffi::Error EmbeddingBags(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                         ffi::Span<const int64_t> meta) try {
  const int64_t features = static_cast<int64_t>(meta.size()) / kFields;
  const int64_t outs = static_cast<int64_t>(rets.size()) - 1;
  if (meta.size() % kFields || outs < 0) {
    return ffi::Error::InvalidArgument("jaxembed: " + std::to_string(kFields) +
                                       " numbers a feature, and outputs of which the last is for the counts, make up a "
                                       "call; got " +
                                       std::to_string(meta.size()) + " numbers and " + std::to_string(rets.size()) +
                                       " outputs");
  }
  auto counts = rets.get<ffi::AnyBuffer>(outs);
  if (!counts || (*counts)->element_type() != ffi::DataType::S32 ||
      static_cast<int64_t>((*counts)->element_count()) != features) {
    return ffi::Error::InvalidArgument("jaxembed: the counts of bad ids must be int32 [F] = [" +
                                       std::to_string(features) + "]");
  }
  int32_t* bad = static_cast<int32_t*>((*counts)->untyped_data());
  // This thread's until its next call, so that small calls allocate nothing.
  thread_local std::vector<Scratch> scratch;
  thread_local std::vector<Bag> bags;
  thread_local std::vector<Placed> placed;
  if (static_cast<int64_t>(scratch.size()) < features) scratch.resize(features);
  bags.assign(features, Bag());
  placed.assign(features, Placed());
  int64_t cost = 0;
  for (int64_t f = 0; f < features; ++f) {
    Bag& bag = bags[f];
    std::string wrong = Decode(meta.begin() + f * kFields, args, rets, outs, &bag);
    if (!wrong.empty()) return Invalid(f, features, WithAdvice(wrong));
    wrong = Place(bag, scratch[f], &placed[f]);
    if (!wrong.empty()) return Invalid(f, features, wrong);
    cost += Cost(bag, placed[f]);
    bad[f] = 0;
  }
  if (cost < kInlineBytes) {
    RunInline(bags, placed, bad);
    return ffi::Error::Success();
  }
  auto work = std::make_shared<Work>();
  work->bags = bags;
  work->placed = placed;
  RunShared(pool, work, cost, bad);
  return work->out_of_memory ? OutOfMemory() : ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return OutOfMemory();
}

}  // namespace
}  // namespace jaxembed

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* JaxembedEmbeddingBags(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxembedEmbeddingBags, jaxembed::EmbeddingBags,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<xla::ffi::Span<const int64_t>>("meta"));
