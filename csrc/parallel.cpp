#include "parallel.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace dsd {
namespace {

struct Work {
    void (*task)(void*, int64_t);
    void* context;
    int64_t n_tasks;
    std::atomic<int64_t> next{0};

    void help() {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n_tasks;) {
            task(context, i);
        }
    }
};

// How long a helper looks for the next call before it sleeps: longer than what lies between calls.
constexpr std::chrono::microseconds kPatience{100};

class Crew {
  public:
    explicit Crew(int n_helpers) {
        helpers_.reserve(static_cast<size_t>(n_helpers));
        try {
            for (int i = 0; i < n_helpers; ++i) helpers_.emplace_back([this] { serve(); });
        } catch (const std::system_error&) {
            // The system refuses more threads: those that started do the work.
        }
    }

    ~Crew() {
        over_.store(true);
        call();
        for (std::thread& helper : helpers_) helper.join();
    }

    void run(Work& work) {
        open_.store(&work);
        call();
        work.help();
        // Whoever has not begun by now finds nothing; the others are at their last task.
        open_.store(nullptr);
        while (inside_.load() > 0) std::this_thread::yield();
    }

  private:
    void call() {
        calls_.fetch_add(1);
        if (asleep_.load() > 0) {
            {
                const std::lock_guard<std::mutex> lock(mutex_);
            }
            awake_.notify_all();
        }
    }

    void serve() {
        for (uint32_t done = 0;;) {
            const auto until = std::chrono::steady_clock::now() + kPatience;
            while (calls_.load() == done) {
                if (std::chrono::steady_clock::now() < until) continue;
                std::unique_lock<std::mutex> lock(mutex_);
                asleep_.fetch_add(1);
                awake_.wait(lock, [&] { return calls_.load() != done; });
                asleep_.fetch_sub(1);
            }
            done = calls_.load();
            if (over_.load()) return;
            inside_.fetch_add(1);
            if (Work* work = open_.load()) work->help();
            inside_.fetch_sub(1);
        }
    }

    std::vector<std::thread> helpers_;
    std::mutex mutex_;
    std::condition_variable awake_;
    std::atomic<uint32_t> calls_{0};
    std::atomic<int> inside_{0}, asleep_{0};
    std::atomic<bool> over_{false};
    std::atomic<Work*> open_{nullptr};
};

thread_local std::unique_ptr<Crew> crew;

}  // namespace

bool keep_crew(int n_threads) {
    if (crew != nullptr || n_threads < 2) return false;
    crew = std::make_unique<Crew>(n_threads - 1);
    return true;
}

void release_crew() { crew.reset(); }

void run_tasks(int64_t n_tasks, int n_threads, void (*task)(void*, int64_t), void* context) {
    Work work{task, context, n_tasks};
    const int64_t n_helpers = (n_tasks < n_threads ? n_tasks : n_threads) - 1;
    if (n_helpers > 0 && crew != nullptr) return crew->run(work);
    std::vector<std::thread> helpers;
    // No memory is asked for while threads run: without it they could not be joined.
    if (n_helpers > 0) helpers.reserve(static_cast<size_t>(n_helpers));
    try {
        for (int64_t i = 0; i < n_helpers; ++i) helpers.emplace_back([&work] { work.help(); });
    } catch (const std::system_error&) {
        // The system refuses more threads: those that started and this one do the work.
    }
    work.help();
    for (std::thread& helper : helpers) helper.join();
}

}  // namespace dsd
