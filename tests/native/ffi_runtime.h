// A stand-in for XLA's runtime: arrays, call frames, and thread pools that start tasks when they
// like.
#pragma once

#include <algorithm>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "xla/ffi/api/c_api.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

// To handlers it is opaque.
struct XLA_FFI_Error {
  std::string message;
  XLA_FFI_Error_Code code;
};

namespace fuzz {

[[noreturn]] inline void fail(const std::string& message) {
  std::fprintf(stderr, "fuzz_handlers: %s\n", message.c_str());
  std::_Exit(1);  // other threads may be running
}

constexpr unsigned kFlushSubnormals = 0x8040;  // FTZ and DAZ

// How floats are computed; without the flags of what has happened so far.
inline unsigned float_mode() {
#if defined(__SSE__)
  return _mm_getcsr() & ~0x3Fu;
#else
  return std::fegetround();
#endif
}

// On this thread, `operator new` throws once, after so many more calls. A negative number is never.
inline thread_local int64_t allocations_left = -1;

class FailingAllocation {
 public:
  explicit FailingAllocation(int64_t allocations) : before_(allocations_left) {
    allocations_left = allocations;
  }
  ~FailingAllocation() { allocations_left = before_; }
  static bool has_failed() { return allocations_left < 0; }

 private:
  const int64_t before_;
};

// The default floating-point environment, or XLA's, in which subnormals are zeros.
class FloatEnvironment {
 public:
  explicit FloatEnvironment(bool flush) {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
#if defined(__SSE__)
    if (flush) _mm_setcsr(_mm_getcsr() | kFlushSubnormals);
#else
    (void)flush;
#endif
  }
  ~FloatEnvironment() { std::fesetenv(&before_); }

 private:
  std::fenv_t before_;
};

enum class Start {
  kAtOnce,
  kLate,     // some time later, often when the call is over
  kNever,    // not before `run_what_is_left`
  kRefused,  // never: Schedule returns an error
};

class Pool {
 public:
  Pool(std::string name, int64_t threads, Start start)
      : name(std::move(name)), threads(threads), start(start) {
    const bool has_workers = start == Start::kAtOnce || start == Start::kLate;
    for (int64_t i = 0; has_workers && i < threads; ++i) workers_.emplace_back([this] { work(); });
  }
  ~Pool() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    not_empty_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    run_what_is_left();
  }

