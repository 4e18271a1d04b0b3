// The host side of gpu.cuh: the names that kernels use, on the emulator.
#pragma once
#include "gpu_words.h"
#include "gpu_numbers.h"
#include "gpu_warp.h"
#include "gpu_block.h"
#include "gpu_wgmma.h"
#include "gpu_export.h"
