// One instruction set's copy of the kernels. setup.py compiles this file once for each, with flags of its own and
// VISION_MAMBA_LEVEL naming it; nothing of it may run before library.cpp has asked the processor.
#include "backward.h"

namespace VISION_MAMBA_LEVEL {

void run_forward(const Job& job) { forward(job); }
void run_backward(const Job& job) { backward(job); }

}  // namespace VISION_MAMBA_LEVEL
