// `operator new`, which a test can make fail. In a file of its own, so that the compiler does not
// see through the pairs of `new` and `delete` elsewhere and find them mismatched.
#include <cstdlib>
#include <new>

#include "ffi_runtime.h"

void* operator new(size_t size) {
  void* const memory =
      fuzz::allocations_left >= 0 && fuzz::allocations_left-- == 0 ? nullptr : std::malloc(size);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
void* operator new[](size_t size) { return ::operator new(size); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
