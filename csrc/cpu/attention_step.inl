// One new token of each row against the keys and values of those before it: rotate its query and key, keep its key and
// value in their slot, softmax(scale q k^T) v. The cost is reading what is kept, so every key and value is read once a
// head that shares it, and widened in registers.
//
//   for every row, head of keys and kKeysOfTask of its keys (a task):
//     scores of the heads that share the keys; m their largest, p = exp(score - m), s = sum p, a = sum p v
//   for every row and head: out = sum a exp(m - most) / sum s exp(m - most), most the largest m
//
// All of it is fp32 and rounded once. Keys are counted from the first that a row sees, so a row's bits depend neither
// on the thread count nor on the rows beside it, nor on where its text begins in memory.

constexpr int64_t kKeysOfTask = 256;
constexpr int64_t kKeysTogether = 4;

struct StepJob {
  const AttentionStepArgs* args;
  int64_t pieces;  // of the keys of the row that sees most
  float* partial;  // [batch, kv heads, pieces, group, 2 + depth]: m, s, a
  Failure* failure;

  int64_t kv_heads() const { return args->heads / args->group; }
  int64_t part() const { return 2 + args->depth; }
};

// x [depth] rotated by half its depth (see RotaryArgs), or as it is.
template <class T>
static void rotate(const T* x, const float* cos, const float* sin, int64_t depth, float* out) {
  to_floats(x, depth, out);
  if (cos == nullptr) return;
  const int64_t half = depth / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = out[i], second = out[i + half];
    out[i] = first * cos[i] - second * sin[i];
    out[i + half] = second * cos[i + half] + first * sin[i + half];
  }
}

// scores[j] = scale query . key j, for `Keys` keys that lie beside each other.
template <class T, int Keys>
static NYBBLE_INLINE void score(const float* query, const T* keys, int64_t depth, float scale, float* scores) {
  F32 sums[Keys];
  for (int j = 0; j < Keys; ++j) sums[j] = zero();
  each_vector(depth, [&](int64_t i, int64_t count) {
    const F32 q = load_some(query + i, count);
    for (int j = 0; j < Keys; ++j) sums[j] = fma(q, load_some(keys + j * depth + i, count), sums[j]);
  });
  for (int j = 0; j < Keys; ++j) scores[j] = sum(sums[j]) * scale;
}

// out[depth] = sum of weights[j] values[j], `Vectors` vectors of it at a time.
template <class T, int Vectors>
static NYBBLE_INLINE void weigh(const float* weights, const T* values, int64_t count, int64_t depth, float* out) {
  F32 sums[Vectors];
  for (int v = 0; v < Vectors; ++v) sums[v] = zero();
  for (int64_t j = 0; j < count; ++j) {
    const F32 weight = broadcast(weights[j]);
    for (int v = 0; v < Vectors; ++v) sums[v] = fma(weight, load(values + j * depth + v * kLanes), sums[v]);
  }
  for (int v = 0; v < Vectors; ++v) store(out + v * kLanes, sums[v]);
}

template <class T>
static void weighted_values(const float* weights, const T* values, int64_t count, int64_t depth, float* out) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= depth; i += 4 * kLanes) weigh<T, 4>(weights, values + i, count, depth, out + i);
  for (; i + kLanes <= depth; i += kLanes) weigh<T, 1>(weights, values + i, count, depth, out + i);
  if (i == depth) return;
  F32 sums = zero();
  for (int64_t j = 0; j < count; ++j) {
    sums = fma(broadcast(weights[j]), load_some(values + j * depth + i, depth - i), sums);
  }
  store_some(out + i, sums, depth - i);
}

template <class T>
struct StepKernel {
  static void task(void* context, int64_t index) {
    const StepJob& job = *static_cast<const StepJob*>(context);
    const AttentionStepArgs& args = *job.args;
    const int64_t depth = args.depth, piece = index % job.pieces, pair = index / job.pieces;
    const int64_t batch = pair / job.kv_heads(), head = pair % job.kv_heads();
    const int64_t begin = args.first[batch] + piece * kKeysOfTask;
    const int64_t end = smaller(begin + kKeysOfTask, args.slot + 1);
    if (begin >= end) return;
    const int64_t bytes = (3 * depth + kKeysOfTask) * static_cast<int64_t>(sizeof(float));
    auto* rotated = static_cast<float*>(scratch(Slot::rows, static_cast<size_t>(bytes)));
    if (rotated == nullptr) {
      job.failure->report_memory(bytes);
      return;
    }
    float *cos = rotated + depth, *sin = cos + depth, *scores = sin + depth;
    if (args.cos == nullptr) {
      cos = sin = nullptr;
    } else {
      load_floats(args.cos, args.table_dtype, batch * depth, depth, cos);
      load_floats(args.sin, args.table_dtype, batch * depth, depth, sin);
    }
    const int64_t slots = batch * args.batch_stride + head * args.head_stride;
    T* keys = static_cast<T*>(args.keys) + slots;
    T* values = static_cast<T*>(args.values) + slots;
    if (end == args.slot + 1) {
      rotate(static_cast<const T*>(args.key) + batch * args.key_stride + head * depth, cos, sin, depth, rotated);
      from_floats(rotated, depth, keys + args.slot * depth);
      memcpy(static_cast<void*>(values + args.slot * depth),
             static_cast<const T*>(args.value) + batch * args.value_stride + head * depth,
             static_cast<size_t>(depth) * sizeof(T));
    }
    for (int64_t g = 0; g < args.group; ++g) {
      const int64_t query = batch * args.query_stride + (head * args.group + g) * depth;
      rotate(static_cast<const T*>(args.query) + query, cos, sin, depth, rotated);
      one_head(args, rotated, keys + begin * depth, values + begin * depth, end - begin, scores,
               job.partial + (index * args.group + g) * job.part());
    }
  }

