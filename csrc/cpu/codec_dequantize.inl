// Dequantize: 4-bit blocks, 8-bit blocks, int8 rows, each as a source of any run of elements.

// The fp32 scales of `count` blocks from `first` on.
static void load_scales(const BlockScales& scales, int64_t first, int64_t count, float* out) {
  if (scales.plain != nullptr) {
    memcpy(out, scales.plain + first, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  const float offset = *scales.offset;
  for (int64_t done = 0; done < count;) {
    const int64_t block = first + done;
    const int64_t run = smaller(count - done, (((block >> scales.nested_shift) + 1) << scales.nested_shift) - block);
    const float by = scales.nested[block >> scales.nested_shift];
    const uint8_t* codes = scales.codes + block;
    float* to = out + done;
    int64_t i = 0;
    for (; i + kLanes <= run; i += kLanes) {
      const F32 looked_up = gather(scales.map, load_bytes(codes + i));
      store(to + i, add(mul(looked_up, broadcast(by)), broadcast(offset)));
    }
    for (; i < run; ++i) to[i] = scales.map[codes[i]] * by + offset;
    done += run;
  }
}

// codebook * scale, rounded to T: with it a block is decoded by lookups alone.
template <class T>
static inline void scaled_codes(const float* codebook, float by, T* codes) {
  for (int i = 0; i < 16; i += kLanes) store(codes + i, mul(load(codebook + i), broadcast(by)));
}

// `count` elements of one block from flat element `start` on.
template <class T>
static inline void decode_run(const uint8_t* packed, int64_t start, int64_t count, const T* codes, T* out) {
  int64_t i = 0;
  if ((start & 1) != 0 && count > 0) out[i++] = codes[packed[start >> 1] & 15];
  const uint8_t* p = packed + ((start + i) >> 1);
  if (count - i >= 32) {
    const auto table = load_table(codes);
    for (; i + 32 <= count; i += 32, p += 16) decode(p, table, out + i);
  }
  for (; i + 2 <= count; i += 2, ++p) {
    out[i] = codes[*p >> 4];
    out[i + 1] = codes[*p & 15];
  }
  if (i < count) out[i] = codes[*p >> 4];
}

// `count` elements from flat element `start` on, over as many blocks as that takes.
template <class T>
static void decode_span(const Packed4& source, int64_t start, int64_t count, T* out) {
  alignas(64) T codes[16];
  int64_t done = 0;
  while (done < count) {
    const int64_t at = start + done;
    const int64_t block = at >> source.block_shift;
    const int64_t run = smaller(count - done, ((block + 1) << source.block_shift) - at);
    scaled_codes(source.codebook, source.scales.at(block), codes);
    decode_run(source.packed, at, run, codes, out + done);
    done += run;
  }
}

// ---- where the values go
// ---------------------------------------------------------------------------------------------

constexpr int64_t kSpan = 65536;  // elements of a task

// out[start, start + count) by way of a buffer in L1, whole lines of it past the caches; out begins at a line.
template <class T, class Source>
static void stream_span(const Source& source, int64_t start, int64_t count, T* out) {
  constexpr int64_t kBuffer = 4096 / static_cast<int64_t>(sizeof(T));
  alignas(64) T buffer[kBuffer];
  for (int64_t done = 0; done < count; done += kBuffer) {
    const int64_t here = smaller(kBuffer, count - done);
    source.decode(start + done, here, buffer);
    stream(out + start + done, buffer, here * static_cast<int64_t>(sizeof(T)));
  }
  finish_streams();
}

template <class Source>
struct DequantizeJob {
  Source source;
  int64_t count;
  void* out;
  DType dtype;
  bool streamed;

  template <class T>
  void write(int64_t start, int64_t here, T* to) const {
    if (streamed) return stream_span(source, start, here, to);
    source.decode(start, here, to + start);
  }
};

template <class Source>
static void dequantize_task(void* context, int64_t index) {
  const DequantizeJob<Source>& job = *static_cast<const DequantizeJob<Source>*>(context);
  const int64_t start = index * kSpan;
  const int64_t count = smaller(kSpan, job.count - start);
  switch (job.dtype) {
    case DType::f32:
      return job.write(start, count, static_cast<float*>(job.out));
    case DType::f16:
      return job.write(start, count, static_cast<F16*>(job.out));
    case DType::bf16:
      return job.write(start, count, static_cast<Bf16*>(job.out));
  }
}

template <class Source>
static Status dequantize_to(const Source& source, int64_t count, void* out, DType dtype, int threads) {
  DequantizeJob<Source> job{source, count, out, dtype, streams(out, count * size_of(dtype))};
  parallel_for(threads, divide_up(count, kSpan), dequantize_task<Source>, &job);
  return success();
}

// ---- the three sources
// -----------------------------------------------------------------------------------------------

struct Blocks4 {
  Packed4 packed;

  template <class T>
  void decode(int64_t start, int64_t count, T* out) const {
    decode_span(packed, start, count, out);
  }
};

static Status dequantize_4bit(const Dequantize4Args& args) {
  return dequantize_to(Blocks4{args.source}, args.count, args.out, args.dtype, args.threads);
}

struct Blocks8 {
  const uint8_t* codes;
  const float* absmax;
  const float* map;
  int64_t block_size;

  template <class T>
  void decode(int64_t start, int64_t count, T* out) const {
    int64_t done = 0;
    while (done < count) {
      const int64_t block = (start + done) / block_size;
      const int64_t run = smaller(count - done, (block + 1) * block_size - start - done);
      const uint8_t* from = codes + start + done;
      const F32 by = broadcast(absmax[block]);
      int64_t i = 0;
      for (; i + kLanes <= run; i += kLanes) store(out + done + i, mul(gather(map, load_bytes(from + i)), by));
      for (; i < run; ++i) from_float(map[from[i]] * absmax[block], out + done + i);
      done += run;
    }
  }
};

static Status dequantize_8bit(const Dequantize8Args& args) {
  return dequantize_to(Blocks8{args.codes, args.absmax, args.map, args.block_size}, args.count, args.out, args.dtype,
                       args.threads);
}

struct RowsInt8 {
  Rows8 rows;
  int64_t cols;

  template <class T>
  void decode(int64_t start, int64_t count, T* out) const {
    int64_t row = start / cols;
    for (int64_t done = 0; done < count; ++row) {
      const int64_t run = smaller(count - done, (row + 1) * cols - start - done);
      decode_row(rows.q + start + done, rows.absmax[row], run, out + done);
      done += run;
    }
  }

  template <class T>
  static void decode_row(const int8_t* q, float absmax, int64_t count, T* out) {
    const F32 by = broadcast(absmax);
    int64_t i = 0;
    // Far from fp32's limits the quotient comes from the reciprocal; a division takes longer than the memory.
    if (absmax > 0x1p-100F && absmax < 0x1p100F) {
      for (; i + kLanes <= count; i += kLanes) store(out + i, divide_by_127(mul(load(q + i), by)));
    } else {
      for (; i + kLanes <= count; i += kLanes) store(out + i, div(mul(load(q + i), by), broadcast(127.0F)));
    }
    for (; i < count; ++i) from_float(static_cast<float>(q[i]) * absmax / 127.0F, out + i);
  }
};

static Status dequantize_int8(const DequantizeRowsArgs& args) {
  return dequantize_to(RowsInt8{args.source, args.cols}, args.rows * args.cols, args.out, args.dtype, args.threads);
}
