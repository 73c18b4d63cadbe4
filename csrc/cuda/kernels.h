// The entry points on a GPU: the structs of core/kernels.h with addresses of that GPU's memory, whose `threads` count
// for nothing, and where to run. All only start work on the stream: none waits for it, allocates memory or depends on
// what is under way, so every one can be captured in a graph. The same arguments give the same bits.
#pragma once
#include "core/kernels.h"

namespace nybble::cuda {

// A GPU as far as choices and grids depend on it.
struct Device {
  int capability = 90;  // 10 * major + minor
  int multiprocessors = 132;
  bool hopper() const { return capability == 90; }  // code for sm_90a runs on no other
};

struct Place {
  int device = 0;          // its number, which is also the current device of the calling thread
  void* stream = nullptr;  // a cudaStream_t
  // Memory of the device that only this stream uses, at least kWorkspaceBytes; its first kCounters 32-bit numbers are 0
  // before and after every kernel that counts with them, what comes after them is anything.
  void* workspace = nullptr;
};

constexpr int64_t kCounters = 4096;
constexpr int64_t kWorkspaceBytes = int64_t{17} << 20;  // partial sums of 128 x 256 for each of 135 multiprocessors
constexpr int64_t kMostInt8Columns = int64_t{1} << 20;  // of x in linear_int8: rows of codes lie in the workspace

// `failed` of the device, never null: lowered to the first block (row, for int8) that is not all finite, if one is not.
// The outputs of such a block are then undefined, those of AdamW8Args unchanged.
Status quantize_4bit(const Quantize4Args& args, int64_t* failed, const Place& place);
Status quantize_8bit(const Quantize8Args& args, int64_t* failed, const Place& place);
Status quantize_int8(const QuantizeRowsArgs& args, int64_t* failed, const Place& place);
Status dequantize_4bit(const Dequantize4Args& args, const Place& place);
Status dequantize_8bit(const Dequantize8Args& args, const Place& place);
Status dequantize_int8(const DequantizeRowsArgs& args, const Place& place);
Status adamw_32bit(const AdamW32Args& args, const Place& place);
Status adamw_8bit(const AdamW8Args& args, int64_t* failed, const Place& place);
Status sum_of_squares(const SquaresArgs& args, const Place& place);

// The linear kernels, each for the problems that choose.cpp says it can run.
Status linear_small_m(const LinearArgs& args, const Device& device, const Place& place);
Status linear_mma(const LinearArgs& args, const Device& device, const Place& place);
Status linear_wgmma(const LinearArgs& args, const Device& device, const Place& place);
Status linear_fp32(const LinearArgs& args, const Device& device, const Place& place);
Status linear_int8(const LinearArgs& args, const Device& device, const Place& place);

// Of device number `number`; its properties are read once.
Status device_properties(int number, Device* device);
// Makes it the calling thread's current device; `before`: which one was.
Status make_current(int number, int* before);

}  // namespace nybble::cuda
