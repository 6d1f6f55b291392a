// Explains why macOS aborted work on the GPU. When this happens, MLX throws an exception on one of Metal's
// threads, where it cannot be caught. The process then ends with Metal's message, which contains only the
// name of an error constant.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

#include "core/binding.h"

namespace segtrain {

namespace {

/// Returns a sentence that explains MLX's message about a failed command buffer, or our message that there is
/// no host memory. Returns "" for other messages.
std::string explained(const std::string& what) {
  auto has = [&](const char* part) { return what.find(part) != std::string::npos; };
  const std::string offload = "[offload] ";
  if (what.rfind(offload, 0) == 0) return what.substr(offload.size());
  if (!has("Command buffer execution failed")) return "";
  if (has("Impacting Interactivity") || has("Timeout"))
    return "macOS ended the run's work on the GPU because one command buffer kept the display waiting too "
           "long: set MLX_MAX_OPS_PER_BUFFER=1, which makes command buffers as short as possible, or lower "
           "max_seq_length or batch_size; the last checkpoint is kept (see docs/mac.md).";
  if (has("OutOfMemory") || has("Insufficient Memory"))
    return "the GPU had no memory left for the run: close other programs, or lower memory_budget_gb, "
           "max_seq_length or batch_size; the last checkpoint is kept (see docs/mac.md).";
  return "the GPU could not finish the run's work: resume from the last checkpoint, and if the error happens "
         "again, report it with the output of `mlx-segtrain doctor`.";
}

std::terminate_handler before = nullptr;

[[noreturn]] void say_and_end() {
  if (auto error = std::current_exception()) try {
      std::rethrow_exception(error);
    } catch (const std::exception& known) {
      const auto text = explained(known.what());
      if (!text.empty()) std::fprintf(stderr, "error: %s\n", text.c_str());
    } catch (...) {
    }
  before();
  std::abort();
}

}  // namespace

const Binding failures_binding([](nb::module_& m) {
  before = std::set_terminate(say_and_end);
  m.def(
      "explain_failure", &explained, "what"_a,
      "Returns a sentence that explains MLX's message about a failed command buffer on Metal, or our message "
      "that there is no host memory, or an empty string for any other message.");
});

}  // namespace segtrain
