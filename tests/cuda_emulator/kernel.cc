// One kernel, SOURCE with its macros, to be called with an array of pointers. THREADS_MEET says whether
// its threads do.
#include "cuda.h"

#include <utility>

#include SOURCE

template <class... Pointers, size_t... kIndices>
void call(void (*kernel)(Pointers...), void** arrays, std::index_sequence<kIndices...>) {
  kernel(static_cast<Pointers>(arrays[kIndices])...);
}
template <class... Pointers>
size_t count(void (*)(Pointers...)) {
  return sizeof...(Pointers);
}
template <class... Pointers>
void call(void (*kernel)(Pointers...), void** arrays) {
  call(kernel, arrays, std::index_sequence_for<Pointers...>());
}

bool threads_meet() { return THREADS_MEET; }
size_t num_arrays() { return count(KERNEL); }
void run_thread(void** arrays) { call(KERNEL, arrays); }
