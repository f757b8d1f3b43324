// The copy engine's device for CUDA.
#pragma once

#include <memory>

#include "io/copy_device.h"

namespace thl::cuda {

// Copies to device number `index` on a stream of their own. Throws DeviceError.
std::shared_ptr<CopyDevice> copy_device(int index);

}  // namespace thl::cuda