  void schedule(std::function<void()> task) {
    {
      const std::lock_guard lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    not_empty_.notify_one();
  }

  void run_what_is_left() {
    while (const auto task = next()) task();
  }

  const std::string name;
  const int64_t threads;
  const Start start;

 private:
  std::function<void()> next() {
    const std::lock_guard lock(mutex_);
    if (tasks_.empty()) return nullptr;
    auto task = std::move(tasks_.front());
    tasks_.pop_front();
    return task;
  }

  void work() {
    const FloatEnvironment environment(/*flush=*/true);
    const unsigned mode = float_mode();
    for (int64_t turn = 0;; ++turn) {
      {
        std::unique_lock lock(mutex_);
        not_empty_.wait(lock, [&] { return stopping_ || !tasks_.empty(); });
        if (tasks_.empty()) return;
      }
      if (start == Start::kLate) {
        std::this_thread::sleep_for(std::chrono::microseconds(turn % 4 * 50));
      }
      if (const auto task = next()) task();
      if (float_mode() != mode) {
        fail("a task has changed the floating-point environment of the pool's thread");
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable not_empty_;
  std::deque<std::function<void()>> tasks_;
  bool stopping_ = false;
  std::vector<std::thread> workers_;
};

inline const XLA_FFI_Api& api() {
  static const XLA_FFI_Api table = [] {
    XLA_FFI_Api api = {};
    api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
    api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR,
                       XLA_FFI_API_MINOR};
    api.XLA_FFI_Error_Create = [](XLA_FFI_Error_Create_Args* args) {
      const FailingAllocation never(-1);  // XLA's own
      return new XLA_FFI_Error{args->message, args->errc};
    };
    api.XLA_FFI_Error_GetMessage = [](XLA_FFI_Error_GetMessage_Args* args) {
      args->message = args->error->message.c_str();
    };
    api.XLA_FFI_Error_Destroy = [](XLA_FFI_Error_Destroy_Args* args) { delete args->error; };
    api.XLA_FFI_ThreadPool_Schedule = [](XLA_FFI_ThreadPool_Schedule_Args* args) -> XLA_FFI_Error* {
      const FailingAllocation never(-1);  // XLA's own
      Pool& pool = *reinterpret_cast<Pool*>(args->ctx);
      if (pool.start == Start::kRefused) {
        return new XLA_FFI_Error{"no thread pool", XLA_FFI_Error_Code_UNIMPLEMENTED};
      }
      pool.schedule([task = args->task, data = args->data] { task(data); });
      return nullptr;
    };
    api.XLA_FFI_ThreadPool_NumThreads =
        [](XLA_FFI_ThreadPool_NumThreads_Args* args) -> XLA_FFI_Error* {
      const FailingAllocation never(-1);  // XLA's own
      const Pool& pool = *reinterpret_cast<Pool*>(args->ctx);
      if (pool.threads == 0) {
        return new XLA_FFI_Error{"no thread pool", XLA_FFI_Error_Code_UNIMPLEMENTED};
      }
      *args->num_threads = pool.threads;
      return nullptr;
    };
    return api;
  }();
  return table;
}

// An array whose memory is as long as it must be: AddressSanitizer sees what goes past the end.
struct Array {
  Array(XLA_FFI_DataType dtype, int64_t item_size, std::vector<int64_t> dims)
      : dtype(dtype), item_size(item_size), dims(std::move(dims)) {
    data.reset(static_cast<char*>(std::malloc(bytes())));
    std::memset(data.get(), 0xA5, bytes());  // garbage, for results
  }

  int64_t count() const {
    int64_t count = std::count(dims.begin(), dims.end(), 0) > 0 ? 0 : 1;  // others may be huge
    for (const int64_t size : dims) count = count == 0 ? 0 : count * size;
    return count;
  }
  int64_t bytes() const { return count() * item_size; }

  XLA_FFI_DataType dtype;
  int64_t item_size;
  std::vector<int64_t> dims;
  struct Free {
    void operator()(char* data) const { std::free(data); }
  };
  std::unique_ptr<char, Free> data;
};

using Handler = XLA_FFI_Error*(XLA_FFI_CallFrame*);

// In the order of their names, which is XLA's.
using Attributes = std::map<std::string, std::variant<bool, int64_t>>;

// How a call has ended.
struct Outcome {
  XLA_FFI_Error_Code code = XLA_FFI_Error_Code_OK;
  std::string message = "";
  bool allocation_has_failed = false;
};

// Calls a handler as XLA does, with `args` operands and then the results. The handler's allocation
// number `failing` fails, if that is not negative.
inline Outcome call(Handler* handler, Pool& pool, std::vector<Array>& arrays, size_t args,
                    Attributes attributes, bool flush_subnormals, int64_t failing = -1) {
  std::vector<XLA_FFI_Buffer> buffers;
  for (Array& array : arrays) {
    const bool is_null = buffers.size() < args && array.bytes() == 0;  // as XLA has it
    buffers.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, array.dtype,
                       is_null ? nullptr : array.data.get(),
                       static_cast<int64_t>(array.dims.size()), array.dims.data()});
  }
  std::vector<void*> pointers;
  for (XLA_FFI_Buffer& buffer : buffers) pointers.push_back(&buffer);
  std::vector<XLA_FFI_ArgType> arg_types(args, XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> ret_types(arrays.size() - args, XLA_FFI_RetType_BUFFER);

  std::vector<XLA_FFI_ByteSpan> spans;
  std::vector<XLA_FFI_Scalar> scalars;
  for (auto& [name, value] : attributes) {
    spans.push_back({name.data(), name.size()});
    if (bool* const flag = std::get_if<bool>(&value)) {
      scalars.push_back({XLA_FFI_DataType_PRED, flag});
    } else {
      scalars.push_back({XLA_FFI_DataType_S64, &std::get<int64_t>(value)});
    }
  }
  std::vector<XLA_FFI_ByteSpan*> names;
  for (XLA_FFI_ByteSpan& span : spans) names.push_back(&span);
  std::vector<void*> attrs;
  for (XLA_FFI_Scalar& scalar : scalars) attrs.push_back(&scalar);
  std::vector<XLA_FFI_AttrType> attr_types(attrs.size(), XLA_FFI_AttrType_SCALAR);

  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api();
  frame.ctx = reinterpret_cast<XLA_FFI_ExecutionContext*>(&pool);
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(args), arg_types.data(),
                pointers.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(ret_types.size()),
                ret_types.data(), pointers.data() + args};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr,      static_cast<int64_t>(attrs.size()),
                 attr_types.data(),         names.data(), attrs.data()};

  const FloatEnvironment environment(flush_subnormals);
  const unsigned mode = float_mode();
  Outcome outcome;
  std::unique_ptr<XLA_FFI_Error> error;
  {
    const FailingAllocation armed(failing);
    error.reset(handler(&frame));
    outcome.allocation_has_failed = failing >= 0 && armed.has_failed();
  }
  if (float_mode() != mode) fail("a call has changed the caller's floating-point environment");
  if (error) {
    outcome.code = error->code;
    outcome.message = error->message;
  }
  return outcome;
}

}  // namespace fuzz
