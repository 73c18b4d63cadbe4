// Closes the target region that an ISA's file opened. No include guard: it is included once a file, on purpose.
#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
