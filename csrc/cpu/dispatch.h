// Which ISA's kernels run: an ordered table, best first, and the one that is active.
#pragma once
#include <string>
#include <vector>

#include "core/kernels.h"

namespace nybble::cpu {

// Names of the ISAs that this machine can run, best first.
std::vector<std::string> isas();

// The kernels in use: the best of isas(), or the one that NYBBLE_FORCE_ISA names. Null when that variable names one
// that this machine cannot run; forced_isa() then tells what it says.
const KernelTable* active();
std::string forced_isa();

// Makes `name` the active ISA; false (and no change) when this machine cannot run it.
bool set_active(const std::string& name);

}  // namespace nybble::cpu
