// What tests can set and ask.
#pragma once
#include <cstdint>

#include "shim/cuda/block.h"

namespace nybble::cuda::shim {

// ---- grid.cpp
void set_device(const Device& device);
Device get_device();
// Every launch begins its schedule anew from this number and its own shape, so that a test that is run again, whatever
// ran before it, sees the same one.
void set_seed(uint64_t seed);
int64_t launches();  // so far

// ---- guards.cpp
// Memory whose last (or first) byte is beside a page that must not be touched. Null: there is none to be had.
void* new_guarded(size_t bytes, size_t alignment, bool at_end, const char* name);
bool protect_guarded(void* data, bool read_only);
bool delete_guarded(void* data);
// What is known of an address outside shared memory.
void explain_global(const void* address, char* text, size_t size);

}  // namespace nybble::cuda::shim
