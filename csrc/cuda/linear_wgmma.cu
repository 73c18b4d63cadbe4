// Linear operations of more than a few rows on Hopper: the weight is decoded into shared memory, tile by tile, for the
// tensor cores of whole warpgroups.
//
//   out^T = W x^T: the 64 rows of a wgmma are rows of the weight (forward) or its columns (grad_input), its up to 256
//   columns are tokens, so that few tokens waste nothing.
//
//   tile of a step     forward    128 rows of W, lines of 64 columns = k      K-major
//                      grad_input  64 rows of W = k, two lines of 64 columns  MN-major: the same bytes, one copy of W
//                      x          Tokens lines of 64 k                        K-major
//
// Two warpgroups multiply, one (256 tokens) or two fill stages ahead of them: packed bytes by asynchronous copies two
// chunks ahead, decoded in registers (block_table.cuh), stored swizzled; x by asynchronous copies. A block is one for a
// multiprocessor and takes tiles until there are none; parts of a contraction are tiles of their own.
//
// Counted for a step, 8192 weights (4-bit, blocks of 64), in wavefronts of 128 bytes, of which shared memory does one a
// cycle, and in cycles of the tensor cores (64 x 256 x 16 in 128) and of the units for integers (16 lanes a cycle of
// each of four schedulers; 200 to 230 of a filling warp's 260 to 340 instructions). NOT measured yet.
//
//   tokens   tile, packed in and out   x in   read by wgmma   shared memory   tensor cores   integers   a step,
//   expected
//       32             192              32         192            416              128         430             440
//       64             192              64         256            512              256         430             520
//      128             192             128         384            704              512         440             720
//      256             192             256         640           1088             1024         450            1130
//
// Registers: 168 at the start of a block for 256 tokens (192 multiply, 120 fill), else 128 (144, 112). Shared memory:
// 212 KB for 256 tokens, 196 KB for 128, 212 KB for 64, 188 KB for 32.
#include "cuda/linear_wgmma_fill.cuh"

#include "cuda/launch.cuh"

namespace nybble::cuda {

namespace {

using namespace warpgroups;

template <class T, bool Grad, int Tokens>
__global__ void __launch_bounds__(Layout<Tokens>::kThreads, 1) linear_wgmma_kernel(const Problem problem) {
#if defined(NYBBLE_HOPPER) || defined(NYBBLE_SHIM)
  using Memory = Layout<Tokens>;
  const int thread = static_cast<int>(threadIdx.x);
  fill_scale_map(reinterpret_cast<float*>(shared_memory() + Memory::kMap), problem.weight);
  if (thread < Memory::kStages) {
    mbarrier_init(Memory::full(thread), 2 * kWarpgroup);         // each thread that fills: its copies and its stores
    mbarrier_init(Memory::empty(thread), kMultipliers / kWarp);  // each warp that multiplies
  }
  __syncthreads();
  const int warpgroup = warp() / 4;
  if (warpgroup < 2) {
    more_registers<Tokens == 256 ? 192 : 144>();
    multiply_tiles<T, Grad, Tokens>(problem, warpgroup);
  } else {
    fewer_registers<Tokens == 256 ? 120 : 112>();
    fill_tiles<T, Grad, Tokens>(problem, thread - kMultipliers);
  }
#else
  (void)problem;
#endif
}

// How a problem is cut, and what that is expected to cost.
struct Plan {
  int tokens = 0;
  int splits = 1;
  double cycles = 0.0;
};

struct TileCost {
  int tokens;
  double step;  // cycles
};

// NOT measured yet.
constexpr TileCost kCosts[] = {{32, 440.0}, {64, 520.0}, {128, 720.0}, {256, 1130.0}};

Plan plan_of(const Problem& problem, int multiprocessors) {
  constexpr double kFixed = 2500.0;    // cycles from a block's start to its first product, and to store
  constexpr double kBandwidth = 32.0;  // bytes a cycle of a multiprocessor from and to L2
  Plan best;
  for (const TileCost& cost : kCosts) {
    if (best.tokens > 0 && problem.m <= cost.tokens / 2) break;
    const int64_t tiles = problem.row_tiles * divide_up(problem.m, cost.tokens);
    for (int splits = 1; splits <= 16 && splits <= larger(1, problem.steps); ++splits) {
      const int64_t items = tiles * splits;
      const int64_t bytes = int64_t{kRows} * cost.tokens * 4;
      if (splits > 1 && (tiles > kCounters || items > (kWorkspaceBytes - kCounters * 4) / bytes)) break;
      const double rounds = static_cast<double>(divide_up(items, multiprocessors));
      double cycles = static_cast<double>(divide_up(problem.steps, splits)) * cost.step + kFixed + 8.0 * cost.tokens;
      const int moved = splits == 1 ? 0 : splits == 2 ? 2 : splits + 1;  // tiles of sums, by a block that adds
      cycles += static_cast<double>(moved * bytes) / kBandwidth;
      if (best.tokens == 0 || rounds * cycles < best.cycles) best = {cost.tokens, splits, rounds * cycles};
    }
  }
  return best;
}

template <class T, bool Grad, int Tokens>
Status start(Problem problem, const Plan& plan, const Device& device, const Place& place) {
  problem.splits = plan.splits;
  problem.token_tiles = divide_up(problem.m, Tokens);
  problem.items = problem.row_tiles * problem.token_tiles * plan.splits;
  const dim3 grid(static_cast<unsigned>(smaller(problem.items, device.multiprocessors)));
  return launch<&linear_wgmma_kernel<T, Grad, Tokens>>(grid, Layout<Tokens>::kThreads, Layout<Tokens>::kBytes, place,
                                                       problem);
}

template <class T, bool Grad>
Status start(const Problem& problem, const Device& device, const Place& place) {
  const Plan plan = plan_of(problem, device.multiprocessors);
  switch (plan.tokens) {
    case 32:
      return start<T, Grad, 32>(problem, plan, device, place);
    case 64:
      return start<T, Grad, 64>(problem, plan, device, place);
    case 128:
      return start<T, Grad, 128>(problem, plan, device, place);
    default:
      return start<T, Grad, 256>(problem, plan, device, place);
  }
}

}  // namespace

Status linear_wgmma(const LinearArgs& args, const Device& device, const Place& place) {
  if (args.m == 0 || args.columns() == 0) return success();
  const bool bf16 = args.dtype == DType::bf16;
  Problem problem = {};
  problem.weight = args.weight;
  problem.side = args.side;
  problem.x = args.x;
  problem.x_stride = args.x_stride;
  problem.m = args.m;
  problem.contraction = args.contraction();
  problem.columns = args.columns();
  problem.bias = args.bias;
  problem.bias_dtype = args.bias_dtype;
  problem.out = args.out;
  problem.steps = static_cast<int>(divide_up(problem.contraction, kStep));
  problem.side_steps = bf16 ? static_cast<int>(divide_up(args.side.rank, kStep)) : 0;
  if (problem.steps == 0) problem.weight.int8 = true;  // an empty weight: without scales, whose addresses are null
  problem.row_tiles = divide_up(problem.columns, kRows);
  problem.counters = static_cast<uint32_t*>(place.workspace);
  problem.partials = reinterpret_cast<float*>(problem.counters + kCounters);
  if (args.grad_input)
    return bf16 ? start<Bf16, true>(problem, device, place) : start<F16, true>(problem, device, place);
  return bf16 ? start<Bf16, false>(problem, device, place) : start<F16, false>(problem, device, place);
}

}  // namespace nybble::cuda
