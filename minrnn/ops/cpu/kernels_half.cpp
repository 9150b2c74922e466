// The kernels of kernels.h in bfloat16 and float16, with float32 arithmetic and states.
#include "entries.h"

namespace minrnn {

MINRNN_FORMULAS(MINRNN_DEFINE, BFloat16)
MINRNN_FORMULAS(MINRNN_DEFINE, Float16)

}  // namespace minrnn
