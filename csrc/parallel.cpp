#include "parallel.h"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace dsd {

void run_tasks(int64_t n_tasks, int n_threads, void (*task)(void*, int64_t), void* context) {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n_tasks;) {
            task(context, i);
        }
    };
    std::vector<std::thread> helpers;
    const int64_t n_helpers = (n_tasks < n_threads ? n_tasks : n_threads) - 1;
    // No memory is asked for while threads run: without it they could not be joined.
    if (n_helpers > 0) helpers.reserve(static_cast<size_t>(n_helpers));
    try {
        for (int64_t i = 0; i < n_helpers; ++i) helpers.emplace_back(work);
    } catch (const std::system_error&) {
        // The system refuses more threads: those that started and this one do the work.
    }
    work();
    for (std::thread& helper : helpers) helper.join();
}

}  // namespace dsd
