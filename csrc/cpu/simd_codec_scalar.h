// What the codecs alone need, in plain C++. Included by simd_scalar.h; what each one does: simd_codec_avx512.h says.

static inline void stream_line(void* to, const void* from) { memcpy(to, from, 64); }
static inline void finish_streams() {}
static inline F32 divide_by_127(F32 v) { return div(v, broadcast(127.0F)); }
static inline F32 through_f16(F32 v) {
  NYBBLE_LANES(v.lane[i] = f16_to_float(float_to_f16(v.lane[i])))
  return v;
}

struct Thresholds {
  float each[16];
};
static inline Thresholds load_thresholds(const float* t) {
  Thresholds thresholds;
  for (int i = 0; i < 16; ++i) thresholds.each[i] = t[i];
  return thresholds;
}
static inline I32 rank_of(F32 s, const Thresholds& t) {
  I32 rank = zero_index();
  for (int j = 0; j < 15; ++j) NYBBLE_LANES(rank.lane[i] += s.lane[i] > t.each[j] ? 1U : 0U)
  return rank;
}
static inline void pack_ranks(const I32* ranks, const uint8_t* map, uint8_t* packed) {
  for (int i = 0; i < 16; ++i) {
    const uint32_t* pair = ranks[2 * i / kLanes].lane + 2 * i % kLanes;
    packed[i] = static_cast<uint8_t>((map[pair[0]] << 4) | map[pair[1]]);
  }
}

#include "cpu/simd_buckets_plain.h"

struct Words {
  uint16_t lane[32];
};
static inline Words zero_words() {
  Words r;
  for (uint16_t& lane : r.lane) lane = 0;
  return r;
}
static inline Words max_words(Words so_far, const uint16_t* x) {
  for (int i = 0; i < 32; ++i) {
    const uint16_t magnitude = x[i] & 0x7FFFU;
    so_far.lane[i] = magnitude > so_far.lane[i] ? magnitude : so_far.lane[i];
  }
  return so_far;
}
static inline uint32_t reduce_max(const Words& v) {
  uint32_t r = 0;
  for (const uint16_t lane : v.lane) r = lane > r ? lane : r;
  return r;
}

static inline uint32_t signed_key(uint32_t magnitude, bool negative) { return negative ? 0U - magnitude : magnitude; }
static inline I32 floor_key(F32 v, const Bf16*) {
  I32 r;
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t bits = bits_of(v.lane[i]);
    const int32_t key = static_cast<int32_t>(signed_key(bits & 0x7FFFFFFFU, bits >> 31 != 0));
    r.lane[i] = static_cast<uint32_t>(key >> 16);
  }
  return r;
}
static inline I32 floor_key(F32 v, const F16*) {
  I32 r;
  for (int i = 0; i < kLanes; ++i) {
    const uint16_t nearest = float_to_f16(v.lane[i]);
    r.lane[i] = signed_key(nearest & 0x7FFFU, nearest >> 15 != 0);
    if (f16_to_float(nearest) > v.lane[i]) --r.lane[i];
  }
  return r;
}
static inline F32 key_value(I32 key, const Bf16*) {
  F32 r;
  for (int i = 0; i < kLanes; ++i) {
    const bool negative = key.lane[i] >> 31 != 0;
    r.lane[i] = float_of(signed_key(key.lane[i], negative) << 16 | (negative ? 0x80000000U : 0U));
  }
  return r;
}
static inline F32 key_value(I32 key, const F16*) {
  F32 r;
  for (int i = 0; i < kLanes; ++i) {
    const bool negative = key.lane[i] >> 31 != 0;
    r.lane[i] = f16_to_float(static_cast<uint16_t>(signed_key(key.lane[i], negative) | (negative ? 0x8000U : 0U)));
  }
  return r;
}
static inline void store_keys(int16_t* p, I32 key) {
  NYBBLE_LANES(p[i] = static_cast<int16_t>(key.lane[i] - (key.lane[i] >> 31)))
}

struct KeyThresholds {
  int16_t each[16];
};
static inline KeyThresholds load_key_thresholds(const int16_t* t) {
  KeyThresholds thresholds;
  for (int i = 0; i < 16; ++i) thresholds.each[i] = t[i];
  return thresholds;
}
static inline void pack_keys(const uint16_t* x, const KeyThresholds& t, const uint8_t* map, uint8_t* packed) {
  int16_t key[32];
  int16_t rank[32] = {};
  for (int i = 0; i < 32; ++i) key[i] = static_cast<int16_t>(x[i] ^ ((x[i] >> 15) * 0x7FFFU));
  for (int j = 0; j < 15; ++j) {
    for (int i = 0; i < 32; ++i) rank[i] = static_cast<int16_t>(rank[i] + (key[i] > t.each[j] ? 1 : 0));
  }
  for (int i = 0; i < 16; ++i) packed[i] = static_cast<uint8_t>((map[rank[2 * i]] << 4) | map[rank[2 * i + 1]]);
}