  static void one_head(const AttentionStepArgs& args, const float* query, const T* keys, const T* values, int64_t count,
                       float* scores, float* out) {
    const int64_t depth = args.depth;
    int64_t j = 0;
    for (; j + kKeysTogether <= count; j += kKeysTogether) {
      score<T, kKeysTogether>(query, keys + j * depth, depth, args.scale, scores + j);
    }
    for (; j < count; ++j) score<T, 1>(query, keys + j * depth, depth, args.scale, scores + j);
    float most = scores[0];
    for (int64_t i = 1; i < count; ++i) most = scores[i] > most ? scores[i] : most;
    F32 sums = zero();
    each_vector(count, [&](int64_t i, int64_t left) {
      store_some(scores + i, exponential(sub(load_some(scores + i, left), broadcast(most))), left);
      sums = add(sums, load_some(scores + i, left));
    });
    out[0] = most;
    out[1] = sum(sums);
    weighted_values(scores, values, count, depth, out + 2);
  }

  // The pieces of a row's head together.
  static void join(void* context, int64_t pair) {
    const StepJob& job = *static_cast<const StepJob*>(context);
    const AttentionStepArgs& args = *job.args;
    const int64_t depth = args.depth, batch = pair / job.kv_heads(), head = pair % job.kv_heads();
    const int64_t pieces = divide_up(args.slot + 1 - args.first[batch], kKeysOfTask);
    for (int64_t g = 0; g < args.group; ++g) {
      const auto part = [&](int64_t piece) {
        return job.partial + ((pair * job.pieces + piece) * args.group + g) * job.part();
      };
      float most = part(0)[0], total = 0.0F;
      for (int64_t piece = 1; piece < pieces; ++piece) most = part(piece)[0] > most ? part(piece)[0] : most;
      for (int64_t piece = 0; piece < pieces; ++piece) {
        float* own = part(piece);
        float lanes[kLanes];
        store(lanes, exponential(broadcast(own[0] - most)));
        own[0] = lanes[0];
        total += own[0] * own[1];
      }
      T* out = static_cast<T*>(args.out) + (batch * args.heads + head * args.group + g) * depth;
      each_vector(depth, [&](int64_t i, int64_t count) {
        F32 sums = zero();
        for (int64_t piece = 0; piece < pieces; ++piece) {
          sums = fma(broadcast(part(piece)[0]), load_some(part(piece) + 2 + i, count), sums);
        }
        store_some(out + i, div(sums, broadcast(total)), count);
      });
    }
  }
};

template <class T>
static Status run_step(const AttentionStepArgs& args, int64_t pieces) {
  const int64_t pairs = args.batch * (args.heads / args.group);
  const int64_t bytes = pairs * pieces * args.group * (2 + args.depth) * static_cast<int64_t>(sizeof(float));
  Failure failure;
  StepJob job{&args, pieces, static_cast<float*>(scratch(Slot::inputs, static_cast<size_t>(bytes))), &failure};
  if (job.partial == nullptr) return out_of_memory(bytes);
  parallel_for(args.threads, pairs * pieces, StepKernel<T>::task, &job);
  if (!failure.status().ok()) return failure.status();
  parallel_for(pieces > 1 ? args.threads : 1, pairs, StepKernel<T>::join, &job);
  return success();
}

static Status attention_step(const AttentionStepArgs& args) {
  if (args.batch == 0 || args.heads == 0 || args.depth == 0) return success();
  int64_t most = 0;
  for (int64_t row = 0; row < args.batch; ++row) most = larger(most, args.slot + 1 - args.first[row]);
  const int64_t pieces = divide_up(most, kKeysOfTask);
  if (args.dtype == DType::f32) return run_step<float>(args, pieces);
  return args.dtype == DType::f16 ? run_step<F16>(args, pieces) : run_step<Bf16>(args, pieces);
}
