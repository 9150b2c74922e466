// The kernels of kernels.h in float32 and float64.
#include "entries.h"

namespace minrnn {

MINRNN_FORMULAS(MINRNN_DEFINE, float)
MINRNN_FORMULAS(MINRNN_DEFINE, double)

}  // namespace minrnn
