// Launching: the blocks of a grid, spread over operating system threads.
#pragma once
#include <string>

namespace sim {

// Keeps a message for sim_last_error(), and is 1.
int refuse(const std::string& message);

}  // namespace sim
