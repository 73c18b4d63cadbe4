// bucket_codes number by number, for an ISA without gathers; what it does: simd_codec_avx512.h says.

template <int Shift, bool Signed>
static inline I32 bucket_codes(F32 v, const uint32_t* entries, uint32_t floor) {
  constexpr uint32_t kTrailing = (1U << Shift) - 1, kMagnitude = 0x7FFFFFFFU;
  float numbers[kLanes];
  uint8_t codes[kLanes];
  store(numbers, v);
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t bits = bits_of(numbers[i]), magnitude = bits & kMagnitude;
    const uint32_t kept = magnitude > floor ? magnitude : floor;
    const uint32_t key = Signed && bits >> 31 != 0 ? kMagnitude - kept : kept;
    const uint32_t entry = entries[(key >> Shift) - (floor >> Shift)];
    codes[i] = static_cast<uint8_t>((entry >> Shift) + ((key & kTrailing) > (entry & kTrailing) ? 1U : 0U));
  }
  return load_bytes(codes);
}
