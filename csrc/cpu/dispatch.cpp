#include <atomic>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace thl {
namespace {

constexpr const Kernels* kAll[] = {
    &kPortable,
#if defined(__x86_64__)
    &kAvx2, &kAvx512, &kAvx512Vnni,
#endif
};

const Kernels* best() {
    const Kernels* chosen = &kPortable;
    for (const Kernels* candidate : kAll)
        if (candidate->supported()) chosen = candidate;
    return chosen;
}

std::atomic<const Kernels*>& active() {
    static std::atomic<const Kernels*> chosen{best()};
    return chosen;
}

}  // namespace

const Kernels& kernels() { return *active().load(std::memory_order_relaxed); }

std::vector<const char*> available_isas() {
    std::vector<const char*> names;
    for (const Kernels* candidate : kAll)
        if (candidate->supported()) names.push_back(candidate->name);
    return names;
}

void set_isa(const char* name) {
    std::string found;
    for (const char* available : available_isas()) {
        if (std::string(available) == name) {
            for (const Kernels* candidate : kAll)
                if (std::string(candidate->name) == name) active() = candidate;
            return;
        }
        found += (found.empty() ? "" : ", ") + std::string(available);
    }
    throw std::invalid_argument("isa: expected one of " + found + ", found '" + name + "'");
}

}  // namespace thl
